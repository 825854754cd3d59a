"""What single steps cost, as measured: a JSON file that benchmarks write and the simulation of a cluster reads.

Every entry says in which unit it is and where it comes from, so that a figure computed from it can be traced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError

#: Where measured costs are kept, from the root of the repository.
COSTS = Path("benchmarks/cluster_costs.json")


@dataclass(frozen=True)
class Cost:
    """One measured cost.

    Attributes:
        value: A number, or one number per thing measured (per site, say).
        unit: Its unit, e.g. ``s``, ``bytes/s``, ``1``.
        source: What was measured where; shown, never read.
    """

    value: float | tuple[float, ...]
    unit: str
    source: str

    @property
    def number(self) -> float:
        """The value of a cost that is one number."""
        if isinstance(self.value, tuple):
            raise InputError("--costs", f"{self.source!r} holds many numbers where one is needed", "measure it again")
        return self.value

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value of a cost that is many numbers."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


def load_costs(file: Path = COSTS) -> dict[str, Cost]:
    """Every cost of a file by name.

    Raises:
        InputError: The file is missing or is not such a file.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {name: _cost(entry) for name, entry in entries.items()}
    except OSError as error:
        raise InputError("--costs", f"{file} cannot be read ({error.strerror})", "measure the costs first") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("--costs", f"{file} is not a file of costs ({error})", "measure the costs again") from error


def save_costs(found: Mapping[str, Cost], file: Path) -> None:
    """Put costs into a file, beside the others that it holds."""
    every = {**(load_costs(file) if file.exists() else {}), **found}
    entries = {name: asdict(cost) for name, cost in sorted(every.items())}
    file.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _cost(entry: Mapping[str, Any]) -> Cost:
    value = entry["value"]
    kept = tuple(float(v) for v in value) if isinstance(value, list) else float(value)
    return Cost(kept, str(entry["unit"]), str(entry["source"]))
