"""ModelOpt: simulated quantizers that take our static scales and our divisions at run time."""

from __future__ import annotations

from alphasmith.objectives.quantization.scheme import QMAX, Scheme
from alphasmith.search.exports.recipes._facts import RecipeFacts, refuse_others, without
from alphasmith.search.exports.recipes._script import beside, executed, head, loaded

_TOOL = "ModelOpt 0.47.0"
_KNOWN = (
    *(
        f"w{pair}-{size}-{inputs}"
        for pair in ("8a8", "fp8afp8")
        for size in ("channel", "tensor")
        for inputs in ("static", "token")
    ),
    "w8a16-channel",
    "w8a16-group",
    "w4a16-channel",
    "w4a16-group",
)
_ABOUT = (
    "smoothed/ is smoothed, so that its algorithm is max and not smoothquant. ModelOpt rounds the weights itself, by the same "
    "rule as the run."
)
_STATIC = "Static input ranges are the run's."
_DIVIDED = "What the run divides by at run time is a pre_quant_scale."

_QUANTIZED = """\
rules = [{"quantizer_name": "*", "enable": False}]
for name, scheme in operators.items():
    weights, inputs, _ = formats[scheme]
    rules += [{"quantizer_name": f"{name}.weight_quantizer", "cfg": weights}]
    rules += [{"quantizer_name": f"{name}.input_quantizer", "cfg": inputs}] if inputs else []
mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"})
"""
_LOOP = """\
for name, scheme in operators.items():
    linear = model.get_submodule(name)
"""
_DIVIDES = """\
    if f"{name}.smooth" in ours:
        apply_pre_quant_scale_and_smooth(linear, 1 / ours[f"{name}.smooth"].float())
"""
_RANGES = """\
    if f"{name}.input_scale" in ours:
        linear.input_quantizer.amax = ours[f"{name}.input_scale"] * formats[scheme][2]
"""
_SAVED = """\
mto.enable_huggingface_checkpointing()
model.save_pretrained(OUT)  # from_pretrained gives it back after the same call
"""


def script(facts: RecipeFacts) -> str:
    """The recipe.

    Args:
        facts: Of the result.

    Raises:
        InputError: A scheme that ModelOpt cannot compute, or what it has no place for at run time.
    """
    refuse_others(facts, _TOOL, _KNOWN, "w8a8-channel-static, wfp8afp8-tensor-static or w4a16-g128")
    static = any(scheme.static for scheme in facts.schemes)
    divided = bool(facts.divided)
    about = [_ABOUT, *([_STATIC] if static else []), *([_DIVIDED] if divided else [])]
    about += without(facts, _TOOL, facts.shifted)
    copied = beside(facts)
    imports = ["import json", *(["import shutil"] if copied else []), "from pathlib import Path", ""]
    imports += ["import modelopt.torch.opt as mto", "import modelopt.torch.quantization as mtq"]
    if divided:
        imports += ["from modelopt.torch.quantization.model_calib import apply_pre_quant_scale_and_smooth"]
    imports += ["from safetensors.torch import load_file", f"from transformers import {facts.architecture}"]
    formats = "".join(f'    "{scheme.name}": {_formats(scheme)},\n' for scheme in facts.schemes)
    loop = _LOOP + (_DIVIDES if divided else "") + (_RANGES if static else "") if static or divided else ""
    return "".join(
        (
            head(facts, _TOOL, checked=executed(_TOOL), about=about, imports=imports),
            "\n",
            loaded(facts),
            "# Scheme -> weights, inputs, largest code of an input.\n",
            f"formats = {{\n{formats}}}\n",
            _QUANTIZED,
            loop,
            _SAVED,
            copied,
        )
    )


def _formats(scheme: Scheme) -> str:
    """(weights, inputs, largest code of an input) of a scheme, as Python writes them."""
    bits = {"int8": "8", "int4": "4", "fp8": "(4, 3)"}
    size = {"tensor": '"axis": None', "channel": '"axis": 0', "group": f'"block_sizes": {{-1: {scheme.group_size}}}'}
    weights = f'{{"num_bits": {bits[scheme.weights]}, {size[scheme.weight_granularity]}}}'
    if scheme.activations == "none":
        return f"({weights}, None, None)"
    form = '"axis": None' if scheme.static else '"type": "dynamic", "block_sizes": {-1: None}'
    inputs = f'{{"num_bits": {bits[scheme.activations]}, {form}}}'
    return f"({weights}, {inputs}, {QMAX[scheme.activations]})"
