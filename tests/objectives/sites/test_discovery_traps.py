"""Where a wrong fold is tempting, discovery folds exactly or not at all."""

from __future__ import annotations

import copy

import pytest
import torch

from alphasmith.objectives.sites.discovery import discover
from tests.support.architecture_records import randomise
from tests.support.discovery_traps import TRAPS, Trap
from tests.support.smoothing_checks import TOLERANCE, apply, difference, draw, evaluate


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_only_exact_sites_are_smoothed(trap: Trap) -> None:
    """Discovery sees two samples of five positions; three samples of seven must come out the same."""
    model = randomise(trap.make())
    found = discover(model, trap.batch(torch.Generator().manual_seed(1), 2, 5))
    fresh = trap.batch(torch.Generator().manual_seed(2), 3, 7)
    outputs = evaluate(copy.deepcopy(model), fresh)
    for index, site in enumerate(found.sites):
        if site.mode == "left":
            continue
        smoothed = copy.deepcopy(model)
        apply(smoothed, site, draw(site, index))
        assert difference(evaluate(smoothed, fresh), outputs) <= TOLERANCE, f"{site.name}: {site.mode}"
    modes = {site.name: str(site.mode) for site in found.sites}
    assert modes | dict(trap.modes) == modes, {site.name: site.reason for site in found.sites}
