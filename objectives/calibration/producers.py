"""The other side of a fold: quantized weights whose rows are divided by the scales of a site.

A producer's row r becomes ``W_r / s``. Where every row has its own quantization step that changes nothing; where the whole weight
shares one, the rows that end up small lose bits. These are the numbers that say how much of it reaches the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphasmith.objectives.calibration.calibrate import Calibration
from alphasmith.objectives.calibration.site_data import ProducerRows, raise_peaks
from alphasmith.objectives.calibration.weight_matrix import as_matrix
from alphasmith.objectives.sites.types import Operator, ParameterEdit, Site
from alphasmith.objectives.text import matches

#: Rows of the producer's input that its output's energy is taken from.
_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """An operator and the name of the site whose tensor it reads."""

    operator: Operator
    site: str


class Producers:
    """Producers of the sites of one model.

    Args:
        sites: All sites of the model.
        tensors: Pristine parameters and buffers by full name.
        calibration: Rows of the sites.
        skip: ``fnmatch`` patterns of operator names that are left in float.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        tensors: Mapping[str, Tensor],
        calibration: Calibration,
        skip: Sequence[str] = (),
    ) -> None:
        self._tensors = tensors
        self._calibration = calibration
        self._readers = {
            operator.weight: _Reader(operator=operator, site=site.name)
            for site in sites
            for operator in site.operators
            if not operator.raw and not matches(operator.name, skip)
        }

    def peaks(self, site: Site) -> Tensor | None:
        """(C,) float32 p_j, the abs-max of the rows that each channel's scale divides; None where no quantized weight is."""
        edits = self._edits(site)
        if not edits:
            return None
        peaks = torch.zeros(site.channels)
        for weight, channel in map(self._matrix, edits):
            raise_peaks(peaks, weight.abs().amax(dim=1), channel)
        return peaks

    def rows(self, site: Site) -> tuple[ProducerRows, ...]:
        """What is known of every quantized weight that folding the site divides, in the order of its edits."""
        return tuple(self._rows(site, edit) for edit in self._edits(site))

    def _edits(self, site: Site) -> list[ParameterEdit]:
        if site.mode != "fold":
            return []
        return [edit for edit in site.edits if edit.power < 0 and edit.parameter in self._readers]

    def _matrix(self, edit: ParameterEdit) -> tuple[Tensor, Tensor]:
        """Weight (R, D) float32 on the CPU and the site channel (R,) of every row, -1 where it is not divided."""
        operator = self._readers[edit.parameter].operator
        layout = (operator.kind, operator.transposed, operator.groups)
        weight, channel = self._tensors[edit.parameter].detach(), edit.channel.cpu()
        # A row has one channel, so what is broadcast over its columns is not spread out; weights are large.
        narrow = channel.dim() == weight.dim() and channel.shape[0] % operator.groups == 0
        channel = as_matrix(channel if narrow else channel.expand(weight.shape), *layout).amax(dim=1)
        weight = as_matrix(weight, *layout).to("cpu", torch.float32)
        return weight, channel.expand(weight.shape[0])

    def _rows(self, site: Site, edit: ParameterEdit) -> ProducerRows:
        reader = self._readers[edit.parameter]
        weight, channel = self._matrix(edit)
        inputs, energy, output = self._measured(reader, weight)
        divided = channel >= 0
        reaching = self._calibration.record(site).rms.double().square()[channel.clamp(min=0)]
        # What the site reads of a row is at most what the row makes: a ReLU, a gate, an average let the rest go.
        share = torch.where(output > 0, reaching / output.clamp_min(torch.finfo(torch.float64).tiny), 0.0).clamp(
            max=1.0
        )
        return ProducerRows(
            channel=channel,
            absmax=weight.abs().amax(dim=1),
            input_energy=inputs,
            energy=energy,
            passed=torch.where(divided, share, 0.0),
        )

    def _measured(self, reader: _Reader, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(R,) float64 mean squares: of all inputs of a row together, of its product with them, of that with its bias."""
        operator, nothing = reader.operator, torch.zeros(weight.shape[0], dtype=torch.float64)
        record = self._calibration.sites.get(reader.site)
        parts = () if record is None else record.parts
        x = next((part.x for part in parts if operator.name in part.operators), None)
        if x is None or weight.shape[0] % operator.groups or x.shape[1] != weight.shape[1] * operator.groups:
            return nothing, nothing, nothing
        x = x[torch.arange(min(_ROWS, x.shape[0])) * x.shape[0] // min(_ROWS, x.shape[0])]
        blocks = x.reshape(x.shape[0], operator.groups, -1).transpose(0, 1)
        rows = weight.reshape(operator.groups, -1, weight.shape[1])
        inputs = torch.matmul(blocks.square().mean(dim=1).unsqueeze(1), (rows != 0).to(torch.float32).mT)
        product = torch.bmm(blocks, rows.mT)
        bias = None if operator.bias is None else self._tensors.get(operator.bias)
        whole = product if bias is None else product + bias.detach().to(product).reshape(operator.groups, 1, -1)
        inputs, energy, output = inputs.flatten(), product.square().mean(dim=1), whole.square().mean(dim=1)
        return inputs.double(), energy.flatten().double(), output.flatten().double()
