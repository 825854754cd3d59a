"""Exported graphs called as the models that they were made of, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

#: Of axes that an example leaves open, the value of what a call leaves out: every position is real, every token of the first kind.
_LEFT_OUT = {"attention_mask": 1, "token_type_ids": 0}


def session(file: Path, threads: int, *, exact: bool) -> Any:
    """A session of ONNX Runtime.

    Args:
        file: An ONNX model.
        threads: Of one operator.
        exact: Raise signed weights to unsigned ones, whose kernels are exact without VNNI, too.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", str(int(exact)))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class GraphModel(nn.Module):
    """A graph in the place of the model that it was made of.

    Args:
        file: An ONNX model.
        threads: Of one operator.
        exact: See :func:`session`.
    """

    def __init__(self, file: Path, threads: int = 1, *, exact: bool = False) -> None:
        super().__init__()
        self.session = session(file, threads, exact=exact)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its outputs: of several a mapping by name, of one the tensor."""
        found = self.run(self.numbers(args, kwargs))
        if "logits" in found or "last_hidden_state" in found:
            from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

            logits = found.get("logits")
            return BaseModelOutput(found["last_hidden_state"]) if logits is None else CausalLMOutput(logits=logits)
        return next(iter(found.values()))

    def numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """What the graph takes of a call."""
        names = [value.name for value in self.session.get_inputs()]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        made = {}
        for name in names:
            value = given.get(name)
            if value is None:
                value = torch.full_like(given["input_ids"], _LEFT_OUT[name])
            made[name] = np.ascontiguousarray(value.numpy())
        return made

    def run(self, numbers: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
        """Outputs by name."""
        names = [value.name for value in self.session.get_outputs()]
        return {n: torch.from_numpy(v) for n, v in zip(names, self.session.run(None, numbers), strict=True)}


class EncoderDecoder(nn.Module):
    """The encoder and the decoder of a model, one after the other, over a whole text.

    Args:
        encoder: An ONNX model.
        decoder: Another.
        threads: Of one operator.
        exact: See :func:`session`.
    """

    def __init__(self, encoder: Path, decoder: Path, threads: int = 1, *, exact: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = (GraphModel(file, threads, exact=exact) for file in (encoder, decoder))

    def forward(self, decoder_input_ids: Tensor, **heard: Tensor) -> Any:
        """Logits (B, L, V)."""
        hidden = self.encoder(**heard).last_hidden_state
        return self.decoder(decoder_input_ids=decoder_input_ids, encoder_hidden_states=hidden, **heard)


def loaded(folder: Path, threads: int = 1, *, exact: bool = False) -> nn.Module:
    """What is in the folder of an export, called as its model."""
    if (folder / "encoder.onnx").is_file():
        return EncoderDecoder(folder / "encoder.onnx", folder / "decoder.onnx", threads, exact=exact)
    return GraphModel(folder / "model.onnx", threads, exact=exact)
