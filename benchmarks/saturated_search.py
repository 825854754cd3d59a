"""Searched runs for exact products and for products that saturate, judged where they saturate on samples that no run saw.

What ``benchmarks.saturation`` prints beside its sweep of one alpha. The runs are small ones with the default stages of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.demo import load_demo
from alphasmith.objectives.judge.answers import loss_of_answers
from alphasmith.objectives.judge.candidate_batch import paired_difference
from alphasmith.objectives.literals import Kernel
from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.objectives.quantization.scheme import WeightFormat
from alphasmith.search import RunConfig, load_quantized, run
from benchmarks.real_folders import model_folder
from benchmarks.real_judges import SHORT, Judge, Judged, Measure, References, make_judge
from benchmarks.real_runs import Request, configured

#: How small a run is; what it does beside trials is the default.
_SEARCH: Mapping[str, Any] = {"trials": 10, "rows": 512, "single_alphas": 9}
_FORMATS = ("int8-static", "int7-weights")
_PAIRS: Kernel = "u8s8-pairs16"
HEADER = (
    *(
        "model",
        "loss",
        "search for exact products: told",
        "served",
        "one alpha for the kernel",
        "search for the kernel",
    ),
    *("with 7 bits where they win", "operators at 7 bits", "search with 7 bits everywhere"),
    "saved of what is served: search, 7 bits where they win, everywhere",
)


class DemoJudge:
    """Judges models on the test data of a demo, see ``real_judges.Judge``; the loss at the output alone.

    Args:
        name: Of the demo.
        folder: Where the float model's answers are kept; made.
    """

    measures: tuple[Measure, ...] = ()

    def __init__(self, name: str, folder: Path) -> None:
        demo = load_demo("image" if name == "image" else "text", seed=0)
        seen = _Seen(demo.model)
        demo.metric(seen)
        self._batches = seen.batches
        self._references = References(folder, loss_of_answers(demo.model, self._batches[0]))
        self(demo.model)

    def __call__(self, model: nn.Module) -> Judged:
        """See ``real_judges.Judge``."""
        errors = []
        for index, batch in enumerate(self._batches):
            with torch.no_grad():
                output = main_output(call(model, batch))
            errors.append(self._references.errors(index, output if output.dim() > 2 else output.unsqueeze(1)))
        self._references.complete = True
        return Judged(torch.cat(errors), self._references.energy, ())


class _Seen(nn.Module):
    """A model that remembers what it was called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self.batches = model, list[Batch]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(Batch(args=args, kwargs=kwargs))
        return self._model(*args, **kwargs)


def judge_of(model: str, home: Path, work: Path) -> Judge:
    """A judge of a demo or a real model that knows the float model.

    Args:
        model: Its name.
        home: Where real models are kept.
        work: An empty folder for the float model's answers.

    Raises:
        AbsentError: Model or data are not here.
    """
    if model in ("image", "text"):
        return DemoJudge(model, work / "references")
    from transformers import AutoModel

    folder = model_folder(model, home)
    judge = make_judge(model, folder, SHORT, work)
    judge(AutoModel.from_pretrained(folder).eval())
    return judge


def configuration(model: str, home: Path, work: Path) -> tuple[RunConfig, Sequence[object] | None]:
    """Configuration and batches of runs of a model.

    Args:
        model: Its name.
        home: Where real models are kept.
        work: Folder for what is written.
    """
    if model in ("image", "text"):
        return RunConfig.build({"model": {"demo": model}, "storage": f"sqlite:///{work}/trials.db"}), None
    request = Request(model=model, scheme="w8a8-channel-static", seed=0, short=True, sweep=False, home=home)
    config, batches = configured(request, model_folder(model, home), work)
    values = config.model_dump()
    values["data"] = {n: v for n, v in values["data"].items() if n not in ("metric_name", "metric_goal")}
    return RunConfig.build(values), batches


def found(
    config: RunConfig,
    batches: Sequence[object] | None,
    out: Path,
    *,
    kernel: Kernel,
    formats: Sequence[str] = (),
    weights: WeightFormat = "int8",
) -> Path:
    """The output folder of a small run for a kernel; one that is there is taken.

    Args:
        config: Of the run.
        batches: Its data, where they are given in memory.
        out: The folder.
        kernel: What products are taken for.
        formats: Formats that sites may have.
        weights: Format of the weights.
    """
    if not (out / "manifest.json").is_file():
        values = config.model_dump()
        values["out"] = str(out)
        values["scheme"] |= {"kernel": kernel, "weights": weights}
        values["sites"]["formats"] = list(formats)
        values["search"] |= _SEARCH
        run(RunConfig.build(values), batches=batches)
    return out


def runs(config: RunConfig, batches: Sequence[object] | None, work: Path) -> tuple[Path, Path, Path, Path]:
    """Runs for exact products, for those that saturate, for these with weights of 7 bits where they win, and with 7 bits everywhere.

    Args:
        config: Of the runs.
        batches: Their data, where they are given in memory.
        work: Folder for what they write.
    """
    return (
        found(config, batches, work / "exact", kernel="exact"),
        found(config, batches, work / "pairs", kernel=_PAIRS),
        found(config, batches, work / "mixed", kernel=_PAIRS, formats=_FORMATS),
        found(config, batches, work / "seven", kernel="exact", weights="int7"),
    )


def served(out: Path, kernel: Kernel) -> nn.Module:
    """The quantized model of a run as a kernel computes it, whatever the run took products for.

    Args:
        out: Its output folder.
        kernel: Of the processor.
    """
    model = load_quantized(out)
    for module in model.modules():
        if isinstance(module, QuantizedOperator) and module.scheme.byte_operands:
            module.scheme = replace(module.scheme, kernel=kernel)
    return model


def row(model: str, judge: Judge, runs: Sequence[Path], one_alpha: Judged, loss: str) -> list[str]:
    """A line of the table.

    Args:
        model: Its name.
        judge: On unseen samples.
        runs: Output folders, see :func:`runs`.
        one_alpha: The model under the best single alpha for the kernel.
        loss: Name of the loss at the output.
    """
    exact, aware, mixed, seven = runs
    told, here = judge(served(exact, "exact")), judge(served(exact, _PAIRS))
    chosen = served(mixed, _PAIRS)
    alone, formats, everywhere = judge(served(aware, _PAIRS)), judge(chosen), judge(served(seven, _PAIRS))
    operators = [m for m in chosen.modules() if isinstance(m, QuantizedOperator)]
    count = sum(m.scheme.weights == "int7" for m in operators)
    losses = [f"{judged.loss:.5f}" for judged in (told, here, one_alpha, alone, formats)]
    gains = ", ".join(_gain(here, judged) for judged in (alone, formats, everywhere))
    return [model, loss, *losses, f"{count} of {len(operators)}", f"{everywhere.loss:.5f}", gains]


def _gain(before: Judged, after: Judged) -> str:
    difference, error = paired_difference(before.errors, after.errors, before.energy)
    return f"{difference / before.loss:.0%} (+- {error / before.loss:.0%})"
