"""The ONNX files of an export."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    TopologicalSortPass,
)
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import OnnxLayout
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.text import listed
from alphasmith.search.checkpoints.load import load_quantized
from alphasmith.search.checkpoints.verification import original_config
from alphasmith.search.exports.onnx._examples import SAMPLES, example
from alphasmith.search.exports.onnx._layouts import check_scheme
from alphasmith.search.exports.onnx._parts import parts
from alphasmith.search.exports.onnx._tracing import mark_operators, trace
from alphasmith.search.exports.onnx.rewriting import rewrite
from alphasmith.search.exports.source import ExportSource
from alphasmith.search.inputs.permission import check_code
from alphasmith.search.inputs.task import load_task
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.output.output_folder import OutputFolder

#: What a model may hold in one file [bytes]; a larger one has its weights in a file beside it, which is written weight by weight:
#: one file is in memory twice while it is.
INSIDE = 64 * 2**20
#: Initializers below this stay in the model [bytes].
_SMALL = 1024


@dataclass(frozen=True, kw_only=True)
class OnnxModels:
    """What is written.

    Attributes:
        models: By the stem of the file name.
        quantized: Names of the operators whose integers they hold.
        left: Operators that the run quantized and that no graph holds, with the reason.
        notes: What the consumer computes otherwise than the run did, and what sizes may change.
    """

    models: Mapping[str, ir.Model]
    quantized: tuple[str, ...]
    left: Mapping[str, str]
    notes: tuple[str, ...]

    def write(self, folder: OutputFolder, inside: int = INSIDE) -> None:
        """Write every model, its weights beside it where they are many.

        Args:
            folder: Of the export.
            inside: Most bytes of weights that are put into the model itself.
        """
        for stem, model in self.models.items():
            size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
            beside = f"{stem}.onnx.data" if size > inside else None
            target = folder.path / f"{stem}.onnx"
            ir.save(model, target, external_data=beside, size_threshold_bytes=_SMALL)
            folder.adopt(target.name)
            if beside is not None:
                folder.adopt(beside)


def onnx_models(
    source: ExportSource,
    layout: OnnxLayout,
    *,
    model: nn.Module | None = None,
    batch: Batch | None = None,
    data: Path | None = None,
    allow_code: Collection[str | Path] = (),
) -> OnnxModels:
    """The graphs of a result.

    Args:
        source: The result.
        layout: See :func:`~alphasmith.search.exports.export.export`.
        model: The float architecture, where a script handed the model over.
        batch: What it is traced with; None: made for models of transformers, else the first of the run's data.
        data: Where the run's media are now.
        allow_code: Functions and folders that the manifest may lead to, as of ``resume``.

    Raises:
        InputError: A scheme that the layout lacks, a part of the model that cannot be traced (named), or no example.
    """
    operators = {operator.name: operator for operator in source.operators}
    for operator in operators.values():  # before the model is built and traced, which takes long
        check_scheme(operator.scheme, layout, operator.name)
    quantized, found = _deployed(source, model, batch, data, allow_code)
    mark_operators(quantized)
    models: dict[str, ir.Model] = {}
    used: dict[str, None] = {}
    floating: dict[str, None] = {}
    float_sums: dict[str, None] = {}
    notes: list[str] = []
    for part in parts(quantized, found):
        try:
            traced = trace(part.module, part.batch, wrapped=part.wrapped)
        except InputError as error:
            if not part.optional:
                raise
            notes.append(f"no {part.stem}.onnx: {error}")
            continue
        rewritten = rewrite(traced.model, operators, layout)
        models[part.stem] = _cleaned(traced.model)
        used |= dict.fromkeys(rewritten.operators)
        floating |= dict.fromkeys(rewritten.float_products)
        float_sums |= dict.fromkeys(rewritten.float_sums)
        notes.append(f"axes of any size in {part.stem}.onnx: {listed(_free(traced.dynamic))}")
    if not used:
        raise InputError("--format", "no quantized operator is in the graph", "export to another format")
    twice = set(operators) - set(dict(quantized.named_modules()))
    left = {name: "no forward call reaches it" for name in operators if name not in used and name not in twice}
    left |= dict.fromkeys(source.stacks, "several matrices in one tensor: float values of the integers")
    if floating:
        notes.append(f"the product of {listed(list(floating))} is a float one of dequantized values")
    if float_sums:
        notes.append(
            f"ONNX Runtime computes the convolution of {listed(list(float_sums))} in float, since nothing rounds its sum; OpenVINO takes "
            "its integers, and ONNX Runtime does in layout ort-u8"
        )
    saturating = layout == "ort-u8" and any(operators[name].scheme.kernel != "exact" for name in used)
    if saturating:
        notes.append("products are exact here, the run took them as saturating")
    return OnnxModels(models=models, quantized=tuple(used), left=left, notes=(*notes, *_notes(layout)))


def float_models(
    model: nn.Module, batch: Batch | None = None, processor: Mapping[str, Any] | None = None
) -> dict[str, ir.Model]:
    """The graphs of a float model, by the stem of the file name: what those of its quantized one are measured against.

    Args:
        model: In evaluation mode.
        batch: What it is traced with, of two samples; None: made, for models of transformers.
        processor: Content of ``preprocessor_config.json``.

    Raises:
        InputError: Something cannot be traced (named), or no example can be made.
    """
    example_of = batch or example(model, processor or {})
    wanted = [part for part in parts(model, example_of) if not part.optional]
    return {part.stem: _cleaned(trace(part.module, part.batch, wrapped=part.wrapped).model) for part in wanted}


def _deployed(
    source: ExportSource,
    model: nn.Module | None,
    batch: Batch | None,
    data: Path | None,
    allow_code: Collection[str | Path],
) -> tuple[nn.Module, Batch]:
    """The quantized model, and an example of what it reads."""
    result, folder = source.result, source.result.path
    if result.has("quantized/config.json"):
        deployed = load_quantized(folder)
        return deployed, batch or example(deployed, _processor(source))
    if model is not None and batch is not None:
        return load_quantized(folder, model), _two(batch)
    if result.manifest.model.kind == "module":
        raise InputError(
            "--format",
            f"{folder} does not say how to build the model",
            "export from Python: export(..., model=..., batch=...)",
        )
    config = original_config(result.manifest, None, data, None, None)
    check_code(config, allow_code, str(folder / FILE_NAME), ("metric",))
    task = load_task(config)
    return load_quantized(folder, model or task.loaded.model), _two(batch or next(iter(task.calibration)))


def _processor(source: ExportSource) -> Mapping[str, Any]:
    name = f"{source.folder}/preprocessor_config.json"
    return source.result.read_json(name) if source.result.has(name) else {}


def _two(batch: Batch) -> Batch:
    if batch.size < SAMPLES:
        raise InputError("--format", "the example has one sample", f"give a batch of {SAMPLES} or more")
    return batch.narrow(0, SAMPLES)


def _free(dynamic: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Inputs with their axes of any size; of the keys and values of layers the first stands for all."""
    shown = {name: axes for name, axes in dynamic.items() if axes and not re.match(r"past_(cross_)?[0-9]+_", name)}
    past = {axes: name for name, axes in reversed(list(dynamic.items())) if name.startswith("past_") and axes}
    shown |= {f"{name} and its like": axes for axes, name in past.items()}
    return [f"{name} ({', '.join(axes)})" for name, axes in shown.items()]


def _cleaned(model: ir.Model) -> ir.Model:
    """Without what the exporter says of the machine and the code, and without what nothing reads."""
    model = RemoveUnusedNodesPass()(model).model
    model = RemoveUnusedOpsetsPass()(model).model
    model = TopologicalSortPass()(model).model
    model.producer_name, model.producer_version = "alphasmith", None
    model.graph.name = "model"
    return ClearMetadataAndDocStringPass()(model).model


def _notes(layout: OnnxLayout) -> Iterator[str]:
    if layout == "qdq":
        yield (
            "saturation: on x86 processors without VNNI, kernels for unsigned times signed codes of ONNX Runtime and OpenVINO add "
            "pairs of products in 16 bits with saturation; in ONNX Runtime the session option session.x64quantprecision = 1 keeps "
            "products exact"
        )
    elif layout == "ort-u8":
        yield "needs ONNX Runtime: products and convolutions are its own nodes, exact on every processor"
    else:
        yield (
            "needs ONNX Runtime: products and convolutions are its own nodes, fast and exact on processors with VNNI; on other x86 "
            "processors pairs of products of linear operators, and of convolutions of many channels, saturate in 16 bits, unless weights "
            "have 7 bits"
        )
