"""Small modules in which a wrong fold is tempting, and how each of their sites may be smoothed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alphasmith.objectives.media.batch import Batch

WIDTH = 8
ROWS = 50


@dataclass(frozen=True, kw_only=True)
class Trap:
    """A model and the mode of each of its sites.

    Attributes:
        name: Test id.
        make: The model.
        modes: Site name -> mode, for the sites that matter.
        input: ``vectors`` (B, L, 8), ``images`` (B, 3, 6, 6) or ``ids`` (B, L).
    """

    name: str
    make: Callable[[], nn.Module]
    modes: Mapping[str, str]
    input: str = "vectors"

    def batch(self, generator: torch.Generator, samples: int, length: int) -> Batch:
        """Fresh input; images have one size."""
        if self.input == "ids":
            return Batch(args=(torch.randint(0, ROWS, (samples, length), generator=generator),))
        shape = (samples, length, WIDTH) if self.input == "vectors" else (samples, 3, 6, 6)
        return Batch(args=(torch.randn(shape, generator=generator, dtype=torch.float64),))


class Net(nn.Module):
    """A forward function over named parts.

    Args:
        function: ``function(parts, x)``, where ``parts`` has the modules and parameters as attributes.
        parts: Modules and parameters.
    """

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self._function(self, x)


def linear(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH)


def table() -> nn.Parameter:
    return nn.Parameter(torch.empty(ROWS, WIDTH))


def gain() -> nn.Parameter:
    return nn.Parameter(torch.empty(WIDTH).fill_(1.0))


class Bent(nn.Linear):
    """A subclass that reads something else than its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Linear of tanh."""
        return super().forward(torch.tanh(input))


class Padded(nn.Conv2d):
    """A subclass that only moves its input before reading it."""

    def forward(self, input: Tensor) -> Tensor:
        """Zero-pad on two sides."""
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def _tied_head(m: Any, x: Tensor) -> Any:
    return F.linear(torch.tanh(m.fc(m.e(x))), m.e.weight)


def _picked_channels(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h[..., m.r(x).sum((0, 1)).topk(4).indices])


def _written(m: Any, x: Tensor) -> Any:
    h = m.n(x)
    y = m.a(h)
    h += 1
    return y + m.b(h)


def _written_view(m: Any, x: Tensor) -> Any:
    h = m.n(x)
    h.view(-1, WIDTH).mul_(2)
    return m.a(h)


def _through_numpy(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h) + torch.from_numpy(h.numpy().sum(-1, keepdims=True))


def _through_data(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h) + h.data.sum(-1, keepdim=True)


def _through_list(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h) * max(h[0, 0].tolist())


def _through_item(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h) * h.sum().item()


def _rows(m: Any, x: Tensor) -> Any:
    h = m.n(x)
    return m.a(h)[x[..., 0] > 0].sum(0) + m.b(h[x[..., 0] > 0]).sum(0)


def _squeezed(m: Any, x: Tensor) -> Any:
    h = torch.relu(m.a(x))
    gate = torch.sigmoid(m.up(torch.relu(m.down(F.adaptive_avg_pool2d(h, 1)))))
    return m.b(h * gate)


def _rotated(m: Any, x: Tensor) -> Any:
    h = m.a(x)
    return m.b(h + 0.5 * torch.cat([-h[..., 4:], h[..., :4]], -1))


def _kernel_attention(m: Any, x: Tensor) -> Any:
    q, k = torch.relu(m.q(x)) + 0.1, torch.relu(m.k(x)) + 0.1
    return m.o((q @ (k.transpose(1, 2) @ m.v(x))) / (q @ k.sum(1)[..., None]))


def _trap(
    name: str,
    function: Callable[..., Tensor],
    modes: Mapping[str, str],
    input: str = "vectors",
    **parts: Callable[[], Any],
) -> Trap:
    return Trap(
        name=name, make=lambda: Net(function, **{k: part() for k, part in parts.items()}), modes=modes, input=input
    )


def _conv(inputs: int, outputs: int, kernel: int = 1) -> Callable[[], nn.Conv2d]:
    return lambda: nn.Conv2d(inputs, outputs, kernel)


TRAPS: tuple[Trap, ...] = (
    # Rows of a parameter that the traced batch did not pick must be scaled too.
    _trap("table", lambda m, x: m.fc(m.t[x]), {"fc": "fold"}, "ids", t=table, fc=linear),
    _trap(
        "table-select", lambda m, x: m.fc(m.t.index_select(0, x.flatten())), {"fc": "fold"}, "ids", t=table, fc=linear
    ),
    _trap("table-embedding", lambda m, x: m.fc(F.embedding(x, m.t)), {"fc": "fold"}, "ids", t=table, fc=linear),
    _trap(
        "positions",
        lambda m, x: m.fc(m.e(x) + m.t[: x.shape[1]]),
        {"fc": "fold"},
        "ids",
        e=lambda: nn.Embedding(ROWS, WIDTH),
        t=table,
        fc=linear,
    ),
    _trap(
        "tied-head", _tied_head, {"fc": "explicit", "e": "left"}, "ids", e=lambda: nn.Embedding(ROWS, WIDTH), fc=linear
    ),
    # Which channels are read depends on the data.
    _trap(
        "picked-channels",
        _picked_channels,
        {"a": "explicit", "b": "explicit"},
        a=linear,
        r=linear,
        b=lambda: linear(4),
    ),
    _trap("masked-rows", _rows, {"a": "fold"}, n=norm, a=linear, b=linear),
    # Writes and reads that the graph of operations does not show.
    _trap("written", _written, {"a": "explicit", "b": "explicit"}, n=norm, a=linear, b=linear),
    _trap("written-view", _written_view, {"a": "explicit"}, n=norm, a=linear),
    _trap("numpy", _through_numpy, {"a": "explicit", "b": "explicit"}, a=linear, b=linear),
    _trap("data", _through_data, {"a": "explicit", "b": "explicit"}, a=linear, b=linear),
    _trap("tolist", _through_list, {"a": "explicit", "b": "explicit"}, a=linear, b=linear),
    _trap("item", _through_item, {"a": "explicit", "b": "explicit"}, a=linear, b=linear),
    # One parameter in two roles.
    _trap(
        "norm-twice", lambda m, x: m.b(m.n(m.a(m.n(x)))), {"a": "explicit", "b": "explicit"}, n=norm, a=linear, b=linear
    ),
    _trap(
        "tied-transposed",
        lambda m, x: F.linear(torch.relu(m.a(m.n(x))), m.a.weight.t()),
        {"a": "left"},
        n=norm,
        a=linear,
    ),
    # Linear modules that do more than a linear.
    _trap("bent", lambda m, x: m.b(torch.relu(m.a(m.n(x)))), {"b": "left"}, n=norm, a=linear, b=lambda: Bent(WIDTH, 3)),
    _trap(
        "padded",
        lambda m, x: m.b(F.gelu(m.a(x))),
        {"a": "explicit", "b": "explicit"},
        "images",
        a=_conv(3, 4),
        b=lambda: Padded(4, 2, 3),
    ),
    # Activations.
    _trap("square", lambda m, x: m.b(torch.relu(m.a(x)) ** 2), {"b": "explicit"}, a=linear, b=linear),
    _trap("relu6", lambda m, x: m.b(F.relu6(m.a(x))), {"b": "explicit"}, a=linear, b=linear),
    _trap(
        "threshold", lambda m, x: m.b(torch.where((h := m.a(x)) > 0.2, h, 0 * h)), {"b": "explicit"}, a=linear, b=linear
    ),
    _trap("product", lambda m, x: m.c(m.a(x) * m.b(x)), {"c": "fold"}, a=linear, b=linear, c=linear),
    _trap("layer-scale", lambda m, x: m.b(F.gelu(m.a(x)) * m.g), {"b": "fold"}, a=linear, b=linear, g=gain),
    _trap(
        "minus-mean", lambda m, x: m.b((h := m.a(x)) - h.mean(-1, keepdim=True)), {"b": "explicit"}, a=linear, b=linear
    ),
    _trap(
        "gate",
        _squeezed,
        {"down": "explicit", "up": "fold", "b": "explicit"},
        "images",
        a=_conv(3, 8),
        down=_conv(8, 4),
        up=_conv(4, 8),
        b=_conv(8, 2),
    ),
    _trap("rotated", _rotated, {"b": "fold"}, a=linear, b=linear),
    _trap("kernel-attention", _kernel_attention, {"o": "fold"}, q=linear, k=linear, v=linear, o=linear),
    # Layouts.
    _trap(
        "flipped-reader",
        lambda m, x: m.a(h := m.n(x)) + m.b(h.flip(-1)),
        {"a": "explicit", "b": "explicit"},
        n=norm,
        a=linear,
        b=linear,
    ),
    _trap(
        "flattened",
        lambda m, x: m.b(torch.relu(m.a(x)).flatten(1)),
        {"b": "fold"},
        "images",
        a=_conv(3, 2, 3),
        b=lambda: linear(32),
    ),
    _trap(
        "padded-with-ones",
        lambda m, x: m.b(F.pad(m.a(x), (1, 1), value=1.0)),
        {"b": "explicit"},
        "images",
        a=_conv(3, 2),
        b=_conv(2, 2),
    ),
    _trap(
        "mixed-tokens", lambda m, x: m.t(m.n(x[:, :4]).transpose(1, 2)), {"t": "explicit"}, n=norm, t=lambda: linear(4)
    ),
    _trap(
        "transposed-convolution",
        lambda m, x: m.b(torch.relu(m.t(torch.relu(m.a(x))))),
        {"b": "fold"},
        "images",
        a=_conv(3, 8),
        t=lambda: nn.ConvTranspose2d(8, 6, 2),
        b=_conv(6, 2),
    ),
)
