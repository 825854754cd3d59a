"""Regularised training and the rounds of decomposition on the embedded speech-enhancement model: losses, ranks, drops, processor seconds.

    python -m benchmarks.joint_rounds [--lambdas 0 1e-3 1e-2] [--metrics plain whitened] [--norms fold] [--out docs/joint.md]

Every model is trained once and lowered once a metric of the decomposition. Drops count from the model trained without sparsity terms, where there is one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from torch import nn

from alphasmith.objectives.joint.drop import DropCondition, Tolerance
from alphasmith.objectives.joint.ports import Measured
from alphasmith.objectives.joint.rounds.loop import run_rounds
from alphasmith.objectives.joint.rounds.outcome import Round
from alphasmith.objectives.joint.rounds.regularised import train_regularised
from alphasmith.objectives.joint.rounds.settings import RegularisedSettings, RoundsSettings, Updates
from alphasmith.objectives.joint.sparsity.terms import SparsitySettings
from alphasmith.search.compression.embedded import TRAINING, embedded_task
from benchmarks.timing import machine, parser, publish, table

#: What may be lost, as far as int8 is published to lose on a model of this kind.
CONDITION = DropCondition(tolerances=(Tolerance(metric="si_sdr", drop=0.6), Tolerance(metric="stoi", drop=0.005)))


def numbers(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def shown(measured: Measured | None) -> list[str]:
    """SI-SDR, STOI and SNR."""
    values = {} if measured is None else measured.values
    found = [values.get(name) for name in ("si_sdr", "stoi", "snr")]
    return ["not measured" if value is None else f"{value:.3f}" for value in found]


def row(how: list[str], done: Round, before: int) -> list[str]:
    """One round."""
    ranks = [str(layer.rank) if layer.rank else "dense" for layer in done.layers]
    told = "kept" if done.met else "violated" if done.verdict is not None else done.trouble or "no rank fell"
    return [*how, str(done.number), f"{before / done.numbers:.1f}x", *shown(done.measured), told, ", ".join(ranks)]


def main() -> None:
    """Train, lower, measure, print."""
    made = parser(__doc__)
    made.add_argument("--lambdas", type=float, nargs="+", default=[0.0, 1e-3, 1e-2], help="strengths of both terms")
    made.add_argument("--metrics", nargs="+", default=["plain", "whitened"], help="plain, activation, whitened")
    made.add_argument("--norms", default="fold", help="fold or weight")
    made.add_argument("--steps", type=int, default=TRAINING.updates.steps, help="updates of the training")
    made.add_argument("--finetune", type=int, default=60, help="updates of a round")
    made.add_argument("--rounds", type=int, default=5, help="most rounds")
    made.add_argument("--energy", type=float, default=0.995, help="share of the squared singular values kept at first")
    given: argparse.Namespace = made.parse_args()
    where = machine()
    make, task = embedded_task(0)
    noisy = task.measure(nn.Identity(), "study")
    rows = [["noisy", "", "", "", *shown(noisy), "", ""]]
    spent: dict[str, list[float]] = {"training": [], "rounds": []}
    baseline: Measured | None = None
    for strength in given.lambdas:
        updates = replace(TRAINING.updates, steps=given.steps)
        sparsity = SparsitySettings(encoder=strength, recurrent=strength)
        started = time.process_time()
        trained = train_regularised(make(), task, RegularisedSettings(updates=updates, sparsity=sparsity)).model
        spent["training"].append(time.process_time() - started)
        before = numbers(trained)
        measured = task.measure(trained, "study")
        baseline = baseline or measured
        rows.append([f"{strength:g}", "", "", "1.0x", *shown(measured), "", ""])
        for metric in given.metrics:
            settings = RoundsSettings(
                energy=given.energy,
                max_rounds=given.rounds,
                metric=metric,
                norms=given.norms,
                finetune=Updates(steps=given.finetune, learning_rate=1e-3, batch_size=8),
            )
            started = time.process_time()
            found = run_rounds(trained, task, settings, CONDITION, baseline=baseline)
            spent["rounds"].append(time.process_time() - started)
            rows += [row([f"{strength:g}", metric], done, before) for done in found.rounds]
            rows.append([f"{strength:g}", metric, "result", "", "", "", "", found.status, ""])
    header = ["lambda", "metric", "round", "fewer numbers", "SI-SDR [dB]", "STOI", "SNR [dB]", "", "ranks"]
    seconds = "; ".join(f"{what} {', '.join(f'{one:.0f}' for one in taken)}" for what, taken in spent.items())
    told = (
        f"{numbers(make())} parameters, {given.steps} updates of training and {given.finetune} a round; processor seconds: "
        f"{seconds}. Tolerated: 0.6 dB of SI-SDR and 0.005 of STOI. Ranks in the order of the layers"
    )
    publish("JOINT_ROUNDS", f"{where}\n\n{told}.\n\n{table(header, rows)}", given.out)


if __name__ == "__main__":
    main()
