"""The graphs that a model becomes: one, or those that write text token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch, call
from alphasmith.search.exports.onnx._examples import SAMPLES

#: Tokens before those of an example of a decoder that goes on.
_PAST = 5
#: Input of decoders that is the ``attention_mask`` of the encoder.
_MASK = "encoder_attention_mask"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph.

    Attributes:
        stem: Of its file.
        module: What is traced.
        batch: With what.
        optional: Whether the export goes on without it where it cannot be traced.
        wrapped: Whether the module holds the model.
    """

    stem: str
    module: nn.Module
    batch: Batch
    optional: bool = False
    wrapped: bool = True


def parts(model: nn.Module, batch: Batch) -> Iterator[Part]:
    """The graphs of a model.

    An encoder-decoder of transformers becomes ``encoder``, ``decoder`` (which begins a text) and ``decoder_with_past`` (which goes
    on with it); a causal language model ``model`` and ``model_with_past``, any other one ``model``.

    Args:
        model: Marked.
        batch: An example of its input.
    """
    config: Any = getattr(model, "config", None)
    if (
        getattr(config, "is_encoder_decoder", False)
        and hasattr(model, "get_encoder")
        and "logits" in _named(model, batch)
    ):
        yield from _encoder_decoder(model, batch)
        return
    yield Part(stem="model", module=model, batch=batch, wrapped=False)
    if type(model).__name__.endswith("ForCausalLM") and "attention_mask" in batch.kwargs:
        past = _filled(model, batch)
        if past:
            yield Part(
                stem="model_with_past",
                module=_Causal(model, len(past) // 2),
                batch=_going_on(batch, past),
                optional=True,
            )


def _named(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
    with torch.no_grad():
        output = call(model, batch)
    return output if isinstance(output, Mapping) else {}


# ---------------------------------------------------------------------------------------------------- causal language models


class _Causal(nn.Module):
    """A language model that goes on after keys and values of earlier tokens, and returns those of all tokens."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **past: Tensor) -> dict[str, Tensor]:
        cache = _cache([past[name] for name in _names("past", self.layers)])
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return {"logits": output.logits} | _held(output.past_key_values, "present")


def _filled(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Keys and values that a language model makes of a few tokens; empty: it keeps something else."""
    kwargs = {name: value[:, :_PAST] for name, value in batch.kwargs.items()}
    with torch.no_grad():
        return _tensors(model(**kwargs, use_cache=True).past_key_values)


def _going_on(batch: Batch, past: list[Tensor]) -> Batch:
    tokens = {"input_ids": batch.kwargs["input_ids"]}
    length = tokens["input_ids"].shape[1] + past[0].shape[2]
    mask = torch.ones(SAMPLES, length, dtype=torch.int64)
    named = dict(zip(_names("past", len(past) // 2), past, strict=True))
    return Batch(kwargs={**tokens, "attention_mask": mask, **named})


# --------------------------------------------------------------------------------------------------------- encoder-decoders


class _Encoder(nn.Module):
    """The encoder of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        encoder: Any = self.model
        return {"last_hidden_state": encoder.get_encoder()(**given).last_hidden_state}


class _Decoder(nn.Module):
    """The decoder of a model at the beginning of a text."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, decoder_input_ids: Tensor, encoder_hidden_states: Tensor, **mask: Tensor) -> dict[str, Tensor]:
        output = self.model(
            encoder_outputs=(encoder_hidden_states,),
            decoder_input_ids=decoder_input_ids,
            use_cache=True,
            **_heard(mask),
        )
        cache = output.past_key_values
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        return {"logits": output.logits} | _held(own, "present") | _held(cross, "present_cross")


class _DecoderWithPast(nn.Module):
    """The decoder of a model that goes on with a text: keys and values of the encoder stay what they are."""

    def __init__(self, model: nn.Module, layers: int, width: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.width = width

    def forward(self, decoder_input_ids: Tensor, **past: Tensor) -> dict[str, Tensor]:
        from transformers import EncoderDecoderCache

        own = _cache([past[name] for name in _names("past", self.layers)])
        cross = _cache([past[name] for name in _names("past_cross", self.layers)])
        encoded = past["past_cross_0_key"]
        # Only its axes are looked at: what the decoder takes of the encoder is in the cache.
        hidden = encoded.new_zeros(encoded.shape[0], encoded.shape[2], self.width)
        output = self.model(
            encoder_outputs=(hidden,),
            decoder_input_ids=decoder_input_ids,
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
            **_heard(past),
        )
        return {"logits": output.logits} | _held(output.past_key_values.self_attention_cache, "present")


def _heard(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask of what the encoder read, as models call it."""
    return {"attention_mask": given[_MASK]} if _MASK in given else {}


def _encoder_decoder(model: nn.Module, batch: Batch) -> Iterator[Part]:
    heard = {n: v for n, v in batch.kwargs.items() if not n.startswith("decoder_")}
    yield Part(stem="encoder", module=_Encoder(model), batch=Batch(kwargs=heard))
    ids = batch.kwargs["decoder_input_ids"]
    # Which of the encoder's inputs are none, for the decoder looks at its outputs.
    mask = {_MASK: heard["attention_mask"]} if "attention_mask" in heard else {}
    with torch.no_grad():
        hidden = _Encoder(model)(**heard)["last_hidden_state"]
        begun = _Decoder(model)
        first = begun(ids, hidden, **mask)
    told = {"decoder_input_ids": ids, "encoder_hidden_states": hidden, **mask}
    yield Part(stem="decoder", module=begun, batch=Batch(kwargs=told))
    layers = sum(name.startswith("present_cross") for name in first) // 2
    past = {name.replace("present", "past", 1): value for name, value in first.items() if name != "logits"}
    going_on = {"decoder_input_ids": ids[:, : _PAST - 2], **mask, **past}
    yield Part(
        stem="decoder_with_past",
        module=_DecoderWithPast(model, layers, hidden.shape[-1]),
        batch=Batch(kwargs=going_on),
        optional=True,
    )


# -------------------------------------------------------------------------------------------------------------------- caches


def _names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}_{layer}_{kind}" for layer in range(layers) for kind in ("key", "value")]


def _tensors(cache: Any) -> list[Tensor]:
    """Keys and values of every layer, by turns; empty: a layer keeps something else."""
    layers = list(getattr(cache, "layers", ()))
    if any(type(layer).__name__ != "DynamicLayer" for layer in layers):
        return []
    return [value for layer in layers for value in (layer.keys, layer.values)]


def _held(cache: Any, prefix: str) -> dict[str, Tensor]:
    found = _tensors(cache)
    return dict(zip(_names(prefix, len(found) // 2), found, strict=True))


def _cache(tensors: list[Tensor]) -> Any:
    """A cache of transformers that holds these keys and values."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.dtype, layer.device = keys.dtype, keys.device
        # Not by update, which appends to tensors without axes: ONNX has none.
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    return cache
