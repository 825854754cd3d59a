"""What parameters read is known under the model's own names, and makes packed models lose less of their output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.joint.packed.inputs import parameter_inputs
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedSettings, pack
from alphasmith.objectives.joint.packed.restoring import load_packed, restore
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.private_copy import private_copy
from tests.support.joint_models import trained
from tests.support.packed_models import BATCH, Mixed, made, mixed_arguments, packed_settings, stages


@settings(deadline=None, max_examples=25)
@given(arguments=mixed_arguments, stage=stages, how=packed_settings)
def test_a_model_packed_with_its_inputs_comes_back_out_of_a_fresh_architecture(
    arguments: dict[str, Any], stage: Any, how: PackedSettings
) -> None:
    model = made(trained(Mixed(**arguments)), stage)
    inputs = parameter_inputs(model, [BATCH])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, covariance in inputs.items():
        if name in parameters:  # else its weight is computed
            assert covariance.shape == (parameters[name][0].numel(),) * 2
    packed = pack(model, how, covariances=inputs)
    again = restore(Mixed(**arguments), packed)
    load_packed(model, packed)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Features(nn.Module):
    """Few causes seen through many columns, then a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)
        self.rnn = nn.LSTM(48, 24, batch_first=True)
        self.out = nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, 48) -> (B, T, 8)."""
        return torch.as_tensor(self.out(self.rnn(torch.relu(self.inner(x)))[0]))


@pytest.mark.parametrize("rank", [None, 8])
def test_less_of_the_output_is_lost(rank: int | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Features().eval()
        x = torch.randn(40, 6, 5) @ torch.randn(5, 48)
    if rank is not None:
        factorize(model, LowRankSettings(rank=rank, exclude=["out"]))
    inputs = parameter_inputs(model, [Batch(args=(x,))])
    first = "inner.weight" if rank is None else "inner.right"
    assert {first, "rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"} <= set(inputs)
    how = PackedSettings(clusters=ClassClusters(recurrent=4, linear=4))
    lost = []
    with torch.no_grad():
        expected = model(x)
        for covariances in (None, inputs):
            small = restore(Features(), pack(private_copy(model), how, covariances=covariances))
            lost.append(float((small(x) - expected).square().sum()))
    assert lost[1] < 0.7 * lost[0]
