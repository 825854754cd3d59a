"""Folded normalizations: the model stays the same, and its weights carry the scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.joint.low_rank.norms import fold_norms, row_scales
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from tests.support.joint_models import Crn, trained


def test_batch_norms_become_rows_and_layer_norms_columns() -> None:
    model: Any = trained(Crn())
    rewrite(model)
    x = torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    before = model(x)
    weight = model.conv1.weight.detach().clone()
    scale = model.norm1.weight.detach() / torch.sqrt(model.norm1.running_var + model.norm1.eps)
    gamma = model.inner.weight.detach().clone()
    found = fold_norms(model, Batch(args=(x,)))
    assert found.rows == {"norm1": "conv1", "norm2": "conv2"}
    assert found.columns == {"inner": ("rnn.layers.0.ih",)}
    assert set(found.left) == {"shared", "idle"}
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.conv1.weight, weight * scale.reshape(-1, 1, 1, 1))
    assert isinstance(model.norm1, nn.Identity)
    torch.testing.assert_close(model.inner.weight.detach().abs()[gamma != 0], torch.ones(int((gamma != 0).sum())))


def test_columns_of_small_scales_become_small() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 1e-3, 0.0, 0.5, 1e-3, 1.0, 3.0]))
        model[1].bias.copy_(torch.linspace(-1, 1, 8))
    x = torch.randn(3, 6)
    before = model(x)
    fold_norms(model, Batch(args=(x,)))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert not model[1].bias.any(), "it went into the bias of what reads it"
    norms = model[2].weight.detach().norm(dim=0)
    assert bool((norms[[2, 3, 5]] < 0.01 * norms[[0, 1, 7]].min()).all())


class Reused(nn.Module):
    """What reads a layer's output beside the normalization would see other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.as_tensor(self.norm(y) + y)


def test_a_layer_that_is_read_elsewhere_keeps_its_rows() -> None:
    model: Any = trained(Reused())
    weight = model.conv.weight.detach().clone()
    found = fold_norms(model, Batch(args=(torch.randn(2, 3, 9),)))
    assert found.rows == {}
    assert found.left == {"norm": "it is not the only reader of one layer's output"}
    assert torch.equal(model.conv.weight, weight)


def test_statistics_of_the_batch_do_not_fold() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    assert fold_norms(model, Batch(args=(torch.randn(5, 3),))).left == {"1": "it takes the statistics of every batch"}
    assert row_scales(model[1]) is None
    assert row_scales(nn.LayerNorm(4)) is None


def test_norms_without_scales_and_linear_layers_without_bias_fold() -> None:
    model: Any = trained(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False)))
    x = torch.randn(5, 3)
    before = model(x)
    assert fold_norms(model, Batch(args=(x,))).rows == {"1": "0"}
    torch.testing.assert_close(model(x), before)


def test_row_scales_are_what_folding_multiplies_by() -> None:
    model: Any = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    weight = model[0].weight.detach().clone()
    scales = row_scales(model[1])
    fold_norms(model, Batch(args=(torch.randn(5, 3),)))
    assert scales is not None
    torch.testing.assert_close(model[0].weight.detach().abs(), (weight * scales.unsqueeze(1)).abs())
