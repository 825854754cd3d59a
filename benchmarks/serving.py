"""``alphasmith serve`` on the image demo: requests per second and latency, with and without batching, and a soak.

    python -m benchmarks.serving [--seconds 5] [--repeats 3] [--soak 60] [--threads 1] [--folder DIR] [--out docs/serving.md]

Three ways take turns, so that other work on the machine meets them alike; medians. *One at a time* classifies one image after the
other in a process of its own, without HTTP. The service runs as it is started by default, and with ``--batch 1 --wait 0``. Clients
run in a process of their own, on the same machine, and send one image of 8x8 pixels a request; each sends its next request when it
has the answer to the one before. The soak is 200 clients against the default service; an error, or a gain
of batching below 2 at the most clients, ends the benchmark with exit code 1.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.timing import machine, median, parser, publish, table, torch_threads

CLIENTS = (1, 8, 64)
#: Least gain of batching at the most clients.
LEAST = 2.0
SOAK_CLIENTS = 200
#: How a run of the demo is made quick: how well it is quantized does not matter here.
_QUICK = ("search.trials=4", "search.rows=64", "search.single_alphas=3")
_ALONE = """
import sys, time
from pathlib import Path
from alphasmith.search import Classifier
from alphasmith.objectives.media import NamedBytes
classifier = Classifier.opened(Path(sys.argv[1]))
image = NamedBytes("digit.png", Path(sys.argv[2]).read_bytes())
classifier.classify([classifier.decode(image)])
print("ready", flush=True)
for line in sys.stdin:
    seconds, taken = float(line), []
    start = now = time.perf_counter()
    while now - start < seconds:
        classifier.classify([classifier.decode(image)])
        taken.append(time.perf_counter() - now)
        now = time.perf_counter()
    taken.sort()
    print(len(taken) / (now - start), taken[int(0.99 * len(taken))], flush=True)
"""


@contextmanager
def process(arguments: list[str], threads: int) -> Iterator[subprocess.Popen[str]]:
    """A process of this environment, ended with the block."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as running:
        try:
            yield running
        finally:
            running.terminate()


@contextmanager
def service(folder: Path, threads: int, *options: str) -> Iterator[str]:
    """Address of a service of a folder."""
    arguments = ["-m", "alphasmith.search.cli", "serve", str(folder), "--port", "0", *options]
    with process(arguments, threads) as running:
        line = running.stderr.readline() if running.stderr else ""
        found = re.search(r"http://[\d.]+:\d+", line)
        if found is None:
            raise SystemExit(f"the service did not start: {line}")
        yield found[0]


def asked(address: str, image: Path, clients: int, seconds: float) -> dict[str, Any]:
    """What clients saw of a service."""
    command = [sys.executable, "-m", "benchmarks.http_load", f"{address}/v1/classify", str(image)]
    told = subprocess.run(
        [*command, "--clients", str(clients), "--seconds", str(seconds)], check=True, capture_output=True, text=True
    ).stdout
    seen: dict[str, Any] = json.loads(told)
    if seen["errors"]:
        raise SystemExit(f"{clients} clients met errors: {seen['errors']}")
    return seen


def made(folder: Path) -> Path:
    """The output folder of a quick run of the image demo."""
    sets = [part for field in _QUICK for part in ("--set", field)]
    command = [sys.executable, "-m", "alphasmith.search.cli", "run", "--demo", "image", "--out", str(folder / "out")]
    subprocess.run(
        [*command, "--storage", f"sqlite:///{folder}/runs.db", *sets], check=True, capture_output=True, text=True
    )
    return folder / "out"


def rates(folder: Path, image: Path, *, seconds: float, repeats: int, threads: int) -> list[list[str]]:
    """One line of the table for each number of clients."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    with ExitStack() as stack:
        alone = stack.enter_context(process(["-c", _ALONE, str(folder), str(image)], threads))
        batched = stack.enter_context(service(folder, threads))
        single = stack.enter_context(service(folder, threads, "--batch", "1", "--wait", "0"))
        if alone.stdin is None or alone.stdout is None or alone.stdout.readline() != "ready\n":
            raise SystemExit("the classifier did not start")
        for address in (batched, single):
            asked(address, image, CLIENTS[-1], 1.0)
        for _ in range(repeats):
            alone.stdin.write(f"{seconds}\n")
            alone.stdin.flush()
            rate, late = map(float, alone.stdout.readline().split())
            found["alone", 1].append((rate, late))
            for clients in CLIENTS:
                for name, address in (("batched", batched), ("single", single)):
                    seen = asked(address, image, clients, seconds)
                    found[name, clients].append((seen["requests"] / seen["seconds"], seen["p99"]))
    rated = {key: median([r for r, _ in values]) for key, values in found.items()}
    waits = {key: 1000 * median([p for _, p in values]) for key, values in found.items()}
    rows = [["no HTTP, one at a time", "1", f"{rated['alone', 1]:.0f}", f"{waits['alone', 1]:.0f}", ""]]
    for clients in CLIENTS:
        for name, told in (("single", "one item a call"), ("batched", "batched")):
            key = (name, clients)
            gain = median(
                [b / s for (b, _), (s, _) in zip(found["batched", clients], found["single", clients], strict=True)]
            )
            shown = f"{gain:.1f}" if name == "batched" else ""
            rows.append([told, str(clients), f"{rated[key]:.0f}", f"{waits[key]:.0f}", shown])
    return rows


def soak(folder: Path, image: Path, *, seconds: float, threads: int) -> str:
    """One sentence on many clients for a while."""
    with service(folder, threads) as address:
        seen = asked(address, image, SOAK_CLIENTS, seconds)
    return (
        f"{SOAK_CLIENTS} clients for {seen['seconds']:.0f} s: {seen['requests']} requests, "
        f"{sum(seen['errors'].values())} errors, median {1000 * seen['p50']:.0f} ms, p99 {1000 * seen['p99']:.0f} ms."
    )


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=5.0, help="time of each measurement")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--soak", type=float, default=60.0, help="time of the soak; 0: none")
    arguments.add_argument("--threads", type=int, default=1, help="torch threads of every process")
    arguments.add_argument("--folder", type=Path, help="output folder of a run of the image demo; default: makes one")
    given = arguments.parse_args()
    begun = time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory() as scratch, torch_threads(given.threads):
        about = machine()
        folder = given.folder or made(Path(scratch))
        image = Path(scratch) / "digit.png"
        Image.fromarray((load_digits().images[0] / 16 * 255).astype("uint8")).convert("RGB").save(image)
        rows = rates(folder, image, seconds=given.seconds, repeats=given.repeats, threads=given.threads)
        told = soak(folder, image, seconds=given.soak, threads=given.threads) if given.soak else ""
    head = ["service", "clients", "requests/s", "p99 [ms]", "gain of batching"]
    publish("serving", f"{about} {begun}.\n\n{table(head, rows)}\n\n{told}".rstrip(), given.out)
    if float(rows[-1][-1]) < LEAST:
        raise SystemExit(f"batching gains {rows[-1][-1]} at {CLIENTS[-1]} clients, less than {LEAST}")


if __name__ == "__main__":
    main()
