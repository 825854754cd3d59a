"""Saturating products against plain loops, against the processor's own instruction, and through every kind of operator."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alphasmith.objectives.quantization.operator import Execution, OperatorTensors, QuantizedOperator
from alphasmith.objectives.quantization.saturating_pairs import SaturatingPairs
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.sites.types import OperatorKind

_INSTRUCTION = """
#include <immintrin.h>
#include <stdint.h>
void pairs(const uint8_t *u, const int8_t *w, int16_t *out) {
    _mm256_storeu_si256((__m256i *)out,
        _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)u), _mm256_loadu_si256((const __m256i *)w)));
}
"""


def loops(codes: Tensor, weight: Tensor, kernel: int = 1) -> Tensor:
    """(T, O) int64 sums of clipped pairs, in plain Python."""
    channels = weight.shape[1] // kernel
    u, w = codes.view(-1, channels, kernel).tolist(), weight.view(-1, channels, kernel).tolist()
    out = torch.zeros(len(u), len(w), dtype=torch.int64)
    for t, row in enumerate(u):
        for o, column in enumerate(w):
            total = 0
            for k in range(kernel):
                products = [row[c][k] * column[c][k] for c in range(channels)]
                for first in range(0, channels, 2):
                    total += min(max(sum(products[first : first + 2]), -32768), 32767)
            out[t, o] = total
    return out


def drawn(rows: int, columns: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes and weights, most of them near their ends, where pairs saturate."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator)
    weight = torch.randint(-128, 128, (outputs, columns), generator=generator)
    large = torch.rand(outputs, columns, generator=generator) < 0.5
    weight = torch.where(large, torch.where(weight < 0, weight // 8 - 112, weight // 8 + 112), weight)
    return codes, weight.clamp(-128, 127)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 12), st.integers(1, 5), st.sampled_from([1, 2, 3, 9]), st.integers(0, 2**31))
def test_what_is_lost_is_what_plain_loops_lose(rows: int, channels: int, outputs: int, kernel: int, seed: int) -> None:
    codes, weight = drawn(rows, channels * kernel, outputs, seed)
    lost = SaturatingPairs(weight, kernel).lost(codes)
    assert lost.shape == (rows, outputs)
    assert torch.equal(codes @ weight.t() + lost, loops(codes, weight, kernel))


def test_every_pair_of_largest_codes_is_clipped_once() -> None:
    codes, weight = torch.full((2, 7), 255), torch.full((3, 7), 127)
    exact, clipped = 7 * 255 * 127, 3 * 32767 + 255 * 127
    assert (SaturatingPairs(weight).lost(codes) == clipped - exact).all()
    assert (SaturatingPairs(-weight - 1).lost(codes) == 7 * 255 * 128 - 3 * 32768 - 255 * 128).all()


@pytest.mark.parametrize("largest", [64, 63])
def test_weights_of_seven_bits_lose_nothing(largest: int) -> None:
    codes = torch.tensor([[255, 255], [255, 0], [0, 255], [1, 255]])
    weight = torch.tensor([[largest, largest], [-64, -64], [-64, largest]])
    assert not SaturatingPairs(weight).lost(codes).any()


@pytest.fixture(scope="module")
def instruction(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor, Tensor], Tensor]:
    """``vpmaddubsw`` of 32 codes and 32 weights."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if compiler is None or platform.machine() != "x86_64" or "avx2" not in flags:
        pytest.skip("needs a C compiler and an x86 processor with AVX2")
    folder = tmp_path_factory.mktemp("instruction")
    (folder / "pairs.c").write_text(_INSTRUCTION)
    built = folder / "pairs.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-mavx2", "-o", str(built), str(folder / "pairs.c")], check=True
    )
    library = ctypes.CDLL(str(built))

    def pairs(codes: Tensor, weight: Tensor) -> Tensor:
        u, w, out = codes.to(torch.uint8), weight.to(torch.int8), torch.empty(16, dtype=torch.int16)
        library.pairs(*(ctypes.c_void_p(t.data_ptr()) for t in (u, w, out)))
        return out

    return pairs


def test_the_processor_clips_as_we_do(instruction: Callable[[Tensor, Tensor], Tensor]) -> None:
    saturated = 0
    for seed in range(50):
        codes, weight = drawn(1, 32, 1, seed)
        real = instruction(codes[0], weight[0]).long().sum()
        lost = SaturatingPairs(weight).lost(codes)
        assert int(real) == int(codes @ weight.t() + lost)
        saturated += int(lost.any())
    assert saturated > 40


OPERATORS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "linear": (lambda: nn.Linear(7, 5), (2, 3, 7), 1, False),
    "conv1d_of_transformers": (lambda: Conv1D(5, 8), (2, 3, 8), 1, True),
    "conv": (lambda: nn.Conv2d(5, 4, 3, padding=1), (2, 5, 4, 6), 9, False),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2)), (2, 4, 5, 6), 6, False),
    "grouped": (lambda: nn.Conv1d(8, 6, 3, groups=2), (3, 8, 6), 3, False),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), 9, False),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), 3, True),
}


@pytest.mark.parametrize("execution", ["integer", "simulated"])
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "scheme", ["w8a8-channel-static", "w8au8-channel-static", "w8a8-tensor-token", "w8au8-channel-token"]
)
def test_operators_add_what_is_lost(name: str, scheme: str, execution: Execution) -> None:
    """The difference of a saturating operator and an exact one is what an independent product of its codes loses."""
    make, shape, kernel, transposed = OPERATORS[name]
    torch.manual_seed(3)
    inner = make().requires_grad_(False)
    weight = inner.get_parameter("weight")
    weight.copy_(1 + torch.rand_like(weight))
    x = torch.rand(shape) * 2 - 0.2
    kind: OperatorKind = "linear" if kernel == 1 else "conv"
    low, high = (x.amin(), x.amax()) if "static" in scheme else (None, None)
    tensors = OperatorTensors(weight=weight.clone(), low=low, high=high)
    made = {}
    for ending in ("", "-pairs16"):
        torch.manual_seed(3)
        made[ending] = QuantizedOperator.quantize(
            make().requires_grad_(False),
            tensors,
            scheme=Scheme.parse(scheme + ending),
            kind=kind,
            transposed=transposed,
            execution=execution,
        )
        made[ending].inner.load_state_dict({"bias": inner.get_parameter("bias")})
    exact, saturating = made[""], made["-pairs16"]
    difference = saturating(x) - exact(x)
    # A float operator of the same shape counts what pairs lose: on codes one pair of channels at a time, clipped in between.
    scale, zero = exact._grid_of(x)
    signed = (x / scale).round().clamp(-128, 255)
    signed = signed.clamp(-128, 127) if zero is None else (signed + zero).clamp(0, 255) - zero
    codes = exact.integer_weight().float()
    expected = torch.zeros_like(difference)
    twin = make().requires_grad_(False)
    twin.get_parameter("bias").zero_()
    matrix = codes.view(len(codes), -1, kernel)
    for first in range(0, matrix.shape[1], 2):
        for k in range(kernel):
            alone = torch.zeros_like(matrix)
            alone[:, first : first + 2, k] = matrix[:, first : first + 2, k]
            twin.get_parameter("weight").copy_(exact.from_matrix(alone.flatten(1)))
            # What the middle adds is a constant of the weights, padding included: patches hold codes of 0 there.
            middle = (128.0 if zero is None else zero) * _spread(alone.flatten(1).sum(1), difference, kind)
            pair = twin(signed) + middle
            expected += pair.clamp(-32768, 32767) - pair
    expected = expected * scale * _spread(exact.weight_scale.reshape(-1).expand(len(codes)), difference, kind)
    assert name == "depthwise" or bool(expected.any())
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-4 * float(exact(x).abs().max()))


def _spread(values: Tensor, like: Tensor, kind: str) -> Tensor:
    return values if kind == "linear" else values.view(-1, *[1] * (like.dim() - 2))


@pytest.mark.parametrize(
    "name",
    ["w8a8-channel-static-pairs16", "w8au8-tensor-token-pairs16", "w7a8-channel-static", "w4a8-channel-token-pairs16"],
)
def test_names_of_such_schemes_lead_back(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == name
    assert scheme.saturates == (scheme.weights == "int8" and scheme.kernel == "u8s8-pairs16")
