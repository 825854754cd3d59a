"""How small shared models become within a tolerated drop, against what is usually done at the same size, and how fast they run.

    python -m benchmarks.joint_models SHARED_DATA [--models embedded kwt1 ...] [--trials 24] [--work FOLDER] [--out docs/compress.md]

SHARED_DATA is the folder with zoo.py; it is not part of this repository. Everything is chosen on the study split; the figures are of the test
split, which the study looks at once, after everything is decided. What is usually done is given the bytes of ours, or the fewest it
can have: it is chosen by size alone and needs no study. With ``--work``, findings that are there are not measured again, and rows of other
models that the document has stay in it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.joint.low_rank.factorization import LowRankSettings, factorize
from alphasmith.objectives.joint.packed.packing import ClassClusters, PackedSettings, model_bytes, pack
from alphasmith.objectives.joint.packed.restoring import restore
from alphasmith.objectives.media.batch import call
from alphasmith.objectives.model.plain_operators import rewrite
from alphasmith.search import compress, load_compressed
from alphasmith.search.compression.config import Role
from alphasmith.search.toml_values import merged
from benchmarks.joint_cases import JOINT_NAMES, JointCase, load_joint_case
from benchmarks.timing import machine, parser, publish, seconds_of, table, torch_threads

#: Entries of a table that k-means palettization is tried with.
ENTRIES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
REPEATS = 15


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A usual way at the size of ours.

    Attributes:
        stored: Bytes.
        drops: Metric -> how much worse on the test split.
    """

    stored: int
    drops: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one model came to.

    Attributes:
        model: Its name.
        data: Which data are in which part.
        original: Bytes of the float model.
        stored: Of ours.
        wanted: Times smaller that is the goal.
        told: What the trial chose.
        before: Metric -> value of the float model on the test split.
        study: Metric -> how much worse ours is on the study split.
        test: Likewise on the test split.
        rivals: Name -> a usual way.
        seconds: See :func:`timed`.
        trials: How many.
    """

    model: str
    data: str
    original: int
    stored: int
    wanted: float
    told: str
    before: dict[str, float]
    study: dict[str, float]
    test: dict[str, float]
    rivals: dict[str, Rival]
    seconds: dict[str, float]
    trials: int


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of two axes or more: what every way here works on."""
    return ((name, p) for name, p in model.named_parameters() if p.dim() > 1)


def int8(model: nn.Module) -> tuple[nn.Module, int]:
    """Weights as 8-bit codes with a step for every output channel, all else float."""
    small, size = copy.deepcopy(model), model_bytes(model)
    with torch.no_grad():
        for _, weight in weights_of(small):
            rows = weight.flatten(1)
            step = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            rows.copy_((rows / step).round() * step)
            size -= 3 * weight.numel() - 4 * len(rows)
    return small, size


def palettized(model: nn.Module, most: int) -> tuple[nn.Module, int] | None:
    """One number of entries for every table, the largest that fits, k-means, indices coded."""
    low, high, found = 0, len(ENTRIES), None
    while low < high:  # more entries take more bytes
        middle = (low + high) // 2
        clusters = ClassClusters(
            **dict.fromkeys(("conv", "recurrent", "linear", "embedding", "other"), ENTRIES[middle])
        )
        packed = pack(model, PackedSettings(clusters=clusters, start="k-means++"))
        if packed.stored_bytes <= most:
            low, found = middle + 1, packed
        else:
            high = middle
    return None if found is None else (restore(model, found), found.stored_bytes)


def pruned(model: nn.Module, most: int) -> tuple[nn.Module, int] | None:
    """The smallest weights of the whole model are zero, the others 8-bit codes: a bit for every weight, and a byte for each that is left."""
    total = sum(weight.numel() for _, weight in weights_of(model))
    floats = model_bytes(model) - 4 * total + sum(4 * len(weight) for _, weight in weights_of(model))
    left = most - floats - total // 8
    if left <= 0:
        return None
    small, _ = int8(model)
    sizes = torch.cat([weight.detach().abs().flatten() for _, weight in weights_of(small)])
    edge = sizes.kthvalue(max(1, total - min(left, total))).values if left < total else torch.tensor(-1.0)
    kept = 0
    with torch.no_grad():
        for _, weight in weights_of(small):
            weight.masked_fill_(weight.abs() <= edge, 0)
            kept += int(weight.count_nonzero())
    return small, floats + total // 8 + kept


def truncated(model: nn.Module, most: int) -> tuple[nn.Module, int] | None:
    """Singular values alone, factors in float32: the most energy that fits."""
    low, high, found = 0.0, 1.0, None
    for _ in range(12):
        energy = (low + high) / 2
        small = copy.deepcopy(model).eval()
        rewrite(small)
        factorize(small, LowRankSettings(energy=energy))
        if (size := model_bytes(small)) <= most:
            low, found = energy, (small, size)
        else:
            high = energy
    return found


def drops_of(case: JointCase, model: nn.Module, before: dict[str, float]) -> dict[str, float]:
    """How much worse a model is on the test split."""
    after = case.task.measure(model, "test").values
    signs = {metric.name: 1.0 if metric.goal == "max" else -1.0 for metric in case.task.metrics}
    return {name: signs[name] * (before[name] - value) for name, value in after.items() if value is not None}


def cut_short(case: JointCase, steps: int | None, finetune: int | None, entries: list[int] | None = None) -> JointCase:
    """The same case with other numbers of updates, or of entries to choose from, which its line says."""
    clusters = {name: value for name, value in (("finetune", finetune), ("k", entries)) if value is not None}
    given: dict[str, Any] = {"clusters": clusters}
    if steps is not None:
        given |= {"train": {"steps": steps}, "rounds": {"steps": steps}}
    told = "" if steps is None else f"; {steps} updates of a training"
    told += "" if finetune is None else f"; {finetune} updates of tables"
    told += "" if entries is None else f"; tables of {', '.join(map(str, entries))}"
    return replace(case, settings=merged(case.settings, given), data=case.data + told)


def measure(case: JointCase, trials: int, work: Path, roles: list[str]) -> Found:
    """Compress one model, and its rivals."""
    settings: dict[str, Any] = {
        "storage": f"sqlite:///{work / 'studies.db'}", "out": str(work / case.name), "drop": case.drop,
        "study": {"trials": trials, "cache": str(work / "stages"), "roles": roles}, **case.settings,
    }  # fmt: skip
    result = compress(case.model, case.task, settings)
    ours, manifest = load_compressed(result.folder, case.model), result.manifest
    before = {m.name: m.test_float for m in manifest.metrics if m.test_float is not None}
    entry = next(one for one in manifest.front if manifest.trial is not None and one.number == manifest.trial.number)
    size = manifest.bytes
    ways: dict[str, Callable[[], tuple[nn.Module, int] | None]] = {
        "int8": lambda: int8(case.model),
        "palettization": lambda: palettized(case.model, size.stored),
        "pruning + int8": lambda: pruned(case.model, size.stored),
        "SVD": lambda: truncated(case.model, size.stored),
    }
    rivals = {}
    for name, way in ways.items():
        made = way()
        if made is not None:
            rivals[name] = Rival(stored=made[1], drops=drops_of(case, made[0], before))
    parameters = {} if manifest.trial is None else manifest.trial.parameters
    told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in parameters.items())
    return Found(
        model=case.name, data=case.data, original=size.original, stored=size.stored, wanted=case.wanted, told=told,
        before=before, study={k: v for k, v in entry.drops.items() if v is not None},
        test=drops_of(case, ours, before), rivals=rivals, seconds=timed(case, result.folder), trials=trials,
    )  # fmt: skip


def timed(case: JointCase, folder: Path) -> dict[str, float]:
    """One forward call of one training sample on one thread [s], of the float model, ours as it is stored, and in the faster forms."""
    batch = case.task.train.batch([0])
    models = {
        "float": case.model,
        "stored": load_compressed(folder, case.model),
        "chosen": load_compressed(folder, case.model, batch=batch),
    }
    with torch_threads(1), torch.no_grad():
        return {
            name: seconds_of(lambda model=model: call(model.eval(), batch), REPEATS)  # type: ignore[misc]
            for name, model in models.items()
        }


def shown(drops: dict[str, float]) -> str:
    """Drops in a cell, in the order of the task's metrics."""
    return " / ".join(f"{value:.3g}" for value in drops.values())


def row(found: Found) -> list[str]:
    """One model as a row."""
    times = found.original / found.stored
    rivals = []
    for name in ("int8", "palettization", "pruning + int8", "SVD"):
        rival = found.rivals.get(name)
        rivals.append("does not fit" if rival is None else shown(rival.drops))
    pace = " / ".join(f"{found.seconds[name] / found.seconds['float']:.2f}" for name in ("stored", "chosen"))
    return [
        found.model, ", ".join(f"{k} {v:.4g}" for k, v in found.before.items()), f"{found.original:,}",
        f"{found.stored:,}", f"{times:.1f}x", f"{found.wanted:g}x", shown(found.study), shown(found.test), *rivals, pace,
    ]  # fmt: skip


HEADER = [
    "model", "float, test", "bytes", "ours", "smaller", "goal", "lost, study", "lost, test", "int8 (4x)", "palettization",
    "pruning + int8", "SVD", "time / float, as stored / faster forms",
]  # fmt: skip


def kept(work: Path, name: str) -> Found | None:
    """What was found before."""
    file = work / f"{name}.json"
    if not file.is_file():
        return None
    values = json.loads(file.read_text())
    values["rivals"] = {way: Rival(**rival) for way, rival in values["rivals"].items()}
    return Found(**values)


def published(out: Path | None) -> dict[str, tuple[str, str]]:
    """Model -> its row and its line in the document, each with the machine it was measured on."""
    if out is None or not out.is_file():
        return {}
    inside = (
        out.read_text(encoding="utf-8").partition("<!-- JOINT_MODELS -->")[2].partition("<!-- /JOINT_MODELS -->")[0]
    )
    lines = inside.splitlines()
    where = next((line.removesuffix(".") for line in lines if line.startswith("Machine: ")), "")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.startswith("| ")}
    told = {line.partition(":")[0].removeprefix("- "): line for line in lines if line.startswith("- ")}
    return {
        name: (rows[name], line if "Machine: " in line else f"{line} {where}.")
        for name, line in told.items()
        if name in rows
    }


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("data", type=Path, help="folder with zoo.py")
    made.add_argument("--models", nargs="+", default=list(JOINT_NAMES), choices=JOINT_NAMES, help="which")
    made.add_argument("--trials", type=int, default=24, help="of every study")
    made.add_argument("--roles", nargs="+", default=list(get_args(Role)), choices=get_args(Role), help="to choose from")
    made.add_argument("--steps", type=int, default=None, help="updates of every training; without: those of the model")
    made.add_argument("--entries", type=int, nargs="+", default=None, help="of a table, to choose from; without: all")
    made.add_argument("--finetune", type=int, default=None, help="updates of tables; without: those of the model")
    made.add_argument("--work", type=Path, default=None, help="folder that keeps studies and findings")
    given: argparse.Namespace = made.parse_args()
    sys.path.insert(0, str(given.data))
    where = machine()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        there = {} if given.work is None else published(given.out)
        rows: dict[str, str] = {name: line for name, (line, _) in there.items()}
        told: dict[str, str] = {name: line for name, (_, line) in there.items()}
        for name in given.models:
            found = kept(work, name)
            if found is None:
                try:
                    case = cut_short(load_joint_case(name, given.data), given.steps, given.finetune, given.entries)
                    found = measure(case, given.trials, work, given.roles)
                except InputError as error:  # such as: no trial keeps within the limits
                    rows[name] = table([name, *[""] * (len(HEADER) - 2), str(error)], []).splitlines()[0]
                    told[name] = f"- {name}: {given.trials} trials; {error}."
                    continue
            if "chosen" not in found.seconds:
                found = replace(found, seconds=timed(load_joint_case(name, given.data), work / name))
            (work / f"{name}.json").write_text(json.dumps(asdict(found)))
            rows[name] = table(row(found), []).splitlines()[0]
            told[name] = f"- {name}: {found.data}. {found.trials} trials; {found.told}."
            print(table(HEADER, [row(found)]), flush=True)
    ordered = [name for name in JOINT_NAMES if name in rows]
    lines = "\n".join([table(HEADER, []), *(rows[name] for name in ordered)])
    notes = "\n".join(told[name] for name in ordered)
    publish("JOINT_MODELS", f"{where}\n\n{lines}\n\n{notes}", given.out)


if __name__ == "__main__":
    main()
