"""Targets of the sparsity terms: found by what reads what, whatever it is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alphasmith.objectives.joint.sparsity.targets import find_targets
from alphasmith.objectives.joint.structure import read_structure
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.plain_operators import rewrite
from tests.support.joint_models import Crn, trained

SPECTRUM = Batch(args=(torch.randn(2, 1, 5, 6, generator=torch.Generator().manual_seed(0)),))


def test_encoder_and_recurrent_layers_have_their_own_norms() -> None:
    for plain in (False, True):
        model = trained(Crn())
        if plain:
            rewrite(model)
        found = find_targets(model, SPECTRUM)
        # "inner" reads what another normalization made; "shared" is the first behind the LSTM, after a linear layer.
        assert found.encoder == ("norm1.weight", "norm2.weight")
        assert found.recurrent == ("shared.weight",)
        assert found.skipped == {
            "idle": "the example batch does not reach it",
            "inner": "it belongs to no layer",
        }
        assert found.warnings == ()
        assert read_structure(model, SPECTRUM).recurrent == ("rnn",)


class Decoder(nn.Module):
    """Two GRUs, normalizations without scales, and normalizations of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GRU(4, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.between, self.bare = nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False)
        self.conv, self.last = nn.Conv1d(6, 4, 1), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bare(self.second(self.between(self.first(x)[0]))[0])
        return torch.as_tensor(self.last(self.conv(y.transpose(1, 2))))


def test_norms_of_a_decoder_and_without_scales_are_skipped_and_named() -> None:
    found = find_targets(trained(Decoder()), Batch(args=(torch.randn(2, 3, 4),)))
    assert found.encoder == ()
    assert found.recurrent == ("between.weight",)
    assert found.skipped == {
        "bare": "it has no scales",
        "last": "it stands behind the recurrent layers and belongs to none of them",
    }
    assert found.warnings == ("no normalization belongs to an encoder layer: the first sparsity term is empty",)


class OwnCell(nn.Module):
    """A recurrent layer with a normalization inside."""

    def __init__(self) -> None:
        super().__init__()
        self.mode, self.hidden_size, self.num_layers = "LSTM", 5, 1
        self.product, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            h = torch.tanh(self.norm(self.product(h)) + step)
        return h


def test_a_norm_inside_a_recurrent_layer_is_its_own() -> None:
    model = nn.Sequential(nn.Linear(5, 5), OwnCell(), nn.LayerNorm(5)).eval()
    found = find_targets(model, Batch(args=(torch.randn(2, 3, 5),)))
    assert found.recurrent == ("1.norm.weight",)
    assert found.skipped == {"2": "it stands behind the recurrent layers and belongs to none of them"}


def test_models_that_lack_one_or_the_other_are_warned_about() -> None:
    x = Batch(args=(torch.randn(2, 3, 4),))
    without = find_targets(nn.Sequential(nn.Linear(4, 4)).eval(), x)
    assert (without.encoder, without.recurrent) == ((), ())
    assert without.warnings == (
        "the model has no recurrent layer: the second sparsity term is empty",
        "the model has no normalization: nothing drives its weights to low rank while it is trained",
    )
    still = find_targets(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval(), x)
    assert still.encoder == ("1.weight",)
    assert still.warnings == ("the model has no recurrent layer: the second sparsity term is empty",)
    first = find_targets(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)).eval(), x)
    assert first.skipped == {"0": "it belongs to no layer"}
