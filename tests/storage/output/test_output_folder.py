"""The output folder appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphasmith.objectives.errors import AlphasmithError, InputError, NonFiniteError
from alphasmith.storage.files import durable as files
from alphasmith.storage.files import tensors as artifacts
from alphasmith.storage.files.tensors import read_tensors
from alphasmith.storage.output import output_folder as output
from alphasmith.storage.output.output_folder import OutputFolder


def _tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _fill(folder: OutputFolder) -> None:
    folder.write_json("manifest.json", {"b": 1, "a": [0.5]})
    folder.write_tensors("deep/er/scales.safetensors", {"s": torch.arange(3.0)})
    folder.write_text("report.html", "<p>ü</p>")


def test_everything_is_there_at_the_end_and_nothing_before(tmp_path: Path) -> None:
    out = tmp_path / "new" / "parents" / "out"
    source = tmp_path / "source.txt"
    source.write_text("copied")
    with OutputFolder(out) as folder:
        _fill(folder)
        folder.copy_file(source, "copy.txt")
        (folder.subfolder("smoothed/inner") / "config.json").write_text("{}")
        folder.adopt("smoothed")
        assert not out.exists()
        assert folder.path.parent == out.parent
        written = folder.written
    assert set(_tree(out)) == {
        "manifest.json",
        "deep/er/scales.safetensors",
        "report.html",
        "copy.txt",
        "smoothed/inner/config.json",
    }
    assert [item.path for item in written] == sorted(_tree(out))
    assert all(files.verify_file(out / item.path, item.sha256).bytes == item.bytes for item in written)
    assert torch.equal(read_tensors(out / "deep/er/scales.safetensors")["s"], torch.arange(3.0))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_same_content_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with OutputFolder(tmp_path / name) as folder:
            _fill(folder)
    assert _tree(tmp_path / "a") == _tree(tmp_path / "b")
    assert (tmp_path / "a/manifest.json").read_text() == '{\n  "a": [\n    0.5\n  ],\n  "b": 1\n}\n'


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), InputError("x", "y", "z")])
def test_an_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "new" / "out"

    def work() -> None:
        with OutputFolder(out) as folder:
            _fill(folder)
            raise error

    with pytest.raises(type(error)) as caught:
        work()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_parents_that_others_use_by_now_stay(tmp_path: Path) -> None:
    def work() -> None:
        with OutputFolder(tmp_path / "new" / "out"):
            (tmp_path / "new" / "other").write_text("x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        work()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_used_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = _tree(tmp_path)
    for name in ("file", "full"):
        with pytest.raises(InputError, match="already exists") as caught:
            OutputFolder(tmp_path / name)
        assert caught.value.field == "out"
    assert _tree(tmp_path) == before


def test_empty_folder_and_link_to_one_are_taken(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with OutputFolder(tmp_path / "link") as folder:
        _fill(folder)
    assert (tmp_path / "real" / "manifest.json").is_file()
    assert (tmp_path / "link").is_symlink()


def test_target_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> None:
        with OutputFolder(out) as folder:
            _fill(folder)
            out.mkdir()
            (out / "theirs").write_text("x")

    with pytest.raises(InputError, match="already exists"):
        work()
    assert _tree(tmp_path) == {"out/theirs": b"x"}


def _names_of_others(out: Path) -> list[Path]:
    names = ("backup", "0123abcd", "r-20260101-abcdef-0123abcd", "mine-too", "x.discarded")
    return [out.with_name(f"{out.name}.partial-{name}") for name in names]


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_folders_of_others_are_not_touched(tmp_path: Path, ends: str) -> None:
    out = tmp_path / "out"
    for folder in _names_of_others(out):
        folder.mkdir()
        (folder / "thesis.txt").write_text("not yours")

    def work() -> None:
        with OutputFolder(out, attempt="mine") as folder:
            _fill(folder)
            if ends == "badly":
                raise RuntimeError("boom")

    if ends == "badly":
        with pytest.raises(RuntimeError, match="boom"):
            work()
    else:
        work()
    assert all((folder / "thesis.txt").read_text() == "not yours" for folder in _names_of_others(out))
    assert len(list(tmp_path.iterdir())) == len(_names_of_others(out)) + (ends == "well")


def test_a_folder_of_ones_own_name_that_another_made_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out.partial-mine").mkdir()
    (tmp_path / "out.partial-mine" / "theirs").write_text("x")
    with pytest.raises(InputError, match="not writable"), OutputFolder(tmp_path / "out", attempt="mine"):
        pass
    assert _tree(tmp_path) == {"out.partial-mine/theirs": b"x"}


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _replaced(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _emptied(folder: Path) -> None:
    (folder / "report.html").unlink()


def _added(folder: Path) -> None:
    (folder / "deep" / "theirs").write_text("x")


def _linked(folder: Path) -> None:
    (folder / "theirs").symlink_to(folder / "report.html")


def _changed(folder: Path) -> None:
    (folder / "report.html").write_text("<p>other</p>")


@pytest.mark.parametrize("meddle", [_gone, _replaced, _emptied, _added, _linked, _changed])
@pytest.mark.parametrize("then", ["end", "write", "make", "adopt"])
def test_only_what_was_written_is_published_and_all_of_it(
    tmp_path: Path, meddle: Callable[[Path], None], then: str
) -> None:
    def work() -> None:
        with OutputFolder(tmp_path / "out") as folder:
            _fill(folder)
            meddle(folder.path)
            if then == "write":
                folder.write_text("more", "x")
            elif then == "make":
                folder.subfolder("smoothed")
            elif then == "adopt":
                folder.adopt("deep")

    if (meddle, then) == (_added, "adopt"):
        return  # adopted, it is this process's own
    with pytest.raises(InputError, match=r"removed or replaced|is gone|y nobody|not what was|nothing was written"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_is_refused_leaves_nothing_and_one_that_is_repeated_happens_once(tmp_path: Path) -> None:
    def refuse(_step: Callable[[], None]) -> None:
        raise AlphasmithError("taken over")

    with pytest.raises(AlphasmithError, match="taken over"), OutputFolder(tmp_path / "out", publish=refuse) as folder:
        _fill(folder)
    assert list(tmp_path.iterdir()) == []

    def twice(step: Callable[[], None]) -> None:
        step()
        step()

    with OutputFolder(tmp_path / "out", publish=twice) as folder:
        _fill(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not writable"), OutputFolder(tmp_path / "file" / "out"):
        pass
    assert _tree(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x"])
def test_paths_stay_inside(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match="leaves the output folder"), OutputFolder(tmp_path / "out") as folder:
        folder.write_text(path, "x")


def test_links_are_not_adopted(tmp_path: Path) -> None:
    def work() -> None:
        with OutputFolder(tmp_path / "out") as folder:
            (folder.subfolder("s") / "link").symlink_to("/etc/hostname")
            folder.adopt("s")

    with pytest.raises(InputError, match="symbolic link"):
        work()


def test_nothing_to_adopt(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was written"), OutputFolder(tmp_path / "out") as folder:
        folder.adopt("smoothed")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable file"), OutputFolder(tmp_path / "out") as folder:
        folder.copy_file(tmp_path / "none", "x")


def test_non_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError), OutputFolder(tmp_path / "out") as folder:
        folder.write_json("manifest.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def _fails(code: int) -> Any:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("place", "attribute"),
    [
        (output, "_write_bytes"),
        (artifacts, "_put"),
        (shutil, "copyfile"),
        (output, "sync_file"),
        (output, "sync_folder"),
        (os, "rename"),
    ],
)
@pytest.mark.parametrize(
    ("code", "part"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "not writable")]
)
def test_full_or_locked_device_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, attribute: str, code: int, part: str
) -> None:
    source = tmp_path / "source"
    source.write_text("x")

    def work() -> None:
        with OutputFolder(tmp_path / "new" / "out") as folder:
            _fill(folder)
            folder.copy_file(source, "copy")

    with monkeypatch.context() as patch:
        patch.setattr(place, attribute, _fails(code))
        with pytest.raises(InputError, match=part) as caught:
            work()
    assert caught.value.field == "out"
    assert _tree(tmp_path) == {"source": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_full_device_reported_by_a_foreign_writer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no space left"), OutputFolder(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    elsewhere = OSError(errno.ENOSPC, "No space left on device", "/somewhere/else")
    with pytest.raises(OSError, match="somewhere") as caught, OutputFolder(tmp_path / "out"):
        raise elsewhere
    assert caught.value is elsewhere
    assert list(tmp_path.iterdir()) == []


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
from alphasmith.objectives.errors import InputError
from alphasmith.storage.output.output_folder import OutputFolder

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with OutputFolder(Path(sys.argv[1])) as folder:
        folder.write_text("small.txt", "fits")
        if sys.argv[2] == "tensors":
            folder.write_tensors("w.safetensors", {"w": torch.zeros(1 << 18)})
        else:
            folder.write_text("big.txt", "x" * (1 << 20))
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["tensors", "text"])
def test_real_limit_of_the_system(tmp_path: Path, what: str) -> None:
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "new" / "out"), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("out: no space left"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_is_there_is_not_reported_as_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.sync_folder

    def fail_for_the_parent(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "I/O error")
        real(path)

    monkeypatch.setattr(output, "sync_folder", fail_for_the_parent)
    with OutputFolder(tmp_path / "out") as folder:
        _fill(folder)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_killed_process_leaves_no_target(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from alphasmith.storage.output.output_folder import OutputFolder\n"
        "with OutputFolder(Path(sys.argv[1])) as folder:\n"
        "    folder.write_text('a', 'b')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", code, str(out)], timeout=120, check=False).returncode == -9
    assert not out.exists()
    with OutputFolder(out) as folder:  # what was left behind is in nobody's way
        _fill(folder)
    assert out.is_dir()
