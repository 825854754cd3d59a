"""Recurrent layers as linear operators.

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` compute every product inside one fused call, where no quantizer reaches it. Here the
same arithmetic is written with ``nn.Linear`` operators: per layer and direction ``ih`` reads the whole sequence at once and
``hh`` reads the hidden state at every step.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from alphasmith.objectives.errors import InputError

Hidden = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class _Direction(nn.Module):
    """One layer in one direction: ``ih`` (I -> G*H), ``hh`` (R -> G*H) and, with a projection, ``hr`` (H -> R)."""

    def __init__(self, source: nn.RNNBase, suffix: str) -> None:
        super().__init__()
        self.mode = source.mode
        self.ih = _linear(source, f"weight_ih_{suffix}", f"bias_ih_{suffix}")
        self.hh = _linear(source, f"weight_hh_{suffix}", f"bias_hh_{suffix}")
        self.hr = _linear(source, f"weight_hr_{suffix}", None) if source.proj_size else None

    def forward(
        self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor | None, backwards: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(L, B, I), (B, R), (B, H) or None -> outputs (L, B, R), last h, last c."""
        steps = list(self.ih(x).unbind(0))
        if backwards:
            steps.reverse()
        outputs: list[torch.Tensor] = []
        for step in steps:
            h, c = _cell(self.mode, step, self.hh(h), h, c)
            if self.hr is not None:
                h = self.hr(h)
            outputs.append(h)
        if backwards:
            outputs.reverse()
        return torch.stack(outputs), h, c


class UnrolledRecurrent(nn.Module):
    """An ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` built of ``nn.Linear`` operators.

    It has the arguments, the outputs and the public settings of the module it replaces, and shares its parameters. Layers
    are named as PyTorch numbers them: ``layers.0``, ``layers.0_reverse``, ``layers.1``, ...

    Args:
        source: The module to replace; its parameters are shared, not copied.

    Raises:
        InputError: A weight of ``source`` is not a parameter (weight normalization and other parametrizations).
    """

    def __init__(self, source: nn.RNNBase) -> None:
        super().__init__()
        self.mode = source.mode
        self.input_size = source.input_size
        self.hidden_size = source.hidden_size
        self.proj_size = source.proj_size
        self.num_layers = source.num_layers
        self.bias = source.bias
        self.batch_first = source.batch_first
        self.dropout = source.dropout
        self.bidirectional = source.bidirectional
        self.layers = nn.ModuleDict({key: _Direction(source, f"l{key}") for key in _keys(source)})
        self.train(source.training)

    def flatten_parameters(self) -> None:
        """Nothing to do: there is no fused buffer to compact. Present because models call it before every forward."""

    def extra_repr(self) -> str:
        """Mode and sizes, as the replaced module prints them."""
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"

    def forward(self, input: torch.Tensor, hx: Hidden | None = None) -> tuple[torch.Tensor, Hidden]:
        """Run the sequence.

        Args:
            input: (L, B, I), or (B, L, I) if ``batch_first``, or (L, I) for one sequence.
            hx: Initial state h (layers * directions, B, R), for LSTM the pair (h, c) with c (layers * directions, B, H);
                without B for one sequence; zeros when None. R = ``proj_size`` or H.

        Returns:
            Output (L, B, directions * R) in the layout of ``input``, and the last state in the layout of ``hx``.

        Raises:
            InputError: ``input`` is packed, empty or of the wrong shape, or ``hx`` does not fit it.
        """
        batched = self._check_input(input)
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        h, c = self._initial(hx, x, batched)
        last_h: list[torch.Tensor] = []
        last_c: list[torch.Tensor] = []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            if layer:
                x = nn.functional.dropout(x, self.dropout, self.training)
            outputs: list[torch.Tensor] = []
            for direction in range(directions):
                index = layer * directions + direction
                key = f"{layer}_reverse" if direction else f"{layer}"
                y, h_n, c_n = self.layers[key](x, h[index], None if c is None else c[index], direction == 1)
                outputs.append(y)
                last_h.append(h_n)
                if c_n is not None:
                    last_c.append(c_n)
            x = torch.cat(outputs, dim=-1) if directions == 2 else outputs[0]
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        states = [torch.stack(state) for state in (last_h, last_c) if state]
        if not batched:
            x, states = x.squeeze(1), [state.squeeze(1) for state in states]
        return x, ((states[0], states[1]) if self.mode == "LSTM" else states[0])

    def _check_input(self, value: object) -> bool:
        """Whether the input has a batch dimension."""
        if isinstance(value, PackedSequence):
            raise InputError(
                "input", "a PackedSequence reached a recurrent layer", "pad the sequences and mask the padding instead"
            )
        if not isinstance(value, torch.Tensor) or value.dim() not in (2, 3) or value.shape[-1] != self.input_size:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(
                "input",
                f"{shape} is no sequence of {self.input_size} features",
                f"give a tensor (L, {self.input_size}) or with one batch dimension",
            )
        if value.shape[1 if value.dim() == 3 and self.batch_first else 0] == 0:
            raise InputError("input", "the sequence has no steps", "give at least one step")
        return value.dim() == 3

    def _initial(self, hx: Hidden | None, x: torch.Tensor, batched: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Initial h and c with a batch dimension; c is None unless this is an LSTM."""
        rows, batch = self.num_layers * (2 if self.bidirectional else 1), x.shape[1]
        sizes = [self.proj_size or self.hidden_size] + ([self.hidden_size] if self.mode == "LSTM" else [])
        if hx is None:
            given = [x.new_zeros(rows, batch, size) for size in sizes]
        else:
            state = list(hx) if isinstance(hx, (tuple, list)) else [hx]
            wanted = [(rows, batch, size) if batched else (rows, size) for size in sizes]
            if [tuple(value.shape) for value in state] != wanted:
                raise InputError(
                    "hx", f"shapes {[tuple(v.shape) for v in state]} do not fit", f"give {wanted} for this input"
                )
            given = state if batched else [value.unsqueeze(1) for value in state]
        return given[0], given[1] if self.mode == "LSTM" else None


def unrolled(model: nn.Module) -> tuple[str, ...]:
    """Names of the recurrent layers that are built of ``nn.Linear``, every name of one that has several."""
    found = model.named_modules(remove_duplicate=False)
    return tuple(name for name, module in found if isinstance(module, UnrolledRecurrent))


def fuse(module: nn.Module) -> nn.RNNBase:
    """The inverse of the unrolling of one layer: torch's own module with the same parameters, shared and not copied.

    Args:
        module: An unrolled layer, all of its operators ``nn.Linear``.

    Raises:
        InputError: It is no such layer.
    """
    if not isinstance(module, UnrolledRecurrent):
        raise InputError("model", f"{type(module).__name__} is no unrolled recurrent layer", "give one")
    settings: dict[str, object] = {
        name: getattr(module, name)
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    }
    made: nn.RNNBase
    if module.mode == "LSTM":
        made = nn.LSTM(**settings, proj_size=module.proj_size, device="meta")
    elif module.mode == "GRU":
        made = nn.GRU(**settings, device="meta")
    else:
        nonlinearity = "relu" if module.mode == "RNN_RELU" else "tanh"
        made = nn.RNN(**settings, nonlinearity=nonlinearity, device="meta")
    for key, direction in module.layers.items():
        for operator in ("ih", "hh", "hr"):
            linear = getattr(direction, operator)
            if linear is None:
                continue
            if not isinstance(linear, nn.Linear):
                raise InputError("model", f"{operator} of a recurrent layer is no linear layer", "make it dense first")
            if linear.bias is not None and (operator == "hr" or not module.bias):
                raise InputError("model", f"{operator} of a recurrent layer has a bias of its own", "leave it unrolled")
            # By assignment: torch's module keeps a list of its parameters beside them.
            setattr(made, f"weight_{operator}_l{key}", linear.weight)
            if module.bias and operator != "hr":
                setattr(made, f"bias_{operator}_l{key}", linear.bias)
    return made.train(module.training)


def unroll(model: nn.Module, only: Container[str] | None = None) -> dict[str, str]:
    """Replace every ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` of a private copy by an equivalent built of ``nn.Linear``.

    Subclasses that compute something else (an overridden ``forward``) are left as they are. Forward hooks of a replaced
    module do not move with it.

    Args:
        model: Changed in place; parameters are shared with the replaced modules, so optimizers keep working.
        only: Names of the layers to replace; None: all.

    Returns:
        New parameter name -> original parameter name, e.g. ``lstm.layers.0.ih.weight`` -> ``lstm.weight_ih_l0``, for every
        name in the state dict; empty when the model has no recurrent layer.

    Raises:
        InputError: ``model`` is itself a recurrent layer and cannot be replaced inside anything, or a recurrent layer
            computes its weights from other parameters.
    """
    if _is_fused(model):
        raise InputError(
            "model", f"it is a bare nn.{type(model).__name__}", "wrap it in a module, e.g. nn.ModuleDict({'rnn': rnn})"
        )
    found = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.RNNBase) and _is_fused(module) and (only is None or name in only)
    ]
    # All are built before any is installed: an error leaves the model as it was. A module used twice stays one module.
    built = {module: UnrolledRecurrent(module) for module in dict.fromkeys(module for _, module in found)}
    mapping: dict[str, str] = {}
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, built[module])
        for key in _keys(module):
            for operator in ("ih", "hh", "hr"):
                for kind in ("weight", "bias"):
                    original = f"{kind}_{operator}_l{key}"
                    if original in module._parameters:
                        mapping[f"{name}.layers.{key}.{operator}.{kind}"] = f"{name}.{original}"
    return mapping


def original_names(state_dict: Mapping[str, torch.Tensor], mapping: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Rename an unrolled model's tensors to the names the user's checkpoint had.

    Args:
        state_dict: Tensors of the unrolled model, or any part of them.
        mapping: What ``unroll`` returned.

    Returns:
        The same tensors; names that ``mapping`` does not hold are kept.

    Raises:
        InputError: Two tensors would get one name.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state_dict.items():
        original = mapping.get(name, name)
        if original in renamed:
            raise InputError(
                "state_dict", f"two tensors would be named {original}", "pass the mapping that belongs to this model"
            )
        renamed[original] = value
    return renamed


def _is_fused(module: nn.Module) -> bool:
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.LSTM, nn.GRU, nn.RNN))


def _keys(source: nn.RNNBase) -> list[str]:
    """PyTorch's layer suffixes without the leading ``l``: 0, 0_reverse, 1, ..."""
    tails = ("", "_reverse") if source.bidirectional else ("",)
    return [f"{layer}{tail}" for layer in range(source.num_layers) for tail in tails]


def _linear(source: nn.RNNBase, weight: str, bias: str | None) -> nn.Linear:
    """A linear operator that owns the named parameters of ``source`` themselves."""
    with_bias = bias is not None and source.bias
    matrix, vector = source._parameters.get(weight), source._parameters.get(bias) if bias is not None else None
    if matrix is None or (with_bias and vector is None):
        raise InputError(
            "model",
            f"{weight if matrix is None else bias} of an nn.{type(source).__name__} is not a parameter",
            "remove its parametrization (weight normalization, pruning) first",
        )
    # On the meta device nothing is allocated or drawn before the shared parameters take their places.
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=with_bias, device="meta")
    linear.weight = matrix
    if vector is not None:
        linear.bias = vector
    return linear


def _cell(
    mode: str, x: torch.Tensor, gates: torch.Tensor, h: torch.Tensor, c: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One step. Source: the equations of torch.nn.LSTM, GRU and RNN.

    Args:
        mode: ``LSTM``, ``GRU``, ``RNN_TANH`` or ``RNN_RELU``.
        x: (B, G*H) input half of the gates, ih(x_t).
        gates: (B, G*H) recurrent half, hh(h).
        h: (B, R) hidden state.
        c: (B, H) cell state of an LSTM.
    """
    if mode == "LSTM" and c is not None:
        i, f, g, o = (x + gates).chunk(4, dim=-1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if mode == "GRU":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=-1), gates.chunk(3, dim=-1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return (1 - z) * n + z * h, None
    return (torch.relu(x + gates) if mode == "RNN_RELU" else torch.tanh(x + gates)), None
