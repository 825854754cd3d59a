"""Regularised training and the rounds of decomposition on the embedded speech-enhancement model: losses, ranks, drops, processor seconds.

python -m benchmarks.joint_rounds [--steps 600] [--finetune 100] [--energy 0.99] [--metric whitened] [--norms weight] [--out docs/joint.md]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch import nn

from alphasmith.objectives.joint.drop import DropCondition, Tolerance
from alphasmith.objectives.joint.ports import Measured
from alphasmith.objectives.joint.rounds.loop import run_rounds
from alphasmith.objectives.joint.rounds.outcome import Round
from alphasmith.objectives.joint.rounds.regularised import train_regularised
from alphasmith.objectives.joint.rounds.settings import RoundsSettings, Updates
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


def row(done: Round, before: int) -> list[str]:
    """One round."""
    ranks = [f"{layer.name} {layer.rank}" for layer in done.layers if layer.rank]
    told = "kept" if done.met else "violated" if done.verdict is not None else done.trouble or "no rank fell"
    return [str(done.number), f"{before / done.numbers:.1f}x", *shown(done.measured), told, ", ".join(ranks)]


def main() -> None:
    """Train, lower, measure, print."""
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=TRAINING.updates.steps, help="updates of the training")
    made.add_argument("--finetune", type=int, default=100, help="updates of a round")
    made.add_argument("--rounds", type=int, default=4, help="most rounds")
    made.add_argument("--energy", type=float, default=0.99, help="share of the squared singular values kept at first")
    made.add_argument("--metric", default="whitened", help="plain, activation or whitened")
    made.add_argument("--norms", default="weight", help="fold or weight")
    given: argparse.Namespace = made.parse_args()
    where = machine()
    make, task = embedded_task(0)
    started = time.process_time()
    noisy = task.measure(nn.Identity(), "study")
    data = time.process_time() - started
    training = replace(TRAINING, updates=replace(TRAINING.updates, steps=given.steps))
    started = time.process_time()
    trained = train_regularised(make(), task, training).model
    seconds = time.process_time() - started
    settings = RoundsSettings(
        energy=given.energy,
        max_rounds=given.rounds,
        metric=given.metric,
        norms=given.norms,
        finetune=Updates(steps=given.finetune, learning_rate=1e-3, batch_size=8),
    )
    started = time.process_time()
    found = run_rounds(trained, task, settings, CONDITION)
    rounds = time.process_time() - started
    before = numbers(trained)
    rows = [
        ["noisy", "", *shown(noisy), "", ""],
        ["trained", "1.0x", *shown(found.start), "", ""],
        *(row(done, before) for done in found.rounds),
    ]
    header = ["round", "fewer numbers", "SI-SDR [dB]", "STOI", "SNR [dB]", "", "ranks"]
    told = (
        f"{before} parameters. Processor seconds: {data:.0f} for the study clips, {seconds:.0f} for {given.steps} updates, "
        f"{rounds:.0f} for the rounds. Ended as `{found.status}` with round {found.kept}; on the test split, touched once: "
    )
    ends = [
        dict(zip(("SI-SDR", "STOI", "SNR"), shown(task.measure(m, "test")), strict=True))
        for m in (trained, found.model)
    ]
    told += "; ".join(
        f"{whose} {', '.join(f'{name} {value}' for name, value in end.items())}"
        for whose, end in zip(("trained", "low rank"), ends, strict=True)
    )
    publish(
        "JOINT_ROUNDS", f"{where}, {torch.get_num_threads()} threads.\n\n{told}.\n\n{table(header, rows)}", given.out
    )


if __name__ == "__main__":
    main()
