"""Scales of other tools in our evaluator: what it makes of them, end to end with an adapter in a process of its own, and the rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from alphasmith.objectives.quantization.candidate_model import CandidateModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import Smoothing
from benchmarks.real_judges import Judged, Measure
from benchmarks.real_runs import Request
from benchmarks.tools.__main__ import main
from benchmarks.tools.adapters.contract import read_batches
from benchmarks.tools.catalogue import Tool
from benchmarks.tools.comparing import Setting, keep, row_of
from benchmarks.tools.exchange import AdapterError, ask, read_reply, write_request
from benchmarks.tools.scoring import Bench, smoothings_of, split_ranges, split_site
from benchmarks.tools.tables import OURS, Comparison, Row, text, verdict
from tests.support.quantized_models import block_example
from tests.support.run_cases import saved_llama, settings

PLAIN = Tool(name="plain", environment="none", adapter="tests.support.plain_adapter")
IDS = torch.randint(20, (24, 12), generator=torch.Generator().manual_seed(0))


class LogitsJudge:
    """Output loss of logits on windows."""

    measures = (Measure(name="mean logit", higher_is_better=False),)

    def __init__(self) -> None:
        self._reference: torch.Tensor | None = None

    def __call__(self, model: nn.Module) -> Judged:
        with torch.no_grad():
            logits = model(input_ids=IDS[:8]).logits
        reference = self._reference = logits if self._reference is None else self._reference
        errors = (logits - reference).double().square().flatten(1).sum(1)
        return Judged(errors, float(reference.double().square().sum()), (logits.mean((1, 2)),))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    values = {"model": {"path": saved_llama(folder / "model")}, "data": {"samples": 12, "held_out": 8}}
    return Bench(settings(folder, values), [{"input_ids": part} for part in IDS.split(4)], LogitsJudge())


def test_an_operator_alone_makes_of_its_scales_what_its_site_makes() -> None:
    example = block_example()
    # Powers of two divide without rounding, so both forms must agree to the last bit but for the order of sums.
    powers = {
        name: Smoothing(scales=torch.exp2(smoothing.scales.log2().round()))
        for name, smoothing in example.smoothings.items()
    }
    plain = CandidateModel(example.model, example.sites, example.ranges, Scheme())
    with plain.applied(powers) as model:
        folded = [model(*batch.args) for batch in example.batches]
    parts = [part for site in example.sites for part in split_site(site)]
    scales = {
        operator.name: powers[site.name].scales
        for site in example.sites
        if site.name in powers
        for operator in site.operators
    }
    smoothings, unused = smoothings_of(scales, parts)
    assert not unused
    alone = CandidateModel(example.model, parts, split_ranges(example.sites, example.ranges), Scheme())
    with alone.applied(smoothings) as model:
        for batch, wanted in zip(example.batches, folded, strict=True):
            torch.testing.assert_close(model(*batch.args), wanted, rtol=1e-5, atol=1e-5)


def test_operators_of_one_site_may_have_different_scales() -> None:
    example = block_example()
    parts = {part.name: part for site in example.sites for part in split_site(site)}
    assert {"q", "k", "down", "out", "head"} == set(parts)
    assert all(len(part.operators) == 1 and not part.producers for part in parts.values())
    smoothings, unused = smoothings_of(
        {"q": torch.ones(9), "k": torch.full((9,), 2.0), "norm": torch.ones(9)}, list(parts.values())
    )
    assert (set(smoothings), unused) == ({"q", "k"}, ("norm",))


def test_a_tool_is_scored_end_to_end(bench: Bench, tmp_path: Path) -> None:
    request, reply = tmp_path / "request", tmp_path / "reply"
    write_request(request, bench.folder, bench.batches, PLAIN, 1)
    ask(Path(sys.executable), PLAIN, request, reply, 120)
    read = read_reply(reply, bench.channels)
    assert 0 <= read.change < 1e-9, "its smoothed float model is the float model"
    assert read.file.cpu > 0
    asked = read_batches(request / "batches.safetensors")[0]
    scored = bench.score(read, asked)
    assert 0 < scored.judged.loss < 0.1
    assert scored.linears == len(bench.channels)
    assert scored.loaded < 1e-9, "it read our model"
    setting = Setting(environments=tmp_path, work=tmp_path, threads=1, resume=True, patience=1.0)
    row = row_of(PLAIN, reply.parent, bench, setting, {})
    assert row.judged is not None
    assert row.judged.loss == scored.judged.loss, "a reply that is there is taken"
    other = read_reply(reply, bench.channels)
    with pytest.raises(AdapterError, match=r"^its float model is not ours: "):
        bench.score(
            type(other)(scales=other.scales, before=other.before * 2, after=other.after * 2, file=other.file), asked
        )
    with pytest.raises(AdapterError, match=r"^its smoothed float model is not the float model: "):
        bench.score(
            type(other)(scales=other.scales, before=other.before, after=other.after * 2, file=other.file), asked
        )


def test_tools_get_all_samples_and_short_batches_first(bench: Bench) -> None:
    assert [batch.size for batch in bench.batches] == [4] * 6
    ids = torch.cat([batch.kwargs["input_ids"] for batch in bench.batches])
    assert torch.equal(ids, IDS), "as the run is given them"


def test_the_sweep_judges_the_alpha_it_chose(bench: Bench) -> None:
    swept = bench.sweep()
    assert 0.5 <= swept.alpha <= 0.95
    assert 0 < swept.judged.loss < 0.1
    assert swept.cpu > 0


def test_a_tool_that_does_not_install_is_a_row(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setattr(Tool, "requirements", blocked)
    setting = Setting(environments=blocked, work=tmp_path, threads=1, resume=False, patience=1.0)
    row = row_of(PLAIN, tmp_path / "place", bench, setting, {})
    assert row.judged is None
    assert row.note.startswith("not installed: ")


NOISE = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def judged(level: float) -> Judged:
    return Judged(level + NOISE, 100.0, (level + NOISE,))


def comparison(**levels: float) -> Comparison:
    rows = [Row(name=name, judged=judged(level), cpu=3.25, wall=4.0, change=1e-12) for name, level in levels.items()]
    return Comparison(
        model="MiniLM",
        scheme="w8a8-channel-static",
        loss="relative squared error",
        measures=(Measure(name="perplexity", higher_is_better=False),),
        float_model=judged(0.0),
        rows=(*rows, Row(name="broken", note="not installed: no wheel"), Row(name=OURS, judged=judged(2.0))),
        versions={"tool": "1.2"},
        where="Machine: any.",
    )


def test_without_a_run_tools_are_judged_alone(bench: Bench) -> None:
    none, half = bench.judged_at(None), bench.judged_at(0.5)
    assert half.loss < none.loss, "the channels of the model are loud"
    made = comparison(tool=1.5)
    alone = Comparison(**{**vars(made), "rows": made.rows[:-1]})
    assert "No run of Alphasmith" in verdict(alone)
    assert not list(alone.better())
    assert "%" not in text([alone], [])


def test_what_was_made_is_shown_again_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["tools", "--models", "MiniLM", "SmolLM2", "--tables", "--check", "--work", str(tmp_path), "--home", "home"]
    monkeypatch.setattr(sys, "argv", given)
    assert main() == 1
    assert "nothing was run: MiniLM w8a8-channel-static, seed 0; SmolLM2" in capsys.readouterr().out
    request = Request(
        model="MiniLM", scheme="w8a8-channel-static", seed=0, short=False, sweep=False, home=Path("home").resolve()
    )
    for tool, status in ((2.5, 0), (1.5, 1)):
        keep(comparison(tool=tool), request, tmp_path)
        assert main() == status, "a contestant below ours on one model of one fails the check"
        assert "Not run: SmolLM2 w8a8-channel-static, seed 0." in capsys.readouterr().out


def test_a_contestant_below_ours_is_named() -> None:
    better = comparison(tool=1.5, other=2.5)
    assert [row.name for row in better.better()] == ["tool"]
    assert verdict(better).endswith(": tool.")
    assert "none of the 2 is below" in verdict(comparison(tool=2.0, other=2.5)), "equal is not below"


def test_what_lies_within_the_scatter_is_not_below() -> None:
    swing = torch.tensor([0.9, -1.0] * 20, dtype=torch.float64)  # below on average, by less than it scatters
    made = comparison()
    ours = judged(2.0)
    scattered = Judged(ours.errors + swing, 100.0, ours.values)
    rows = (Row(name="tool", judged=scattered), *made.rows)
    assert scattered.loss < ours.loss
    assert not list(Comparison(**{**vars(made), "rows": rows}).better())


def test_a_table_has_a_line_for_every_contestant() -> None:
    shown = text([comparison(tool=3.0)], ["SmolLM2: nothing is here"])
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 3
    assert "| broken | - |" in shown
    assert "not installed: no wheel |" in shown
    loss = (3.0 - 2.0) * 40 / float((2.0 + NOISE).sum())
    assert f"{loss:+.0%} ± 0%" in shown
    assert "Tools: tool 1.2." in shown
    assert shown.startswith("Machine: any.\n")
    assert "Not run: SmolLM2: nothing is here." in shown
