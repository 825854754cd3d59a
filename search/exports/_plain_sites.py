"""Operators as if no alpha had been found, for formats without a tensor for a division or a shift at run time.

Their weights are those of ``smoothed/``, which hold no scale that is divided by at run time; their static range is calibrated again
on the run's own data, as the run would have done without an alpha.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from alphasmith.objectives.calibration.calibrate import calibrate
from alphasmith.objectives.calibration.weight_matrix import as_matrix
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.loading import load_model
from alphasmith.objectives.quantization.quantizers import activation_grid, quantize_weight
from alphasmith.objectives.smoothing import ChannelRange
from alphasmith.search.checkpoints.verification import original_config
from alphasmith.search.exports.source import DeployedOperator, ExportSource
from alphasmith.search.inputs.permission import check_code
from alphasmith.search.inputs.preparation import survey
from alphasmith.search.inputs.task import load_task
from alphasmith.storage.output.manifest import FILE_NAME


def plain_operators(
    source: ExportSource,
    names: Collection[str],
    *,
    data: Path | None = None,
    allow_code: Collection[str | Path] = (),
) -> Mapping[str, DeployedOperator]:
    """These operators without a division or shift at run time.

    Args:
        source: The result of a run.
        names: Of the operators.
        data: Where the run's media are now; only read where activations are static.
        allow_code: Functions and folders that the manifest may lead to, as of ``resume``.

    Returns:
        Name -> operator.

    Raises:
        InputError: A trained model, whose float weights are not kept, or data that cannot be found again.
    """
    if not names:
        return {}
    if source.folder != "smoothed":
        told = "a trained model has no float weights to begin from"
        raise InputError("--unsmoothed-sites", told, f"export run {source.result.manifest.run.id}")
    chosen = [operator for operator in source.operators if operator.name in set(names)]
    ranges = _ranges(source, [o.name for o in chosen if o.scheme.static], data, allow_code)
    return {operator.name: _plain(operator, source, ranges.get(operator.name)) for operator in chosen}


def _plain(operator: DeployedOperator, source: ExportSource, span: tuple[Tensor, Tensor] | None) -> DeployedOperator:
    weight = source.float_tensors[source.weight_names[operator.name]].to(torch.float32)
    quantized = quantize_weight(as_matrix(weight, "linear", operator.transposed, 1), operator.scheme)
    scale = zero = None
    if span is not None:
        scale, zero = activation_grid(*span, operator.scheme.activations)
    return replace(
        operator,
        codes=quantized.values,
        scale=quantized.scale,
        input_scale=scale,
        input_zero=None if zero is None else zero.to(torch.uint8),
        explicit=False,
    )


def _ranges(
    source: ExportSource, names: Collection[str], data: Path | None, allow_code: Collection[str | Path]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Smallest and largest value () of the input of operators, over the run's calibration data."""
    if not names:
        return {}
    manifest, folder = source.result.manifest, source.result.path
    config = original_config(manifest, None, data, None, None)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": folder / "smoothed"})})
    check_code(config, allow_code, str(folder / FILE_NAME), ("model", "metric"))
    # The smoothed model stands for the original: it computes the same, and is here. So nothing that built the original runs.
    with source.result.only_named("smoothed") as checked:
        task = load_task(config, loaded=load_model(path=checked))
        found = survey(config, task)
        sites = [site for site in found.sites if {o.name for o in site.operators} & set(names)]
        calibration = calibrate(found.model, sites, task.calibration, rows=1, seed=0)
    found_ranges = {site.name: calibration.input_range(site) for site in sites}
    spans = {o.name: _span(found_ranges[site.name]) for site in sites for o in site.operators}
    lost = sorted(set(names) - spans.keys())
    if lost:
        raise InputError(
            "--unsmoothed-sites", f"{lost[0]} is not found again in smoothed/", "run with sites.explicit=never"
        )
    return spans


def _span(found: ChannelRange) -> tuple[Tensor, Tensor]:
    return found.low.min(), found.high.max()
