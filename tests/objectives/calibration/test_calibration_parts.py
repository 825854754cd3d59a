"""A calibration kept site by site is the same when it is put together again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alphasmith.objectives.calibration.calibrate import Calibration, calibrate
from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import ChannelStatistic
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.sites.discovery import discover
from tests.support.equality import same


class Branches(nn.Module):
    """Two layers behind norms; the second sees rows only where the input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(6), nn.Linear(6, 6)
        self.last, self.second = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 6) -> (rows, 3)."""
        y = self.first(self.norm(x))
        return torch.as_tensor(self.second(self.last(y[x[:, 0] > 0])))


def calibration(x: torch.Tensor, statistics: tuple[ChannelStatistic, ...] = ("absmax",)) -> Calibration:
    model = Branches().eval()
    sites = discover(model, Batch(args=(torch.ones(2, 6),))).sites
    return calibrate(model, sites, [Batch(args=(x,))], rows=4, seed=0, statistics=statistics)


def parts_of(whole: Calibration) -> list[Calibration]:
    return [whole.only(name) for name in whole.rows_seen]


@pytest.mark.parametrize("statistics", [("absmax",), ("rms", "percentile")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parts_are_the_whole(statistics: tuple[ChannelStatistic, ...], sign: float) -> None:
    whole = calibration(sign * torch.rand(8, 6, generator=torch.Generator().manual_seed(0)), statistics)
    parts = parts_of(whole)
    assert [len(part.sites) + len(part.missing) for part in parts] == [1, 1]
    assert bool(whole.missing) == (sign < 0)
    assert same(Calibration.merged([Calibration.from_state(part.state()) for part in parts]), whole)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    whole = calibration(torch.ones(8, 6))
    one, two = parts_of(whole)
    with pytest.raises(InputError, match="site nowhere: was not calibrated"):
        whole.only("nowhere")
    with pytest.raises(InputError, match="no part"):
        Calibration.merged([])
    with pytest.raises(InputError, match="more than one part"):
        Calibration.merged([one, two, one])
    with pytest.raises(InputError, match="different statistics"):
        Calibration.merged([one, calibration(torch.ones(8, 6), ("rms",)).only(next(iter(two.sites)))])
