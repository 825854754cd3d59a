"""Quantized models of real architectures, from their discovered sites: near the float model, reloadable, reusable."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.payload import payload, restore
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.discovery import discover
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing
from tests.support.architecture_records import Architecture
from tests.support.architectures import ARCHITECTURES
from tests.support.plain_forms import quantize_model

CHOSEN = (
    "opt",
    "llama",
    "gemma2",
    "gpt2",
    "bloom",
    "mixtral",
    "ernie",
    "vit",
    "whisper",
    "resnet",
    "tagger",
    "torch-encoder-post-norm",
)
SCHEME = Scheme(activation_granularity="token")


def draw(site: Site, seed: int) -> Smoothing:
    """Scales between 1/2 and 2 and, where the site takes one, a shift within 1/4, one value per tie."""
    _, tie = torch.unique(site.ties, return_inverse=True)
    free = torch.rand(2, int(tie.max()) + 1, generator=torch.Generator().manual_seed(seed))
    shift = (free[1] / 2 - 0.25)[tie] if site.shiftable else None
    return Smoothing(scales=torch.exp2(2 * free[0] - 1)[tie], shift=shift)


def output(model: nn.Module | CandidateModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return main_output(model(*batch.args, **batch.kwargs))


def difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in CHOSEN], ids=lambda a: a.name)
def test_architecture(architecture: Architecture) -> None:
    model = architecture.factory().float().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    traced, fresh = (architecture.batch(generator, samples).to(dtype=torch.float32) for samples in (1, 3))
    sites = discover(model, traced).sites
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference = main_output(call(model, fresh))
    smoothings = {s.name: draw(s, index) for index, s in enumerate(sites) if s.mode != "left"}

    candidate = CandidateModel(copy.deepcopy(model), sites, {}, SCHEME)
    candidate.apply({})
    unsmoothed = difference(output(candidate, fresh), reference)
    candidate.apply(smoothings)
    quantized = copy.deepcopy(model)
    summary = quantize_model(quantized, sites, smoothings=smoothings, ranges={}, scheme=SCHEME)
    result = output(quantized, fresh)
    # Scales between 1/2 and 2 can widen the ranges of both factors of a product, so they may multiply the rounding error by
    # 4 each way; a scale that is not undone (a missed division, a producer not folded) changes the output itself.
    assert 0 < difference(result, reference) < 6 * unsmoothed
    assert summary.operators
    assert 4 * summary.payload_bytes == summary.float_bytes
    assert torch.equal(output(candidate, fresh), result)

    reloaded = restore(architecture.factory(), *payload(quantized))
    assert torch.equal(output(reloaded, fresh), result)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in candidate.reset().state_dict().items())
    skipped = copy.deepcopy(model)
    quantize_model(skipped, sites, smoothings=smoothings, ranges={}, scheme=SCHEME, skip=["*"])
    assert difference(output(skipped, fresh), reference) < 1e-5


def test_fused_encoder_layers_do_not_bypass_the_quantizer() -> None:
    # In evaluation without gradients, and with a padding mask, both the encoder and its layers would take fused paths.
    torch.manual_seed(0)  # module initialisers take no generator
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    sites = discover(model, Batch(args=(x,), kwargs={"src_key_padding_mask": padding})).sites
    explicit = {s.name: Smoothing(scales=torch.full((s.channels,), 4.0)) for s in sites if s.mode == "explicit"}
    assert explicit
    quantized = copy.deepcopy(model)
    quantize_model(quantized, sites, smoothings=explicit, ranges={}, scheme=Scheme(activations="none"))
    real = ~padding
    with torch.no_grad():
        result = quantized(x, src_key_padding_mask=padding)[real]
        assert 0 < difference(result, model(x, src_key_padding_mask=padding)[real]) < 0.02
