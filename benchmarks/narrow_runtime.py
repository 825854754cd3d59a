"""A command as on an x86 processor without AVX-512: torch, oneDNN, OpenVINO and ONNX Runtime take no other kernels than those of AVX2.

    python -m benchmarks.narrow_runtime FOLDER python -m benchmarks.onnx_export ...

torch and oneDNN, which OpenVINO uses too, have variables for that. ONNX Runtime chooses its kernels when it is loaded and has none: the command gets a copy
of it, which is made in the folder. Software may use AVX-512 where XGETBV says that the operating system keeps its registers; in the copy, the three
bytes of that instruction are those of two others that answer as a system without it does. What is computed, saturation included, is what
such a processor computes; times are those of its kernels on this one. OpenVINO asks for AVX-512 itself, too, and so refuses models with more than
products (a softmax, a pooling) when oneDNN has none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.real_folders import AbsentError
from benchmarks.timing import KERNELS_VARIABLE

_PACKAGE = "onnxruntime"
#: xor ecx, ecx; xgetbv: the answer, in eax, is the state that the operating system keeps.
_ASKED = bytes.fromhex("31c9 0f01d0")
#: xor ecx, ecx; push 7; pop rax: registers of the x87, of SSE and of AVX.
_ANSWERED = bytes.fromhex("31c9 6a0758")
_USED = "import onnxruntime; print(onnxruntime.__file__)"


def narrow_runtime(target: Path) -> Path:
    """Copy the installed ONNX Runtime, made once.

    Args:
        target: Folder for the copy, which shadows the installed package where it stands in ``PYTHONPATH``.

    Raises:
        AbsentError: It is not installed, not of Linux on x86-64, asks in another way, or the processor has AVX-VNNI, which needs no AVX-512.
    """
    copy = target / _PACKAGE
    if copy.is_dir():
        return target
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise AbsentError("onnxruntime is not installed")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise AbsentError("kernels of AVX2 alone need Linux on x86-64")
    if "avx_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        raise AbsentError("this processor has AVX-VNNI: its kernels are not those of AVX2 alone")
    installed = Path(next(iter(found.submodule_search_locations)))
    library = next(iter(sorted((installed / "capi").glob("onnxruntime_pybind11_state*.so"))), None)
    code = library.read_bytes() if library else b""
    if library is None or _ASKED not in code:
        raise AbsentError("this onnxruntime does not ask for AVX-512 as the one that was looked at does")
    half = target / "unfinished"
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(installed, half)
    (half / library.relative_to(installed)).write_bytes(code.replace(_ASKED, _ANSWERED))
    half.rename(copy)
    return target


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the copy is, or becomes one")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    target = str(narrow_runtime(given.folder.resolve()))
    path = os.pathsep.join([target, *filter(None, [os.environ.get("PYTHONPATH")])])
    narrow = {**os.environ, "PYTHONPATH": path, KERNELS_VARIABLE: "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    used = subprocess.run([sys.executable, "-c", _USED], check=True, capture_output=True, text=True, env=narrow)
    if not Path(used.stdout.strip()).is_relative_to(target):
        sys.exit(f"{target} in PYTHONPATH does not come before the installed onnxruntime")
    return subprocess.run(given.command, check=False, env=narrow).returncode


if __name__ == "__main__":
    sys.exit(main())
