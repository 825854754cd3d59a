"""llm-compressor: its own quantizer rounds the weights without data, static input scales are ours."""

from __future__ import annotations

from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.exports.recipes._facts import RecipeFacts, refuse_others, without
from alphasmith.search.exports.recipes._script import beside, compared, head, literal, loaded

_TOOL = "llm-compressor 0.14.0.1"
_KNOWN = (
    *(
        f"w{pair}-{size}-{inputs}"
        for pair in ("8a8", "8au8", "fp8afp8")
        for size in ("channel", "tensor")
        for inputs in ("static", "token")
    ),
    "w8a16-channel",
    "w8a16-group",
    "w4a16-channel",
    "w4a16-group",
)
_ABOUT = (
    "smoothed/ is smoothed, so that the recipe has no SmoothQuantModifier. Weights are rounded with scales of llm-compressor's "
    "own, without data; GPTQModifier with the same groups takes data and rounds better."
)
_STATIC = "Static input scales are the run's."
_IGNORED = """\
ignored = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in operators]
"""
_QUANTIZED = """\
oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=ignored), pipeline="datafree")
"""
_RANGES = """\
for name in operators:
    if f"{name}.input_scale" in ours:  # oneshot warns that it saw no inputs: these are what it would have measured
        model.get_submodule(name).input_scale.data.fill_(ours[f"{name}.input_scale"])
"""
_ZEROS = """\
    if f"{name}.input_zero" in ours:
        model.get_submodule(name).input_zero_point.data.fill_(int(ours[f"{name}.input_zero"]) - 128)
"""


def script(facts: RecipeFacts) -> str:
    """The recipe.

    Args:
        facts: Of the result.

    Raises:
        InputError: A scheme that llm-compressor cannot compute, or what it has no place for at run time.
    """
    refuse_others(facts, _TOOL, _KNOWN, "w8a8-channel-static, w8a8-channel-token or w4a16-g128")
    static = any(scheme.static for scheme in facts.schemes)
    zeros = any(scheme.static and scheme.asymmetric for scheme in facts.schemes)
    about = [_ABOUT, *([_STATIC] if static else []), *without(facts, _TOOL, (*facts.divided, *facts.shifted))]
    copied = beside(facts)
    imports = ["import json", *(["import shutil"] if copied else []), "from pathlib import Path", ""]
    imports += [
        "from llmcompressor import oneshot",
        "from llmcompressor.modifiers.quantization import QuantizationModifier",
        "from safetensors.torch import load_file",
        "from torch import nn",
        f"from transformers import {facts.architecture}",
    ]
    groups = "".join(_group(number, scheme) for number, scheme in enumerate(facts.schemes))
    return "".join(
        (
            head(facts, _TOOL, checked=compared(_TOOL), about=about, imports=imports),
            "\n",
            loaded(facts),
            _IGNORED,
            f"groups = {{\n{groups}}}\n",
            _QUANTIZED,
            _RANGES if static else "",
            _ZEROS if zeros else "",
            "model.save_pretrained(OUT, save_compressed=True)\n",
            copied,
        )
    )


def _group(number: int, scheme: Scheme) -> str:
    """One entry of the groups of a configuration."""
    kind = "float" if scheme.weights == "fp8" else "int"
    weights = _arguments(4 if scheme.weights == "int4" else 8, kind, scheme.weight_granularity, size=scheme.group_size)
    inputs = "None"
    if scheme.activations != "none":
        strategy = "tensor" if scheme.static else "token"
        inputs = _arguments(8, kind, strategy, dynamic=not scheme.static, symmetric=not scheme.asymmetric)
    return (
        f'    "group_{number}": {{\n'
        f'        "targets": [name for name, scheme in operators.items() if scheme == {literal(scheme.name)}],\n'
        f'        "weights": {weights},\n'
        f'        "input_activations": {inputs},\n'
        "    },\n"
    )


def _arguments(
    bits: int, kind: str, strategy: str, *, size: int | None = None, dynamic: bool = False, symmetric: bool = True
) -> str:
    group = "" if size is None else f', "group_size": {size}'
    return (
        f'{{"num_bits": {bits}, "type": {literal(kind)}, "strategy": {literal(strategy)}, "symmetric": {symmetric}, '
        f'"dynamic": {dynamic}{group}}}'
    )
