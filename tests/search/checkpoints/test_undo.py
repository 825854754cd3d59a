"""What undo takes out of a smoothed checkpoint is what folding put in."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.folding import fold
from alphasmith.objectives.smoothing import Smoothing
from alphasmith.search.checkpoints.verification import unfold
from alphasmith.search.launch._manifest_builder import scale_tensors
from alphasmith.storage.output.entries import EditEntry, ShiftEditEntry, SiteEntry


class Chain(nn.Module):
    """A norm and linear layers: biases that are one site's consumers and the next one's producers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 7)
        self.head = nn.Linear(7, 4, bias=False)  # its input keeps its shift in the quantizer

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.second(self.first(self.norm(x)))))


def test_undo_takes_scales_and_folded_shifts_out_again() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Chain().eval().requires_grad_(False)
    sites = discover(model, Batch(args=(torch.randn(2, 3, 6),))).sites
    generator = torch.Generator().manual_seed(1)
    smoothings = {
        site.name: Smoothing(
            scales=torch.exp(torch.randn(site.channels, generator=generator)),
            shift=torch.randn(site.channels, generator=generator),
        )
        for site in sites
    }
    folded = copy.deepcopy(model)
    for site in sites:
        fold(folded, site, smoothings[site.name])
    entries = [
        SiteEntry(
            name=site.name,
            position=position,
            mode=site.mode,
            channels=site.channels,
            operators=tuple(operator.name for operator in site.operators),
            shift=True,
            edits=tuple(
                EditEntry(
                    parameter=edit.parameter,
                    power=1 if edit.power > 0 else -1,
                    offset=edit.offset,
                    channel=f"channel/{site.name}/{i}",
                )
                for i, edit in enumerate(site.edits)
            ),
            shift_edits=tuple(
                ShiftEditEntry(
                    parameter=edit.parameter,
                    channel=f"shift_channel/{site.name}/{i}",
                    weight=edit.weight,
                    transposed=edit.transposed,
                )
                for i, edit in enumerate(site.shift_edits)
            ),
        )
        for position, site in enumerate(sites)
    ]
    assert [bool(entry.shift_edits) for entry in entries] == [True, True, False]
    tensors = dict(folded.state_dict())
    touched = unfold(tensors, entries, scale_tensors(sites, smoothings))
    original = model.state_dict()
    assert touched == set(original)
    assert not torch.allclose(folded.get_parameter("first.bias"), original["first.bias"], atol=1e-2)
    for name, value in original.items():
        torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=2e-6)
