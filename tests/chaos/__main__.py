"""The long form: ``python -m tests.chaos --faults 200 --seed 0``. Exit code 1 where anything that must hold does not."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos.children import HangError
from tests.chaos.kinds import FAULTS
from tests.chaos.scenes import Verdict, World
from tests.chaos.servers import Missing

#: Plays per fault that must strike, at most.
_MOST = 2


@dataclass(frozen=True)
class FaultRun:
    """One fault: its kind, the seed that reproduces it, how long it took, whether it struck, what was wrong, why skipped."""

    kind: str
    seed: int
    seconds: float
    struck: bool = False
    wrong: tuple[str, ...] = ()
    skipped: str = ""


def play(world: World, kind: str, seed: int) -> FaultRun:
    """Play one fault with the generator of one seed."""
    start = time.monotonic()
    verdict, skipped = Verdict((), struck=False), ""
    try:
        verdict = FAULTS[kind](world, random.Random(f"{kind} {seed}"))
    except Missing as missing:
        skipped = str(missing)
    except HangError as hung:
        verdict = Verdict((f"hung: {hung}",), struck=True)
    return FaultRun(kind, seed, time.monotonic() - start, verdict.struck, verdict.wrong, skipped)


def main(arguments: Sequence[str] | None = None) -> int:
    """Play a seeded sequence of faults, all kinds in turn, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--faults", type=int, default=200, help="How many must strike; those that came too late are played, too."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the sequence; fault i has the seed SEED + i.")
    parser.add_argument("--only", action="append", choices=sorted(FAULTS), help="Only this kind; repeatable.")
    parser.add_argument("--out", type=Path, help="Write all that happened to this file, as JSON.")
    chosen = parser.parse_args(arguments)
    kinds = chosen.only or sorted(FAULTS)
    played: list[FaultRun] = []
    with World() as world:
        for index in itertools.count():
            if sum(one.struck for one in played) >= chosen.faults or index >= _MOST * chosen.faults:
                break
            kind, seed = kinds[index % len(kinds)], chosen.seed + index
            one = play(world, kind, seed)
            played.append(one)
            print(f"{index + 1:4} {kind} {seed}: {one.seconds:.1f} s {_told(one)}", file=sys.stderr, flush=True)
            for sentence in one.wrong:
                print(f"     {sentence}", file=sys.stderr, flush=True)
            if chosen.out:
                chosen.out.write_text(json.dumps([asdict(p) for p in played], indent=1))
    print(_table(played))
    bad = [one for one in played if one.wrong]
    for one in bad:
        print(f"again: python -m tests.chaos --only {one.kind} --faults 1 --seed {one.seed}")
    return 1 if bad else 0


def _told(one: FaultRun) -> str:
    if one.skipped:
        return f"skipped: {one.skipped}"
    return f"{len(one.wrong)} violations" if one.wrong else "holds" if one.struck else "came too late"


def _table(played: Sequence[FaultRun]) -> str:
    kinds: dict[str, list[FaultRun]] = defaultdict(list)
    for one in played:
        kinds[one.kind].append(one)
    lines = ["| fault | struck | came too late | skipped | violations | seconds |", "|---|---:|---:|---:|---:|---:|"]
    for kind, ones in [*sorted(kinds.items()), ("all", list(played))]:
        struck, skipped = sum(one.struck for one in ones), sum(bool(one.skipped) for one in ones)
        wrong = sum(len(one.wrong) for one in ones)
        late, seconds = len(ones) - struck - skipped, sum(one.seconds for one in ones)
        lines.append(f"| {kind} | {struck} | {late} | {skipped} | {wrong} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
