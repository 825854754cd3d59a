"""All kinds of faults: each file of faults adds its own when it is imported."""

from __future__ import annotations

from tests.chaos import compressions, publication
from tests.chaos.faults import FAULTS

__all__ = ["FAULTS", "compressions", "publication"]
