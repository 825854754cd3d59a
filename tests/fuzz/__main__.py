"""Fuzz for as long as told: ``python -m tests.fuzz --minutes 60``. Exit code 1 where anything escaped."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from tests.fuzz.hunt import hunt
from tests.fuzz.targets import TARGETS

#: Time of one child process on one target [s]: a crash costs no more than that.
_SLICE = 120.0


def main() -> int:
    """Give every target a slice in turn, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="one of them only; repeatable")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    targets = chosen.target or list(TARGETS)
    if chosen.child:
        return hunt(targets[0], TARGETS[targets[0]], seconds=60 * chosen.minutes, seed=chosen.seed)
    end, number, escaped = time.monotonic() + 60 * chosen.minutes, 0, 0
    while (left := end - time.monotonic()) > 0:
        name = targets[number % len(targets)]
        minutes = min(_SLICE, left, 60 * chosen.minutes / len(targets)) / 60
        options = ["--child", "--target", name, "--minutes", str(minutes), "--seed", str(chosen.seed + number)]
        code = subprocess.run([sys.executable, "-m", "tests.fuzz", *options], check=False).returncode
        if code:
            escaped += 1
            print(f"{name}, seed {chosen.seed + number}: exit code {code}", flush=True)
        number += 1
    print(f"{number} slices, {escaped} with escapes", flush=True)
    return int(escaped > 0)


if __name__ == "__main__":
    sys.exit(main())
