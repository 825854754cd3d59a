"""Patches times weight is the convolution: every geometry against torch's own kernels."""

from __future__ import annotations

import math
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from alphasmith.objectives.calibration.patches import (
    ConvolutionTap,
    Window,
    conv_window,
    gather_patches,
    kept_positions,
    transposed_window,
)
from alphasmith.objectives.calibration.weight_matrix import as_matrix
from alphasmith.objectives.errors import InputError

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), n=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), word=st.sampled_from(["", "same", "valid"])
)
def test_patches_times_weight_is_the_convolution(data: st.DataObject, n: int, groups: int, word: str) -> None:
    def per_dimension(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.tuples(*[st.integers(low, high)] * n)))

    kernel, dilation = per_dimension(1, 3), per_dimension(1, 2)
    stride = (1,) * n if word == "same" else per_dimension(1, 3)
    padding = word or per_dimension(0, 2)
    spatial = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, per_dimension(0, 3), strict=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(2, 4, *spatial, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n]
    expected = convolution(x, weight, None, stride, padding, dilation, groups)

    window = conv_window(kernel, stride, padding, dilation)
    assert window.output_size(spatial) == tuple(expected.shape[2:])
    rows = expected.movedim(1, -1).reshape(-1, 8)
    positions = torch.randperm(rows.shape[0], generator=generator)[: max(1, rows.shape[0] // 2)]
    patches = gather_patches(x, window, positions).reshape(len(positions), groups, -1)
    blocks = weight.flatten(1).reshape(groups, 8 // groups, -1)
    torch.testing.assert_close(torch.einsum("pgd,god->pgo", patches, blocks).flatten(1), rows[positions])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]))
def test_patches_times_weight_is_the_transposed_convolution(data: st.DataObject, n: int, groups: int) -> None:
    def per_dimension(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.tuples(*[st.integers(low, high)] * n)))

    kernel, dilation, stride, padding = (
        per_dimension(1, 3),
        per_dimension(1, 2),
        per_dimension(1, 3),
        per_dimension(0, 2),
    )
    more = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    spatial = tuple(2 * p + 1 + extra for p, extra in zip(padding, per_dimension(0, 3), strict=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(2, 4, *spatial, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 8 // groups, *kernel, generator=generator, dtype=torch.float64)
    convolution = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[n]
    seen: list[tuple[torch.Tensor, Window]] = []
    with ConvolutionTap(weight, lambda *call: seen.append(call)):
        expected = convolution(x, weight, None, stride, padding, more, groups, dilation)
    ((read, window),) = seen
    assert window == transposed_window(kernel, stride, padding, more, dilation)
    assert torch.equal(read, x)
    assert window.output_size(spatial) == tuple(expected.shape[2:])
    rows = expected.movedim(1, -1).reshape(-1, 8)
    positions = torch.randperm(rows.shape[0], generator=generator)[: max(1, rows.shape[0] // 2)]
    patches = gather_patches(x, window, positions).reshape(len(positions), groups, -1)
    blocks = as_matrix(weight, "conv", True, groups).reshape(groups, 8 // groups, -1)
    torch.testing.assert_close(torch.einsum("pgd,god->pgo", patches, blocks).flatten(1), rows[positions])


def test_patches_stand_in_the_order_of_unfold() -> None:
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    window = conv_window((3, 2), 2, 1, 1)
    columns = F.unfold(x, (3, 2), padding=1, stride=2)
    total = 2 * math.prod(window.output_size((6, 5)))
    patches = gather_patches(x, window, torch.arange(total))
    assert torch.equal(patches, columns.transpose(1, 2).reshape(total, -1))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("mode", get_args(PaddingMode))
def test_the_tap_shows_what_the_convolution_reads(n: int, mode: PaddingMode) -> None:
    module = CONVOLUTIONS[n](2, 3, 3, padding=1, padding_mode=mode, bias=False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, *(5,) * n, generator=generator)
    seen: list[tuple[torch.Tensor, Window]] = []
    with torch.no_grad(), ConvolutionTap(module.weight, lambda *call: seen.append(call)):
        expected = module(x)
        CONVOLUTIONS[n](2, 3, 3)(x)  # another weight
        alone = module(x[0])
    assert len(seen) == 2
    read, window = seen[0]
    patches = gather_patches(read, window, torch.arange(2 * 5**n))
    found = (patches @ module.weight.detach().flatten(1).T).reshape(2, *(5,) * n, 3).movedim(-1, 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(expected[0], alone)
    assert seen[1][0].shape == (1, *read.shape[1:])


def test_kept_positions_follow_the_middle_of_the_kernel() -> None:
    mask = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])
    same = conv_window((3,), 1, 1, 1)
    assert torch.equal(kept_positions(mask, same), mask)
    strided = conv_window((3,), 2, 1, 1)
    assert kept_positions(mask, strided).tolist() == [[True, True, True, False], [True] * 4]
    doubled = transposed_window((2,), 2, 0, 0, 1)
    assert kept_positions(mask, doubled).tolist() == [[True] * 12 + [False] * 4, [True] * 16]
    image = torch.zeros(1, 4, 4, dtype=torch.bool)
    image[:, :2, :3] = True
    assert torch.equal(kept_positions(image, conv_window((3, 3), 1, 1, 1)), image)


def test_bad_positions_and_words_are_refused() -> None:
    x = torch.zeros(1, 1, 4)
    window = conv_window((3,), 1, 0, 1)
    assert gather_patches(x, window, torch.empty(0, dtype=torch.int64)).shape == (0, 3)
    for positions in ([2], [-1]):
        with pytest.raises(InputError, match="positions"):
            gather_patches(x, window, torch.tensor(positions))
    with pytest.raises(InputError, match="does not fit"):
        gather_patches(x[None], window, torch.tensor([0]))
    with pytest.raises(InputError, match="padding"):
        conv_window((3,), 1, "full", 1)
