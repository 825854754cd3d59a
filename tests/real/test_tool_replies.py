"""Requests to adapters of other tools, and their replies: what is not as agreed on is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch
from benchmarks.tools.adapters.contract import column_factors, linears, read_batches, serve
from benchmarks.tools.catalogue import TOOLS, Tool
from benchmarks.tools.exchange import AdapterError, ask, read_reply, write_request
from tests.support.plain_adapter import smooth
from tests.support.run_cases import saved_llama

CHANNELS = {"fc": 3, "head": 2}
FINE: dict[str, Any] = {
    "format": 1,
    "status": "done",
    "reason": "",
    "wall": 2.0,
    "cpu": 1.0,
    "versions": {"tool": "1"},
    "settings": {},
}


def plain(**settings: Any) -> Tool:
    return Tool(name="plain", environment="none", adapter="tests.support.plain_adapter", settings=settings)


def replied(
    folder: Path,
    scales: Mapping[str, Tensor] | None = None,
    outputs: Mapping[str, Tensor] | None = None,
    **changed: Any,
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "reply.json").write_text(json.dumps({**FINE, **changed}), encoding="utf-8")
    save_file(dict(scales or {"fc": torch.tensor([0.5, 1.0, 4.0])}), folder / "scales.safetensors")
    made = outputs or {"before": torch.tensor([3.0, 4.0]), "after": torch.tensor([3.0, 4.5])}
    save_file(dict(made), folder / "outputs.safetensors")
    return folder


def test_a_reply_is_read_as_it_was_written(tmp_path: Path) -> None:
    reply = read_reply(replied(tmp_path / "reply"), CHANNELS)
    assert reply.scales["fc"].tolist() == [0.5, 1.0, 4.0]
    assert (reply.file.wall, reply.file.cpu, reply.file.versions) == (2.0, 1.0, {"tool": "1"})
    assert reply.change == pytest.approx(0.25 / 25)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"status": "unsupported", "reason": "no such layer"}, "^unsupported: no such layer$"),
        ({"status": "failed", "reason": "lines\nValueError: bad"}, "^failed: ValueError: bad$"),
        ({"status": "fine"}, "^reply.json: status: "),
        ({"format": 2}, "^reply.json: format: "),
        ({"wall": "long"}, "^reply.json: wall: "),
        ({"cpu": float("nan")}, "^reply.json: "),
        ({"more": 1}, "^reply.json: more: "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_reply_that_is_none_is_refused_by_field(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(AdapterError, match=told):
        read_reply(replied(tmp_path / "reply", **changed), CHANNELS)


@pytest.mark.parametrize(
    ("scales", "told"),
    [
        ({"fc": torch.ones(4)}, r"fc has shape \(4,\), not \(3,\)"),
        ({"fc": torch.ones(1, 3)}, r"fc has shape \(1, 3\), not \(3,\)"),
        ({"other": torch.ones(3)}, "no linear 'other'"),
        ({"head": torch.tensor([1.0, 0.0])}, "head holds a scale that is not positive"),
        ({"head": torch.tensor([1.0, float("nan")])}, "head holds a scale that is not positive"),
        ({"head": torch.tensor([1.0, float("inf")])}, "head holds a scale that is not positive"),
    ],
    ids=["too long", "a matrix", "unknown", "zero", "nan", "infinite"],
)
def test_scales_that_fit_nothing_are_refused_by_linear(tmp_path: Path, scales: dict[str, Tensor], told: str) -> None:
    with pytest.raises(AdapterError, match=f"^scales.safetensors: .*{told}"):
        read_reply(replied(tmp_path / "reply", scales), CHANNELS)


def test_a_linear_of_another_name_is_known_by_its_weight(tmp_path: Path) -> None:
    theirs = {"old.fc": "a", "old.head": "b"}
    folder = replied(tmp_path / "reply", {"old.fc": torch.tensor([1.0, 2.0, 3.0])}, weights=theirs)
    assert set(read_reply(folder, CHANNELS, {"fc": "a", "head": "b"}).scales) == {"fc"}
    for ours in ({"fc": "c", "head": "b"}, {"fc": "a", "head": "a"}):
        with pytest.raises(AdapterError, match=r"no linear 'old\.fc'"):
            read_reply(folder, CHANNELS, ours)


def test_files_that_are_spoilt_or_missing_are_named(tmp_path: Path) -> None:
    folder = replied(tmp_path / "reply", outputs={"before": torch.ones(2)})
    with pytest.raises(AdapterError, match=r"^outputs.safetensors has no 'after'"):
        read_reply(folder, CHANNELS)
    (folder / "scales.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(AdapterError, match=r"^scales.safetensors cannot be read"):
        read_reply(folder, CHANNELS)
    (folder / "reply.json").write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match=r"^reply.json: file: "):
        read_reply(folder, CHANNELS)
    (folder / "reply.json").unlink()
    with pytest.raises(AdapterError, match=r"^reply.json cannot be read: No such file"):
        read_reply(folder, CHANNELS)


def test_a_request_holds_every_argument_of_every_batch(tmp_path: Path) -> None:
    batches = [
        Batch(kwargs={"input_ids": torch.arange(n).reshape(1, n), "mask": torch.ones(1, n)}) for n in range(1, 12)
    ]
    write_request(tmp_path / "request", tmp_path, batches, plain(alpha=0.25), 3)
    read = read_batches(tmp_path / "request" / "batches.safetensors")
    assert [set(batch) for batch in read] == [{"input_ids", "mask"}] * 11
    assert [batch["input_ids"].shape[1] for batch in read] == list(range(1, 12)), "in their order, ten behind nine"
    request = json.loads((tmp_path / "request" / "request.json").read_text())
    assert (request["model"], request["settings"], request["threads"]) == (str(tmp_path), {"alpha": 0.25}, 3)


def written(folder: Path, tool: Tool) -> tuple[Path, Path]:
    ids = torch.arange(24).reshape(2, 12) % 20
    write_request(folder / "request", saved_llama(folder / "model"), [Batch(kwargs={"input_ids": ids})], tool, 1)
    return folder / "request", folder / "reply"


def test_an_adapter_that_breaks_down_says_so(tmp_path: Path) -> None:
    tool = Tool(name="none", environment="none", adapter="tests.support.no_such_adapter")
    with pytest.raises(AdapterError, match=r"^its adapter broke down \(exit status 1\): .*No module named"):
        ask(Path(sys.executable), tool, *written(tmp_path, tool), 120)


@pytest.mark.parametrize(
    ("fault", "told"), [("raises", "^failed: ValueError: no scale fits$"), ("unsupported", "^unsupported: it knows no")]
)
def test_what_a_tool_raises_is_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, told: str) -> None:
    request, reply = written(tmp_path, plain(fault=fault))
    monkeypatch.setattr(sys, "argv", ["adapter", str(request), str(reply)])
    serve(smooth)
    with pytest.raises(AdapterError, match=told):
        read_reply(reply, {})


def test_the_factors_of_columns_are_read_back() -> None:
    first = nn.Linear(4, 3)
    model = nn.Sequential(first, nn.Linear(3, 2))
    first.weight.data[:, 2] = 0.0
    before = {name: linear.weight.detach().clone() for name, linear in linears(model).items()}
    first.weight.data *= torch.tensor([0.5, 2.0, 7.0, 1.0])
    factors = column_factors(before, model)
    assert set(factors) == {"0"}, "what stayed as it was is no scale"
    assert torch.allclose(factors["0"], torch.tensor([0.5, 2.0, 1.0, 1.0])), "nothing is known of a column of zeros"
    first.weight.data[1] *= 3.0
    with pytest.raises(ValueError, match="0 changed by more than one factor"):
        column_factors(before, model)


def test_every_tool_has_pinned_requirements_and_an_adapter() -> None:
    for tool in TOOLS:
        lines = [line for line in tool.requirements.read_text().splitlines() if not line.startswith("#")]
        assert "torch==" in lines[0], tool.name
        assert Path(*tool.adapter.split(".")).with_suffix(".py").is_file(), tool.adapter
    assert len({tool.folder_name for tool in TOOLS}) == len(TOOLS)
