"""What all scenes share is made once per module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.scenes import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process that forks others, a server and a cluster of our own, undisturbed runs to compare with."""
    with World() as made:
        yield made
