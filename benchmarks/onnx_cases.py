"""Models whose ONNX exports are measured: their results, what they are traced with, who judges them, and what they are timed on."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alphasmith.objectives.demo import load_demo
from alphasmith.objectives.media.batch import Batch, main_output
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search import RunConfig, load_quantized, load_smoothed, run
from benchmarks.exports import Case as SmallRun
from benchmarks.exports import result_of
from benchmarks.real_data import WINDOW, image_sets, judged_waves, shared_file, windows
from benchmarks.real_folders import PACKAGES, model_folder
from benchmarks.real_judges import SHORT, Judge, Judged, Measure, make_judge
from benchmarks.real_runs import Request
from benchmarks.shared_models import CASES
from benchmarks.shared_sites import shared_model

SCHEME = "w8a8-channel-static"
#: How a run is made that is only to be exported.
_SMALL = {"trials": 8, "refine": False, "single_alphas": 5}
#: Samples of an example.
_TRACED = 2
#: Lengths of models whose loops over time become as many nodes: tokens, and samples of a waveform.
_STEPS, _WAVE = 32, 16_000
_WARM = 16
_RECURRENT = ("rwkv5_730k", "charlstm_shakespeare")


class RecordedJudge:
    """Relative squared error of what a model answers while a task metric is computed, and the metric.

    Args:
        measure: The metric.
        score: Computes it.
    """

    def __init__(self, measure: Measure, score: Callable[[nn.Module], float]) -> None:
        self.measures = (measure,)
        self._score = score
        self._expected: list[Tensor] = []

    def __call__(self, model: nn.Module) -> Judged:
        """See :class:`~benchmarks.real_judges.Judge`."""
        recorder = _Recorder(model)
        value = torch.tensor([self._score(recorder)])
        self._expected = self._expected or recorder.outputs
        pairs = zip(self._expected, recorder.outputs, strict=True)
        errors = torch.cat([(a - b).double().square().flatten(1).sum(1) for a, b in pairs])
        return Judged(errors, sum(float(v.double().square().sum()) for v in self._expected), (value,))


class _Recorder(nn.Module):
    """Keeps the main output of every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            output = self.model(*args, **kwargs)
        self.outputs.append(main_output(output).clone())
        return output


class Case(ABC):
    """A model, searched in a small way.

    Args:
        name: Of the model.
        work: Where its result is kept.
    """

    #: Samples of the calls that are timed.
    sizes: tuple[int, ...] = (1, 16)

    def __init__(self, name: str, work: Path) -> None:
        self.name = name
        self.work = work / name

    @cached_property
    def result(self) -> Path:
        """The output folder of its run, made where it is not there yet."""
        folder = self.work / "out"
        if not (folder / "manifest.json").is_file():
            self.work.mkdir(parents=True, exist_ok=True)
            self._run(folder)
        return folder

    @abstractmethod
    def _run(self, folder: Path) -> None: ...

    @property
    def architecture(self) -> nn.Module | None:
        """The float model, where the result does not say how to build it."""
        return None

    @property
    def traced(self) -> Batch | None:
        """What it is traced with; None: what the exporter makes."""
        return None

    @abstractmethod
    def judge(self, work: Path) -> Judge:
        """Judges it on data that the run did not see.

        Args:
            work: An empty folder.
        """

    @abstractmethod
    def inputs(self, size: int) -> Batch:
        """As many samples of such data, for a call that is timed."""

    def float_model(self) -> nn.Module:
        """The smoothed one."""
        return load_smoothed(self.result, self.architecture)

    def quantized(self) -> nn.Module:
        """Our module."""
        return load_quantized(self.result, self.architecture)

    def _config(self, folder: Path, **sections: object) -> RunConfig:
        values = {"storage": f"sqlite:///{self.work}/trials.db", "out": str(folder), "search": _SMALL, **sections}
        return RunConfig.build({**values, "scheme": asdict(Scheme.parse(SCHEME))})


class DemoCase(Case):
    """An embedded demo, judged on its test data."""

    @cached_property
    def _demo(self) -> Any:
        return load_demo(self.name)  # type: ignore[arg-type]

    def _run(self, folder: Path) -> None:
        run(self._config(folder, model={"demo": self.name}))

    @property
    def architecture(self) -> nn.Module:
        """That of the demo."""
        found: nn.Module = self._demo.model
        return found

    @property
    def traced(self) -> Batch:
        """Of its calibration data."""
        return _first(self._demo.calibration, _TRACED)

    def judge(self, work: Path) -> Judge:
        """See :class:`Case`."""
        demo = self._demo
        return RecordedJudge(Measure(name=demo.metric_name, higher_is_better=demo.higher_is_better), demo.metric)

    def inputs(self, size: int) -> Batch:
        """Held-out samples."""
        return _first(self._demo.held_out, size)


class SharedCase(Case):
    """A trained model of the shared data folder, judged on its task's data."""

    @property
    def _folder(self) -> Path:
        return shared_file(self.name, "config.json").parent

    @cached_property
    def _loaded(self) -> tuple[nn.Module, list[Any]]:
        return shared_model(self._folder)

    def _run(self, folder: Path) -> None:
        model, batches = self._loaded
        run(self._config(folder), model=model, batches=batches)

    @property
    def architecture(self) -> nn.Module:
        """As the folder has it."""
        return self._loaded[0]

    @property
    def traced(self) -> Batch:
        """Of its calibration data."""
        return self.inputs(_TRACED)

    def judge(self, work: Path) -> Judge:
        """See :class:`Case`."""
        _ = self._loaded
        case = next(c for c in CASES if c.folder == self.name)
        measure = Measure(name=case.metric, higher_is_better=case.higher_is_better)
        if self.name in _RECURRENT:
            measure = Measure(name="bits per token", higher_is_better=False)
            ids = self._last_tokens(64)
            return RecordedJudge(measure, lambda model: _bits(model, ids))
        if self.name.startswith("dtln"):
            measure = Measure(name="SI-SDR of seconds [dB]", higher_is_better=True)
            clean, noisy = self._seconds()
            return RecordedJudge(measure, lambda model: _improved(model, clean, noisy))
        folder = str(self._folder)
        return RecordedJudge(measure, lambda model: float(_zoo().evaluate(folder, model=model)[case.metric]))

    def inputs(self, size: int) -> Batch:
        """Of its calibration data, cut where the length is that of the example."""
        if self.name in _RECURRENT:
            return Batch(args=(self._last_tokens(size)[:, :-1],))
        if self.name.startswith("dtln"):
            return Batch(args=(self._seconds()[1][:size],))
        rows = [row for (x,) in self._loaded[1] for row in x]
        length = min(len(row) for row in rows[:size]) if rows[0].dim() == 1 and rows[0].dtype == torch.int64 else None
        return Batch(args=(torch.stack([row[:length] for row in rows[:size]]),))

    def _last_tokens(self, count: int) -> Tensor:
        """(count, _STEPS + 1) of a text that did not calibrate."""
        context = _zoo().context(str(self._folder))
        if self.name == "rwkv5_730k":
            found: Tensor = _zoo().Rwkv.ids(context, "wikitext2_test.txt", 64, _STEPS + 1)
        else:
            found = _zoo().Chars.ids(context)[-64 * (_STEPS + 1) :].view(64, _STEPS + 1)
        return found[:count]

    def _seconds(self) -> tuple[Tensor, Tensor]:
        """(N, _WAVE) clean and noisy speech."""
        pairs = [pair[1:] for pair in _zoo().speech_pairs(_zoo().context(str(self._folder)))]
        cut = [tuple(w[: len(w) // _WAVE * _WAVE].view(-1, _WAVE) for w in pair) for pair in pairs]
        clean, noisy = (torch.cat(parts) for parts in zip(*cut, strict=True))
        loud = clean.square().mean(1) > 1e-5  # of silence, no ratio says anything
        return clean[loud], noisy[loud]


class RealCase(Case):
    """A pretrained model out of a package, judged on the data of benchmarks/real_models.py.

    Args:
        package: Its name.
        work: Where its result is kept.
        home: Where models are kept.
        untied: With a weight of its own for the layer of the logits, which then is quantized, too.
    """

    def __init__(self, package: str, work: Path, home: Path, *, untied: bool = False) -> None:
        super().__init__(f"{package}-untied" if untied else package, work)
        self._package, self._tied_home, self._untied = package, home, untied
        if package in ("SmolLM2", "Whisper"):
            self.sizes = (1, 4)

    @cached_property
    def _home(self) -> Path:
        """Where the model is."""
        if not self._untied:
            return self._tied_home
        home = self.work / "home"
        if not (home / self._package / "config.json").is_file():
            untie(model_folder(self._package, self._tied_home), home / self._package)
        return home

    @cached_property
    def result(self) -> Path:
        """See :class:`Case`."""
        request = Request(model=self._package, scheme=SCHEME, seed=0, short=True, sweep=False, home=self._home)
        return result_of(SmallRun(request=request, unsmoothed=True, work=self.work))

    def _run(self, folder: Path) -> None:
        raise NotImplementedError

    @property
    def traced(self) -> Batch | None:
        """Images of the size that it is judged on; of others, what the exporter makes."""
        return self.inputs(_TRACED) if self._package == "DINOv2" else None

    def judge(self, work: Path) -> Judge:
        """See :class:`Case`."""
        return make_judge(self._package, model_folder(self._package, self._home), SHORT, work)

    def inputs(self, size: int) -> Batch:
        """Windows of a text, images, or clips with as many tokens of a transcript."""
        from transformers import AutoTokenizer, WhisperFeatureExtractor

        if self._package == "DINOv2":
            return Batch(kwargs={"pixel_values": image_sets()[1].pixels[:size]})
        folder = model_folder(self._package, self._home)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ids = windows(tokenizer, "wikitext2_test.txt", limit=40_000)[:size]
        if self._package != "Whisper":
            return Batch(kwargs={"input_ids": ids})
        extractor: Any = WhisperFeatureExtractor.from_pretrained(folder)
        heard = [extractor(wave, sampling_rate=16_000, return_tensors="pt") for wave in judged_waves(size)]
        features = torch.cat([one.input_features for one in heard])
        return Batch(kwargs={"input_features": features, "decoder_input_ids": ids[:, : WINDOW // 4]})


def cases(work: Path, home: Path) -> dict[str, Case]:
    """All of them, by name.

    Args:
        work: Where results are kept.
        home: Where models of packages are kept.
    """
    found: list[Case] = [DemoCase(name, work) for name in ("image", "text")]
    found += [SharedCase(case.folder, work) for case in CASES]
    found += [RealCase(package.name, work, home) for package in PACKAGES]
    found.append(RealCase("SmolLM2", work, home, untied=True))
    return {case.name: case for case in found}


def untie(source: Path, target: Path) -> None:
    """Save a causal language model with a weight of its own for the layer of the logits.

    Args:
        source: A folder of transformers.
        target: Another, made.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(target)


def _zoo() -> Any:
    """Metrics of the shared models; :func:`shared_model` makes their folder one that modules are imported from."""
    return importlib.import_module("zoo_eval")


def _first(batches: Sequence[Batch], count: int) -> Batch:
    """The first samples of several batches."""
    kept = list(batches)
    args = tuple(torch.cat(parts)[:count] for parts in zip(*(b.args for b in kept), strict=True))
    kwargs = {name: torch.cat([b.kwargs[name] for b in kept])[:count] for name in kept[0].kwargs}
    return Batch(args=args, kwargs=kwargs)


def _bits(model: nn.Module, ids: Tensor) -> float:
    """Bits of a token, after those that warm the state up."""
    logits = main_output(model(ids[:, :-1]))[:, _WARM:]
    return cross_entropy(logits.flatten(0, 1), ids[:, _WARM + 1 :].flatten()).item() / math.log(2)


def _improved(model: nn.Module, clean: Tensor, noisy: Tensor) -> float:
    made = torch.cat([model(part) for part in noisy.split(16)])
    return float(sum(_zoo().si_sdr(a, b) for a, b in zip(clean, made, strict=True)) / len(clean))
