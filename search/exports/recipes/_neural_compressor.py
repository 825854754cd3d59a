"""Neural Compressor without Intel's extension for PyTorch: a graph whose linear layers read the input grids of the run."""

from __future__ import annotations

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.exports.recipes._facts import RecipeFacts, refuse_others, without
from alphasmith.search.exports.recipes._script import compared, head, literal, loaded

_TOOL = "neural-compressor 3.10"
_STATIC = ("w8a8-channel-static", "w8au8-channel-static")
_KNOWN = (*_STATIC, "w8a16-channel", "w8a16-group", "w4a16-channel", "w4a16-group")
_ABOUT = "smoothed/ is smoothed, so that no SmoothQuantConfig is called for. Weights are rounded with scales of the tool's own."
_GRIDS = (
    "Inputs have the run's grids: its symmetric 8-bit codes are the tool's 0..255 with zero point 128. The graph runs with any "
    "batch and length that torch.export could leave open."
)
_BODY = """\
free = tuple({{axis: torch.export.Dim.AUTO for axis in range({free})}} for _ in example)
prepared = prepare(export(model, example_inputs=example, dynamic_shapes=free), StaticQuantConfig())
for node in prepared.graph.nodes:
    if node.target is torch.ops.aten.linear.default:
        name = next(reversed(node.meta["nn_module_stack"].values()))[0]
        if name in operators:
            grid = FixedQParamsObserver(
                ours[f"{{name}}.input_scale"], {zero}, dtype=torch.uint8, quant_min=0, quant_max=255
            )
            prepared.set_submodule(node.args[0].target, grid)
prepared(*example)
quantized = convert(prepared)
quantized.save(example, str(OUT))
"""
_WEIGHTS = """\
config = RTNConfig(dtype="fp32")
for name in operators:
    config.set_local(name, RTNConfig(dtype="int", bits={bits}, use_sym=True, group_size={size}))
quantized = convert(prepare(model, config))
quantized.save(str(OUT))
"""


def script(facts: RecipeFacts) -> str:
    """The recipe.

    Args:
        facts: Of the result.

    Raises:
        InputError: A scheme that Neural Compressor cannot compute here, several at once, or what it has no place for at run time; or
            a model whose inputs are no texts or images, of which an example is made.
    """
    refuse_others(facts, _TOOL, _KNOWN, "w8a8-channel-static or w4a16-g32")
    if len(facts.schemes) > 1:
        names = ", ".join(scheme.name for scheme in facts.schemes)
        raise InputError("TOOL", f"{_TOOL} takes one scheme, not {names}", "give a run without formats of sites")
    (scheme,) = facts.schemes
    static = scheme.static
    about = [_ABOUT, *([_GRIDS] if static else []), *without(facts, _TOOL, (*facts.divided, *facts.shifted))]
    imports = ["import json", "from pathlib import Path", "", *(["import torch"] if static else [])]
    if static:
        imports += ["from neural_compressor.torch.export import export"]
    config = "StaticQuantConfig" if static else "RTNConfig"
    imports += [f"from neural_compressor.torch.quantization import {config}, convert, prepare"]
    imports += ["from safetensors.torch import load_file"]
    if static:
        imports += ["from torchao.quantization.pt2e.observer import FixedQParamsObserver"]
    imports += [f"from transformers import {facts.architecture}"]
    made = head(facts, _TOOL, checked=compared(_TOOL), about=about, imports=imports)
    return made + "\n" + loaded(facts) + (_static(facts, scheme) if static else _weights(scheme))


def _static(facts: RecipeFacts, scheme: Scheme) -> str:
    """The lines that quantize weights and inputs, over an example of what the model reads."""
    zero = 'ours[f"{name}.input_zero"].int()' if scheme.asymmetric else "torch.tensor(128)"
    config = facts.config
    edge, channels = config.get("image_size"), config.get("num_channels", 3)
    if config.get("is_encoder_decoder") or not (isinstance(edge, int) or "vocab_size" in config):
        raise InputError(
            "TOOL",
            f"{_TOOL} exports a graph, and no example of what {facts.architecture} reads is known",
            "take another tool, or begin from smoothed/",
        )
    if isinstance(edge, int):
        example, free = f"example = (torch.zeros(2, {channels}, {edge}, {edge}),)\n", 1
    else:
        example = 'model.config.use_cache = False\nexample = (model.dummy_inputs["input_ids"],)\n'
        free = 2
    return example + _BODY.format(free=free, zero=zero)


def _weights(scheme: Scheme) -> str:
    """The lines that quantize weights alone."""
    bits = 4 if scheme.weights == "int4" else 8
    return _WEIGHTS.format(bits=bits, size=literal(scheme.group_size or -1))
