"""Traced graphs: sizes that are computed, and which axes may have any size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch
from tests.support.onnx_runtime import CLOSE, difference, memory_session

ir = pytest.importorskip("onnx_ir", reason="needs pip install 'alphasmith[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'alphasmith[onnx]'")

from alphasmith.search.exports.onnx._tracing import trace


class Divided(nn.Module):
    """Sizes divided downwards: a number below 0 too."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L and more)."""
        size = x.shape[-1]
        whole = -(-size // 3) * 3
        return nn.functional.pad(x, (0, whole - size + (size - 20) // 4 + 9))


def test_sizes_are_divided_downwards() -> None:
    made = trace(Divided(), Batch(args=(torch.ones(2, 3, 17),))).model
    opened = memory_session(ir.to_proto(made).SerializeToString())
    for size in range(5, 30):
        x = torch.ones(1, 3, size)
        assert opened.run(None, {"x": x.numpy()})[0].shape == Divided()(x).shape, size


class Heard(nn.Module):
    """A loop over the frames of a waveform, of which there are as many as its length says; what is learned of it is added to a text."""

    def forward(self, wave: Tensor, text: Tensor) -> Tensor:
        """(B, L), (B, T) -> (B, T)."""
        state = wave.new_zeros(wave.shape[0])
        frames = nn.functional.pad(wave, (0, -wave.shape[1] % 4)).unfold(1, 8, 4)
        for number in range(frames.shape[1]):
            state = torch.tanh(frames[:, number].sum(1) + state / 2)
        return text + state[:, None]


class Tiled(nn.Module):
    """Takes lengths that are multiples of 4, and more than those by 1, alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, L), (B, N) -> (B, L / 4)."""
        if y.shape[1] % 4 != 1:
            raise ValueError("the length is no multiple of 4 and 1")
        return x.reshape(x.shape[0], x.shape[1] // 4, 4).sum(2) + y.sum(1, keepdim=True)


def test_a_loop_over_frames_holds_a_length_and_nothing_else() -> None:
    wave, text = torch.randn(3, 30, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 5)
    made = trace(Heard(), Batch(args=(wave[:2], text[:2])))
    assert made.dynamic == {"wave": ("batch",), "text": ("batch", "length")}
    opened = memory_session(ir.to_proto(made.model).SerializeToString())
    assert opened.get_inputs()[0].shape == ["batch", 30]
    for other in (text, torch.ones(3, 9)):
        found = opened.run(None, {"wave": wave.numpy(), "text": other.numpy()})[0]
        assert difference(found, Heard()(wave, other)) < CLOSE


def test_a_multiple_of_a_number_is_any_size() -> None:
    made = trace(Tiled(), Batch(args=(torch.ones(2, 12), torch.ones(2, 9))))
    assert made.dynamic == {"x": ("batch", "length"), "y": ("batch", "y_1")}
    opened = memory_session(ir.to_proto(made.model).SerializeToString())
    for x, y in ((torch.ones(5, 28), torch.ones(5, 13)), (torch.ones(2, 8), torch.ones(2, 5))):
        found = opened.run(None, {"x": x.numpy(), "y": y.numpy()})[0]
        assert difference(found, Tiled()(x, y)) < CLOSE
