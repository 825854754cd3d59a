"""One sentence without a budget: what another format at few sites would bring."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphasmith.dashboards.verdict import advice as told
from alphasmith.objectives.judge.model_objective import ModelObjective
from alphasmith.objectives.literals import Target
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sensitivity.output_shares import OutputShares, SiteShare
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.smoothing import ChannelRange
from alphasmith.search.formats.advice import Advice, advise


class Chain(nn.Module):
    """Five linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 8) -> (B, 8)."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def advised(shares: dict[str, float], scheme: str = "w8a8-channel-static", target: Target = "any") -> Advice | None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=generator)
    x[0] *= 30  # a row that sets the static range of all others
    with torch.random.fork_rng(devices=[]):
        model = Chain().eval()
    batch = Batch(args=(x,))
    sites = discover(model, batch).sites
    widths = {site.name: 60.0 if site.name == "layers.0" else 1.0 for site in sites}
    ranges = {name: ChannelRange(torch.full((8,), -width), torch.full((8,), width)) for name, width in widths.items()}
    own = Scheme.parse(scheme)
    candidate = CandidateModel(model, sites, ranges, own)
    reserve = ModelObjective(candidate, [batch])
    known = OutputShares(
        loss="mse",
        sites={site.name: SiteShare(site_loss=0.1, predicted=shares[site.name]) for site in sites},
        measured=1.0,
    )
    with candidate.restored():
        before = reserve.loss({})
    return advise(candidate, {}, known, reserve, batch.narrow(0, 1), before=before, target=target)


FEW = {f"layers.{place}": 6.0 if place == 0 else 1.0 for place in range(5)}


def test_the_few_sites_get_the_next_dearer_format() -> None:
    found = advised(FEW)
    assert found is not None
    assert found.sites == ("layers.0",)
    assert (found.of, found.format) == (5, "int8-token")
    assert found.share == pytest.approx(0.6)
    assert found.share_of_macs == pytest.approx(0.2)
    assert found.after < found.before


@pytest.mark.parametrize(
    ("scheme", "target", "expected"),
    [
        ("w8a8-channel-static", "onnxruntime", "int16-static"),
        ("w8a8-channel-static", "tensorrt", "float"),
        ("w8a8-channel-token", "any", "int16-static"),
        ("wfp8afp8-channel-static", "vllm", "fp8-token"),
    ],
)
def test_the_format_is_one_that_the_target_serves(scheme: str, target: Target, expected: str) -> None:
    found = advised(FEW, scheme, target)
    assert found is not None
    assert found.format == expected


def test_nothing_is_advised_where_many_sites_make_the_error_or_activations_are_float() -> None:
    assert advised(dict.fromkeys(FEW, 1.0)) is None
    assert advised(FEW, "w8a16-channel") is None


def test_the_sentence_has_the_figures() -> None:
    entry = {
        "sites": ["a", "b"],
        "of": 120,
        "share": 0.71,
        "format": "int8-token",
        "before": 0.0079,
        "after": 0.0052,
        "share_of_macs": 0.083,
    }
    (line, *_) = told({"format_advice": entry})
    for part in (
        "2 of 120 sites make 71 %",
        "int8-token at those: output loss 7.90e-3 -> 5.20e-3",
        "8 % of multiply-adds",
    ):
        assert part in line
