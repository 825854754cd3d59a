"""A model as a graph in which every quantized operator is marked: what it rounds, and what stands for its weight.

``torch.onnx`` traces the model; in the place of a quantized operator its float module runs, on an input and a weight that come out
of two nodes of a domain of our own. Whatever the module does around its product (padding, reshaping) is traced with it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import floordiv
from types import TracebackType
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import opset20
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch, floating_outputs, unfused_attention
from alphasmith.objectives.model.modules import replace_module
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.stack import QuantizedStack
from alphasmith.objectives.text import error_line
from alphasmith.search.exports.onnx._guards import unguarded, unrolled_axes

#: Of the nodes that mark an operator.
DOMAIN = "alphasmith"
#: Version of standard ONNX: the newest that ONNX Runtime loads in every layout (with 21 it mistypes signed activations).
OPSET = 20
#: What of ``torch.onnx``'s own rules a traced model has use for. Left out is ``slice_split_rule``, which looks for pairs: every node is compared with
#: all others, which takes minutes where a loop over time has become thousands of them.
_RULES = (
    *(rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule),
    *(rules.cast_cast_rule, rules.no_op_cast_rule, rules.cast_constant_of_shape_rule),
    *(rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.no_op_expand_rule, rules.flatten_to_reshape_rule),
    *(rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule, rules.materialize_reshape_shape_rule),
    *(rules.one_reshape_matmul_reshape_rule, rules.two_reshapes_matmul_reshape_rule),
    *(rules.no_op_transpose_rule, rules.transpose_transpose_rule, rules.unsqueeze_unsqueeze_rule),
    *(rules.min_min_rule, rules.max_max_rule, rules.min_max_rule, rules.max_min_rule),
    *(rules.successive_relu_rule, rules.successive_clip_rule, rules.successive_clip_relu_rule),
    rules.successive_relu_clip_rule,
    *(rules.no_op_dynamic_scatter_nd_rule, rules.no_op_static_scatter_nd_rule),
    *(rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule),
    *(rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_conv_transpose_rule),
    rules.fuse_batchnorm_into_gemm_rule,
    *(rules.remove_optional_bias_from_conv_rule, rules.remove_optional_bias_from_conv_transpose_rule),
    rules.remove_optional_bias_from_gemm_rule,
)
#: Name of the model inside the module that is traced.
_INSIDE = "model"


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A graph with marked operators.

    Attributes:
        model: The graph, without anything of the machine it was traced on.
        dynamic: Input -> its axes of any size, by name.
    """

    model: ir.Model
    dynamic: Mapping[str, tuple[str, ...]]


def mark_operators(model: nn.Module) -> None:
    """Let every quantized operator be seen in a trace.

    Args:
        model: A quantized one, in float32; changed in place: weights are taken out of it, stacks become plain again.

    Raises:
        InputError: An operator computes in float64.
    """
    model.float()
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedOperator):
            if module.dtype != torch.float32:
                raise InputError("--format", f"{name} computes in {module.dtype}, onnx holds float32", "run in float32")
            replace_module(model, module, _Marked(module, name))
        elif isinstance(module, QuantizedStack):
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            dense = module.dense()
            delattr(owner, leaf)
            owner.register_parameter(leaf, nn.Parameter(dense, requires_grad=False))


def trace(model: nn.Module, batch: Batch, *, wrapped: bool = False) -> Traced:
    """Trace a marked model; the first axis of every input, and all others that the model lets, may have any size.

    Args:
        model: See :func:`mark_operators`.
        batch: An example of two samples or more, whose axes differ in size.
        wrapped: Whether the model is the ``model`` of this module, whose name then is no part of names.

    Raises:
        InputError: Field ``--format``: something cannot be traced; the module is named.
    """
    given = _inputs(model, batch)
    flat = _Flat(model, batch, tuple(given))
    with unfused_attention(), torch.no_grad(), _quiet():
        named = flat.output_names(tuple(given.values()))
        program = _exported(flat, tuple(given.values()), model.get_submodule(_INSIDE) if wrapped else model)
        made = _translated(program, tuple(given), tuple(named), wrapped=wrapped)
    return Traced(model=made, dynamic=_named_axes(made))


class _Marked(nn.Module):
    """A quantized operator in a trace.

    Args:
        operator: Its weight is taken away.
        name: Of its module.
    """

    inverse: Tensor | None

    def __init__(self, operator: QuantizedOperator, name: str) -> None:
        super().__init__()
        self._told: dict[str, Any] = {
            "operator": name,
            "transposed": int(operator.transposed),
            "groups": int(getattr(operator.inner, "groups", 1)),
        }
        self._shape = tuple(operator._shape)
        bias = operator.corrected(operator.correction)
        smooth = operator.smooth
        inverse = None if smooth is None else (1 / smooth.double()).float()
        self.register_buffer("inverse", None if inverse is None else operator.channelwise(inverse))
        for leaf in ("weight_values", "weight_scale", "input_scale", "input_zero", "smooth", "correction"):
            setattr(operator, leaf, None)  # registered buffers that a trace need not carry
        if bias is not None:
            operator.inner.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.operator = operator

    @property
    def weight(self) -> Tensor:
        """What models ask for its type and shape; it holds nothing."""
        return torch.empty(self._shape, device="meta")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the operator."""
        operator = self.operator
        weight = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Weight", (), self._told, dtype=torch.float32, shape=self._shape, version=1
        )
        return operator.simulated(
            args, kwargs, weight=weight, bias=operator.corrected(None), quantize=self._rounded
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        """Attributes of the operator that models read from their children."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "operator":
                raise
            return getattr(super().__getattr__("operator"), name)

    def _rounded(self, x: Tensor) -> Tensor:
        shift = self.operator.channelwise(self.operator.shift)
        x = x if shift is None else x - shift
        x = x if self.inverse is None else x * self.inverse
        return torch.onnx.ops.symbolic(f"{DOMAIN}::Input", (x,), self._told, dtype=x.dtype, shape=x.shape, version=1)


class _Flat(nn.Module):
    """A model that takes tensors and returns the floating ones of its output."""

    def __init__(self, model: nn.Module, batch: Batch, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._batch = batch
        self._names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for _, value in self._outputs(tensors))

    def output_names(self, tensors: Sequence[Tensor]) -> list[str]:
        names = [name.replace("[", ".").replace("]", "") for name, _ in self._outputs(tensors)]
        return [f"{name}.output" if name in self._names else name for name in names]

    def _outputs(self, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        left = iter(tensors)
        args = [next(left) if isinstance(value, Tensor) else value for value in self._batch.args]
        kwargs = {k: next(left) if isinstance(v, Tensor) else v for k, v in self._batch.kwargs.items()}
        yield from floating_outputs(self.model(*args, **kwargs))


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch under the names that the forward gives them."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p.name for p in parameters if p.kind <= inspect.Parameter.POSITIONAL_OR_KEYWORD]
    found: dict[str, Tensor] = {}
    for place, value in enumerate(batch.args):
        if isinstance(value, Tensor):
            found[plain[place] if place < len(plain) else f"input_{place}"] = value
    return found | {name: value for name, value in batch.kwargs.items() if isinstance(value, Tensor)}


def _exported(flat: _Flat, tensors: tuple[Tensor, ...], model: nn.Module) -> torch.export.ExportedProgram:
    """The traced program with as many axes of any size as the model lets; the first always is one."""
    free = torch.export.Dim.AUTO
    wishes = [[dict.fromkeys(range(t.dim()), free) for t in tensors], [{0: free} for _ in tensors]]
    failed: Exception | None = None
    for wish in wishes:
        try:
            program = torch.export.export(flat, tensors, dynamic_shapes=(tuple(wish),), strict=False)
            if unrolled := unrolled_axes(program, tensors):
                wish = [
                    {axis: free for axis in axes if (place, axis) not in unrolled} for place, axes in enumerate(wish)
                ]
                program = torch.export.export(flat, tensors, dynamic_shapes=(tuple(wish),), strict=False)
        except Exception as error:  # noqa: BLE001  torch raises whatever the model's own code raises on symbolic sizes
            failed = failed or error
        else:
            return unguarded(program)
    where = _module_of(failed, model)
    raise InputError(
        "--format",
        f"the exporter cannot trace {where} ({error_line(failed)})",  # type: ignore[arg-type]
        "export to compressed-tensors, or take the operation out of the model",
    ) from failed


def _translated(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], *, wrapped: bool
) -> ir.Model:
    try:
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            optimize=False,
            input_names=list(inputs),
            output_names=list(outputs),
            custom_translation_table={floordiv: _floor_division},
        )
    except torch.onnx.errors.OnnxExporterError as error:
        told = "".join(map(str, _chain(error)))
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        found = next((node for node in nodes if (node.format_node() or "\0") in told), None)
        where = "the model" if found is None else f"{_path(found)} ({found.target})"
        raise InputError(
            "--format",
            f"the exporter cannot write {where} in ONNX",
            "export to compressed-tensors, or take the operation out of the model",
        ) from error
    if made is None:
        raise InputError("--format", "the exporter returned nothing", "report it")
    model = _simplified(made.model)
    for value in list(model.graph.initializers.values()):
        value.name = _plain_name(str(value.name), wrapped=wrapped)
    return model


def _simplified(model: ir.Model) -> ir.Model:
    """The graph with its constants computed and without what changes nothing, as ``torch.onnx`` leaves it."""
    passes.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(model, onnx_shape_inference=True)
        model = rewrite(model, _RULES)
    for step in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        model = step(model).model
    return model


def _floor_division(a: Any, b: Any) -> Any:
    """``a // b`` of sizes: torch writes ONNX's Div, which rounds towards 0, and so pads an odd size wrongly where it says ``-(-n // 2)``."""
    return opset20.Div(opset20.Sub(a, opset20.Mod(a, b)), b)


def _named_axes(model: ir.Model) -> dict[str, tuple[str, ...]]:
    """Give axes of any size names that say whose they are; what is between inputs and outputs loses its shapes."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for place, size in enumerate(_sizes(value)):
            if isinstance(size, str):
                name = _axis(str(value.name), place, len(_sizes(value)))
                # All inputs have the samples of one batch, and all layers the same past; other axes are named once.
                shared = name in ("batch", "past", "encoded") or name not in names.values()
                names.setdefault(size, name if shared else f"{value.name}_{place}")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([size if isinstance(size, int) else names.get(str(size)) for size in _sizes(value)])
    kept = {id(value) for value in model.graph.outputs}
    for output in (output for node in model.graph.all_nodes() for output in node.outputs):
        if id(output) not in kept and output.shape is not None:
            output.shape = ir.Shape([size if isinstance(size, int) else None for size in _sizes(output)])
    return {str(value.name): tuple(s for s in _sizes(value) if isinstance(s, str)) for value in model.graph.inputs}


def _axis(name: str, place: int, rank: int) -> str:
    """What an axis of an input is called."""
    if place == 0:
        return "batch"
    if name.startswith("past_cross_"):
        return "encoded"
    if name.startswith("past_"):
        return "past"
    return "length" if rank == 2 else f"{name}_{place}"


def _sizes(value: ir.Value) -> list[int | str | None]:
    """Of the axes: a number, a name, or None where nothing is known; the exporter writes some numbers as names."""
    found = [size if isinstance(size, int) else size.value for size in value.shape or ()]
    return [int(size) if isinstance(size, str) and size.isdigit() else size for size in found]


def _plain_name(name: str, *, wrapped: bool) -> str:
    name = name.removeprefix(f"{_INSIDE}.")
    name = name.removeprefix(f"{_INSIDE}.") if wrapped else name
    return name.replace(".operator.inner.", ".").replace(".operator.", ".")


def _module_of(error: BaseException | None, model: nn.Module) -> str:
    """Path of the innermost module whose forward an error came out of."""
    paths = {id(module): name for name, module in model.named_modules() if name}
    found = ""
    for one in _chain(error):
        for frame in _frames(one.__traceback__):
            found = paths.get(id(frame.get("self")), found)
    return found.removesuffix(".operator.inner").removesuffix(".operator") or "the model"


def _frames(traceback: TracebackType | None) -> Iterator[Mapping[str, Any]]:
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _path(node: torch.fx.Node) -> str:
    """Path of the module that a node of a program was traced in."""
    places = list(node.meta.get("nn_module_stack", {}).values())
    path = str(places[-1][0]).removeprefix(f"{_INSIDE}.") if places else ""
    return path.removesuffix(".operator.inner").removesuffix(".operator") or "the model"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch says to its developers from users."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
