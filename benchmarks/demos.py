"""The embedded demos: how much of the gap between the float and the naively quantized metric is closed, and in how long.

    python benchmarks/demos.py [--out docs/demos.md]

The demos' outliers are synthetic, see the README.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from alphasmith.search import RunConfig, run


class StageClock:
    """Wall time per stage of a run; a ``Progress``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._begun = "", time.perf_counter()

    def stage(self, name: str, total: int | None = None) -> None:
        """Close the stage before and begin another."""
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._begun
        self._name, self._begun = name, now

    def expect(self, costs: Sequence[float]) -> None:
        """Nothing to show."""

    def advance(self, detail: str = "") -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to show."""


def row(demo: str) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        clock = StageClock()
        config = RunConfig.build(
            {"model": {"demo": demo}, "storage": f"sqlite:///{folder}/trials.db", "out": f"{folder}/out"}
        )
        result = run(config, progress=clock)
        clock.stage("end")
    (metric,) = result.manifest.output.metrics
    values = [metric.float_model, metric.naive, metric.alpha_half, metric.best_single, metric.ours]
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return f"| {demo} | {metric.name} | failed |"
    gap = abs(known[0] - known[1])
    closed = 1 - abs(known[0] - known[4]) / gap
    kept = (result.sites["ours"] <= result.sites["best_single"]).sum()
    figures = " | ".join(f"{v:.4f}" for v in known)
    search, total = clock.seconds["searching sites"], sum(clock.seconds.values())
    return f"| {demo} | {metric.name} | {figures} | {closed:.1%} | {kept}/{len(result.sites)} | {search:.0f} | {total:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        "| demo | metric | float | naive | alpha 0.5 | best single | ours | gap closed | sites kept | search [s] | run [s] |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for demo in ("image", "text"):
        lines.append(row(demo))
        print(lines[-1], flush=True)
    if arguments.out:
        heading = (
            "<!-- made by benchmarks/demos.py -->\n# Embedded demos, W8A8, per-channel weights, static activations\n\n"
        )
        arguments.out.write_text(heading + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
