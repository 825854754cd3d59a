"""CTranslate2, whose converter reads ``smoothed/`` as it is: rows of weights and of activations get scales of its own."""

from __future__ import annotations

from alphasmith.objectives.text import listed
from alphasmith.search.exports.recipes._facts import RecipeFacts, refuse_others
from alphasmith.search.exports.recipes._script import executed, head, literal

_TOOL = "CTranslate2 4.8.5"
_KNOWN = tuple(
    f"w8a{activations}-{weights}{inputs}"
    for weights in ("channel", "tensor")
    for activations, inputs in (("8", "-static"), ("8", "-token"), ("u8", "-static"), ("u8", "-token"), ("16", ""))
)
#: What users of its models load beside them.
_COPIED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")

_ABOUT = (
    "Its converter reads smoothed/, and int8 means what it always does there: a scale of its own for every row of the "
    "weights and for every token, of embeddings as well. It has no smoothing to switch off, and no place for static scales."
)
_BERT = """\
# The converter asks for what newer releases of transformers no longer keep in the configuration.
BertConfig.position_embedding_type = "absolute"
"""
_BODY = """\
converter = TransformersConverter(str(RESULT / "smoothed"), copy_files={files})
converter.convert(str(OUT), quantization="int8_float32", force=True)
{ends}# Then: ctranslate2.{runner}(str(OUT), compute_type="int8_float32")
"""
_ENDS = """\
# The tokenizer does not name these tokens, and CTranslate2 wants a text for each.
settings, tokens = (json.loads((OUT / file).read_text()) for file in ("config.json", "vocabulary.json"))
settings |= {name: tokens[0] for name in ("bos_token", "eos_token", "unk_token") if settings.get(name) is None}
(OUT / "config.json").write_text(json.dumps(settings))
"""


def script(facts: RecipeFacts) -> str:
    """The recipe.

    Args:
        facts: Of the result.

    Raises:
        InputError: A scheme that it cannot come near.
    """
    refuse_others(facts, _TOOL, _KNOWN, "w8a8-channel-token or w8a8-channel-static")
    gone = (*facts.divided, *facts.shifted)
    note = f"As if no alpha had been found, for want of a division at run time: {listed(gone)}." if gone else ""
    bert = facts.config.get("model_type") == "bert" and "position_embedding_type" not in facts.config
    runner = _runner(facts)
    ends = runner == "Generator" and not all(
        facts.tokenizer.get(name) for name in ("bos_token", "eos_token", "unk_token")
    )
    imports = [
        *(["import json"] if ends else []),
        "from pathlib import Path",
        "",
        "from ctranslate2.converters import TransformersConverter",
    ]
    imports += ["from transformers import BertConfig"] if bert else []
    files = [name for name in facts.companions if name in _COPIED]
    body = _BODY.format(files=literal(files), runner=runner, ends=_ENDS if ends else "")
    return (
        head(facts, _TOOL, checked=executed(_TOOL), about=(_ABOUT, note), imports=imports)
        + "\n"
        + (_BERT if bert else "")
        + body
    )


def _runner(facts: RecipeFacts) -> str:
    """The class that runs the converted model."""
    if facts.config.get("model_type") == "whisper":
        return "models.Whisper"
    if facts.config.get("is_encoder_decoder"):
        return "Translator"
    return "Generator" if "CausalLM" in facts.architecture or "LMHead" in facts.architecture else "Encoder"
