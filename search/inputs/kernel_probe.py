"""What libraries make of 8-bit products on this machine: exact integers, or pairs added in 16 bits with saturation (formula fA20)."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from alphasmith.objectives.literals import Kernel, Target
from alphasmith.objectives.quantization.saturating_pairs import SaturatingPairs
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.quantization.site_schemes import SiteSchemes
from alphasmith.objectives.text import error_line

#: Libraries that multiply u8 by s8.
Library = Literal["onnxruntime", "onednn", "openvino"]
LIBRARIES: tuple[Library, ...] = get_args(Library)

#: What a target multiplies with on a CPU; TensorRT has GPUs.
_OF_TARGET: Mapping[Target, Library] = {"onnxruntime": "onnxruntime", "openvino": "openvino", "vllm": "onednn"}
_ROWS, _CHANNELS, _OUTPUTS = 4, 64, 16


@dataclass(frozen=True, kw_only=True)
class ProbedKernel:
    """What one library computes here.

    Attributes:
        library: Which.
        version: Of the package; None: it is not installed.
        kernel: What its products of u8 and s8 are; None: it could not be asked, or computes something else.
        told: One line for people.
    """

    library: Library
    version: str | None
    kernel: Kernel | None
    told: str


def probe(library: Library) -> ProbedKernel:
    """Multiply the largest codes, and others, and compare with both kernels.

    Args:
        library: Which.
    """
    package = "torch" if library == "onednn" else library
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return ProbedKernel(library=library, version=None, kernel=None, told=f"{package} is not installed")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (_ROWS, _CHANNELS), generator=generator)
    weight = torch.randint(-128, 128, (_OUTPUTS, _CHANNELS), generator=generator)
    codes[0], weight[0] = 255, 127  # signed codes of 127, and 127: the most that a pair can lose
    try:
        found = product(library, codes.to(torch.uint8), weight.to(torch.int8))
    except Exception as error:  # noqa: BLE001  whatever a library of another version raises: the answer is that it was not asked
        return ProbedKernel(library=library, version=version, kernel=None, told=f"cannot be asked: {error_line(error)}")
    exact = codes @ weight.t()
    kernel: Kernel | None = None
    told = "computes neither the integer product nor saturating pairs"
    if torch.equal(found, exact):
        kernel, told = "exact", "the integer product"
    elif torch.equal(found, exact + SaturatingPairs(weight).lost(codes)):
        part = float(found[0, 0] - 128 * weight[0].sum()) / float(exact[0, 0] - 128 * weight[0].sum())
        kernel, told = (
            "u8s8-pairs16",
            f"pairs added in 16 bits with saturation: {part:.2%} of the product where all codes are 127",
        )
    return ProbedKernel(library=library, version=version, kernel=kernel, told=told)


def product(library: Library, codes: Tensor, weight: Tensor) -> Tensor:
    """The product of codes and weight as a library computes it on this machine, before scales and zero points.

    Args:
        library: Which, installed.
        codes: (T, C) uint8.
        weight: (O, C) int8.

    Returns:
        (T, O) int64.

    Raises:
        ImportError: The library, or what its models are built with, is not installed.
    """
    return _PRODUCTS[library](codes, weight).to(torch.int64)


@cache
def serving_kernel(target: Target) -> Kernel | None:
    """What a target computes on a machine like this one: probed where its library is installed, else by the processor's flags.

    Args:
        target: What will serve the model.

    Returns:
        None: not known, as for ``any``, GPUs and processors other than x86.
    """
    library = _OF_TARGET.get(target)
    if library is None or torch.cuda.is_available():
        return None
    return probe(library).kernel or _of_processor()


def kernel_notes(schemes: SiteSchemes, target: Target) -> tuple[str, ...]:
    """A warning where products are simulated as the target does not compute them on a machine like this one; else nothing.

    Args:
        schemes: Of the run.
        target: What will serve the model.
    """
    return kernel_warning(schemes.used, target, serving_kernel(target))


def kernel_warning(schemes: tuple[Scheme, ...], target: Target, served: Kernel | None) -> tuple[str, ...]:
    """See :func:`kernel_notes`.

    Args:
        schemes: Every scheme of the run.
        target: What will serve the model.
        served: What it computes; None: not known.
    """
    if served is None:
        return ()
    wrong = [s for s in schemes if s.byte_operands and s.weights == "int8" and s.kernel != served]
    if not wrong:
        return ()
    remedy = (
        "set scheme.kernel = 'u8s8-pairs16', or use weights 'int7'"
        if served == "u8s8-pairs16"
        else "set scheme.kernel = 'exact' unless the model will run on an older processor"
    )
    told = f"warning: {target} on a processor like this one computes {served} products, the run {wrong[0].kernel} ones, so its losses are"
    return (f"{told} not those served; {remedy} (alphasmith hardware --probe)",)


def _of_processor() -> Kernel | None:
    """By the flags of the processor: x86 has exact 8-bit dot products with VNNI alone."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    return "exact" if "vnni" in flags else "u8s8-pairs16"


def _onednn(codes: Tensor, weight: Tensor) -> Tensor:
    outputs = weight.shape[0]
    packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
    ones, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    scales = (1.0, 0, packed, ones, zeros, None, 1.0, 0)
    made: Tensor = torch.ops.onednn.qlinear_pointwise(codes, *scales, torch.float32, "none", [], "")
    return made


def _onnxruntime(codes: Tensor, weight: Tensor) -> Tensor:
    onnx, runtime = import_module("onnx"), import_module("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    values = onnx.numpy_helper.from_array(weight.t().contiguous().numpy(), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kinds.UINT8, list(codes.shape))],
        [helper.make_tensor_value_info("y", kinds.INT32, [codes.shape[0], weight.shape[0]])],
        [values],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": codes.numpy()})[0])


def _openvino(codes: Tensor, weight: Tensor) -> Tensor:
    openvino = import_module("openvino")
    ops: Any = import_module("openvino.opset13")
    x = ops.parameter(list(codes.shape), np.float32)
    ends = [ops.constant(np.float32(value)) for value in (0.0, 255.0)]
    rounded = ops.fake_quantize(x, *ends, *ends, 256)
    weights = ops.multiply(ops.convert(ops.constant(weight.numpy()), np.float32), ops.constant(np.float32(1)))
    model = openvino.Model([ops.matmul(rounded, weights, False, True)], [x], "product")
    compiled = openvino.Core().compile_model(model, "CPU")
    return torch.from_numpy(compiled([codes.float().numpy()])[0].copy())


_PRODUCTS: Mapping[Library, Callable[[Tensor, Tensor], Tensor]] = {
    "onnxruntime": _onnxruntime,
    "onednn": _onednn,
    "openvino": _openvino,
}
