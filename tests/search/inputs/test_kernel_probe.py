"""What libraries compute here, and on a processor without VNNI: oneDNN and OpenVINO let themselves be held to AVX2, ONNX Runtime a copy of itself."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from alphasmith.objectives.literals import Kernel, Target
from alphasmith.objectives.quantization.saturating_pairs import SaturatingPairs
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.inputs import kernel_probe
from alphasmith.search.inputs.kernel_probe import LIBRARIES, Library, kernel_warning, probe, product, serving_kernel
from benchmarks.narrow_runtime import narrow_runtime
from benchmarks.real_folders import AbsentError

_ASKED = """
import json, sys, torch
from alphasmith.objectives.quantization.saturating_pairs import SaturatingPairs
from alphasmith.search.inputs.kernel_probe import probe, product
found = probe(sys.argv[1])
equal = []
for seed, (rows, channels, outputs) in enumerate([(1, 64, 16), (5, 7, 3), (33, 96, 40), (16, 30, 40), (128, 384, 64)]):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, channels), generator=generator)
    weight = torch.randint(-128, 128, (outputs, channels), generator=generator)
    codes[0], weight[0] = 255, 127
    expected = codes @ weight.t() + SaturatingPairs(weight).lost(codes)
    equal.append(torch.equal(product(sys.argv[1], codes.to(torch.uint8), weight.to(torch.int8)), expected))
print(json.dumps({"kernel": found.kernel, "told": found.told, "equal": equal}))
"""


def asked_under(environment: Mapping[str, str], library: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _ASKED, library],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("library", LIBRARIES)
def test_held_to_avx2_a_library_computes_what_is_simulated(library: Library, tmp_path: Path) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("saturating pairs are an instruction of x86")
    if library == "openvino" and find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    if library == "onnxruntime":
        try:
            environment["PYTHONPATH"] = str(narrow_runtime(tmp_path))
        except AbsentError as error:
            pytest.skip(str(error))
    answer = asked_under(environment, library)
    assert answer["kernel"] == "u8s8-pairs16", answer["told"]
    assert answer["equal"] == [True] * 5


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_library_gets_an_answer(library: Library) -> None:
    found = probe(library)
    assert (found.version is None) == ("not installed" in found.told)
    assert found.kernel is None or found.version is not None
    if library == "onednn" and platform.machine() in ("x86_64", "AMD64"):
        assert found.kernel is not None, found.told


@pytest.mark.parametrize("saturating", [False, True])
@pytest.mark.parametrize(("middle", "kernel"), [(0, "exact"), (None, None)])
def test_an_answer_is_recognised(
    saturating: bool, middle: int | None, kernel: Kernel | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_library: Library, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        exact = codes.long() @ weight.long().t()
        lost = SaturatingPairs(weight.long()).lost(codes.long()) if saturating else 0
        return exact + lost + (1 if middle is None else 0)

    monkeypatch.setattr(kernel_probe, "product", answer)
    expected = "u8s8-pairs16" if saturating and kernel else kernel
    assert probe("onednn").kernel == expected


def test_a_library_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such operator\nsecond line")

    monkeypatch.setattr(kernel_probe, "product", broken)
    found = probe("onednn")
    assert found.kernel is None
    assert found.told.startswith("cannot be asked: RuntimeError: no such operator")
    assert "\n" not in found.told


@pytest.mark.parametrize(
    ("scheme", "served", "warned"),
    [
        ("w8a8-channel-static", "u8s8-pairs16", True),
        ("w8a8-channel-static", "exact", False),
        ("w8a8-channel-static-pairs16", "exact", True),
        ("w8a8-channel-static-pairs16", "u8s8-pairs16", False),
        ("w7a8-channel-static", "u8s8-pairs16", False),
        ("w4a8-channel-static", "u8s8-pairs16", False),
        ("w8a16-channel", "u8s8-pairs16", False),
        ("wfp8afp8-channel-static", "u8s8-pairs16", False),
        ("w8a8-channel-static", None, False),
    ],
)
def test_a_run_warns_of_other_products_than_those_served(scheme: str, served: Kernel | None, warned: bool) -> None:
    told = kernel_warning((Scheme.parse(scheme),), "onnxruntime", served)
    assert bool(told) == warned
    assert all(line.startswith("warning: onnxruntime") and "\n" not in line for line in told)


@pytest.mark.parametrize("target", ["any", "tensorrt"])
def test_targets_without_a_processor_are_not_asked(target: Target) -> None:
    assert serving_kernel(target) is None


def test_a_product_has_the_shape_it_should() -> None:
    found = product("onednn", torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(5, 8, dtype=torch.int8))
    assert found.shape == (3, 5)
    assert found.dtype == torch.int64
