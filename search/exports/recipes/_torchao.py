"""torchao: its int8 tensors take our static scales and our divisions at run time; weights are rounded by its own quantizer."""

from __future__ import annotations

from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.exports.recipes._facts import RecipeFacts, refuse_others, without
from alphasmith.search.exports.recipes._script import compared, head, loaded

_TOOL = "torchao 0.18.0"
_KNOWN = (
    "w8a8-channel-static",
    "w8a8-tensor-static",
    "w8au8-channel-static",
    "w8au8-tensor-static",
    "w8a8-channel-token",
    "w8a8-tensor-token",
    "w8a16-channel",
    "w8a16-group",
    "w4a16-channel",
    "w4a16-group",
)
_ABOUT = "smoothed/ is smoothed, so that no SmoothQuantConfig is called for. torchao rounds the weights with scales of its own."
_STATIC = "Static input scales are the run's."
_DIVIDED = "What the run divides by at run time is an act_pre_scale."

_ROWS = '''

class Rows(torch.nn.Linear):
    """torchao wants a static scale with as many dimensions as the input: here it has always two."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


'''
_MULTIPLIED = """\
    if divided:
        linear.weight = torch.nn.Parameter(linear.weight * ours[f"{name}.smooth"].float())
"""
_DIVIDES = """\
    if divided:
        linear.weight.act_pre_scale = 1 / ours[f"{name}.smooth"].float()
"""
_SAVED = """\
OUT.mkdir(parents=True, exist_ok=True)
torch.save(model.state_dict(), OUT / "model.pt")  # model.load_state_dict(torch.load(...), assign=True) gives it back
"""


def script(facts: RecipeFacts) -> str:
    """The recipe.

    Args:
        facts: Of the result.

    Raises:
        InputError: A scheme that torchao cannot compute, or what it has no place for at run time.
    """
    refuse_others(facts, _TOOL, _KNOWN, "w8a8-channel-static, w8a8-channel-token or w4a16-g32")
    floating = any(scheme.activations == "none" for scheme in facts.schemes)
    static = any(scheme.static for scheme in facts.schemes)
    divided = bool(facts.divided) and not floating
    gone = (*facts.shifted, *(facts.divided if floating else ()))
    names = dict.fromkeys(name for scheme in facts.schemes for name in _names(scheme))
    about = [_ABOUT, *([_STATIC] if static else []), *([_DIVIDED] if divided else []), *without(facts, _TOOL, gone)]
    imports = [
        "import json",
        "from pathlib import Path",
        "",
        "import torch",
        "from safetensors.torch import load_file",
        f"from torchao.quantization import {', '.join(sorted({*names, 'quantize_'}, key=str.lower))}",
        f"from transformers import {facts.architecture}",
    ]
    lines = [head(facts, _TOOL, checked=compared(_TOOL), about=about, imports=imports), _ROWS if static else "\n"]
    lines += [loaded(facts), "configs = {\n"]
    lines += [f'    "{scheme.name}": lambda name: (\n        {_config(scheme)}\n    ),\n' for scheme in facts.schemes]
    lines += ["}\n", "for name, scheme in operators.items():\n", "    linear = model.get_submodule(name)\n"]
    if divided:
        lines += ['    divided = f"{name}.smooth" in ours\n', _MULTIPLIED]
    lines += ["    linear.__class__ = Rows\n"] if static else []
    lines += ["    quantize_(model, configs[scheme](name), filter_fn=lambda module, at: module is linear)\n"]
    return "".join((*lines, _DIVIDES if divided else "", _SAVED))


def _config(scheme: Scheme) -> str:
    """The expression that makes torchao's configuration for the layer ``name``."""
    weights = "PerTensor()" if scheme.weight_granularity == "tensor" else "PerRow()"
    if scheme.activations == "none":
        size = f"PerGroup({scheme.group_size})" if scheme.group_size else "PerAxis(0)"
        return f"IntxWeightOnlyConfig(weight_dtype=torch.{scheme.weights}, granularity={size})"
    if not scheme.static:
        return f"Int8DynamicActivationInt8WeightConfig(granularity=[PerRow(), {weights}])"
    zero = ""
    if scheme.asymmetric:
        # Codes 0..255 there are -128..127 here.
        zero = (
            'act_quant_zero_point=(ours[f"{name}.input_zero"].short() - 128).char().reshape(1, 1), '
            "act_mapping_type=MappingType.ASYMMETRIC, "
        )
    scale = 'act_quant_scale=ours[f"{name}.input_scale"].reshape(1, 1)'
    return f"Int8StaticActivationInt8WeightConfig({scale}, {zero}granularity=[PerTensor(), {weights}])"


def _names(scheme: Scheme) -> tuple[str, ...]:
    """What ``_config`` needs of torchao."""
    text = _config(scheme)
    known = ("Int8DynamicActivationInt8WeightConfig", "Int8StaticActivationInt8WeightConfig", "IntxWeightOnlyConfig")
    return tuple(n for n in (*known, "MappingType", "PerAxis", "PerGroup", "PerRow", "PerTensor") if n in text)
