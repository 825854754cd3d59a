"""What a recipe is made from, read from a result without its tensors, and what tools without a division at run time cannot do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.text import listed
from alphasmith.search.checkpoints.load import STRUCTURE
from alphasmith.search.exports.source import companions
from alphasmith.storage.output.manifest import Manifest
from alphasmith.storage.output.result_folder import ResultFolder

_TOKENIZER = "smoothed/tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class RecipeFacts:
    """One result as recipes see it.

    Attributes:
        folder: Where it is, as the script will name it.
        run: Id of the run.
        architecture: Class of transformers.
        config: Configuration of the model.
        schemes: Number formats of the quantized linear layers, each once, in the order of the model.
        elsewhere: Operators that the run quantized and that are no linear layers: other tools leave them in float.
        divided: Linear layers whose input is divided at run time.
        shifted: Linear layers from whose input something is subtracted at run time.
        tokenizer: Its configuration; empty: there is none.
        companions: Files beside the weights of ``smoothed/``, e.g. of the tokenizer.
    """

    folder: Path
    run: str
    architecture: str
    config: Mapping[str, Any]
    schemes: tuple[Scheme, ...]
    elsewhere: tuple[str, ...]
    divided: tuple[str, ...]
    shifted: tuple[str, ...]
    tokenizer: Mapping[str, Any]
    companions: tuple[str, ...]


def read_facts(result: ResultFolder, shown: Path) -> RecipeFacts:
    """The facts of a result.

    Args:
        result: Its folder; files that are read are compared with their digests.
        shown: The folder as the script will name it.

    Raises:
        InputError: A trained model, whose float weights are not kept, no model of transformers, or no quantized linear layer.
        IntegrityError: A file has changed.
    """
    manifest: Manifest = result.manifest
    if manifest.training is not None:
        raise InputError("RUN", "a trained model has no smoothed/ to begin from", f"give run {manifest.run.id}")
    if not result.has("smoothed/config.json"):
        raise InputError(
            "RUN", f"{shown} is no model of transformers, which the tools load", "use the result with load_quantized"
        )
    structure = result.read_json(STRUCTURE)
    # A tensor that several layers share is stored once.
    names = {*result.read_checkpoint("quantized"), *structure.get("aliases", ())}
    linear = [o for o in structure["operators"] if o["kind"] == "linear" and not o["transposed"]]
    if not linear:
        raise InputError("RUN", f"{shown} has no quantized linear layer", "export it to another format")
    inside = {o["name"] for o in linear}
    config = result.read_json("smoothed/config.json")
    return RecipeFacts(
        folder=shown,
        run=manifest.run.id,
        architecture=next(iter(config.get("architectures") or ()), "AutoModel"),
        config=config,
        schemes=tuple(dict.fromkeys(Scheme.parse(o["scheme"]) for o in linear)),
        elsewhere=tuple(
            [o["name"] for o in structure["operators"] if o["name"] not in inside]
            + [stack["name"] for stack in structure.get("stacks", ())]
        ),
        divided=tuple(o["name"] for o in linear if f"{o['name']}.smooth" in names),
        shifted=tuple(o["name"] for o in linear if f"{o['name']}.shift" in names),
        tokenizer=result.read_json(_TOKENIZER) if result.has(_TOKENIZER) else {},
        companions=companions(result, "smoothed"),
    )


def refuse_others(facts: RecipeFacts, tool: str, known: Collection[str], instead: str) -> None:
    """Refuse a result with number formats that a tool has not.

    Args:
        facts: Of the result.
        tool: What it is called.
        known: What it has: names of schemes, with ``group`` in place of the size of groups.
        instead: Schemes to run with, in words.

    Raises:
        InputError: It lacks one, which is named.
    """
    for scheme in facts.schemes:
        if kind_of(scheme) not in known:
            raise InputError(
                "TOOL", f"{tool} cannot compute {scheme.name} as it is meant", f"run with scheme {instead}"
            )


def kind_of(scheme: Scheme) -> str:
    """Name of a scheme with ``group`` in place of the size of its groups, and without the kernel of the machine that it is meant for."""
    name = replace(scheme, kernel="exact").name
    return name if scheme.group_size is None else name.replace(f"-g{scheme.group_size}", "-group")


def without(facts: RecipeFacts, tool: str, names: Sequence[str]) -> tuple[str, ...]:
    """What a script says of layers whose division or subtraction at run time a tool does without.

    ``smoothed/`` holds nothing of these, so that the layer is right, and as if no alpha had been found.

    Args:
        facts: Of the result.
        tool: What it is called.
        names: The layers.

    Raises:
        InputError: Activations have the run's static ranges, which are those behind the division.
    """
    if not names:
        return ()
    if any(scheme.static for scheme in facts.schemes):
        raise InputError(
            "TOOL",
            f"{tool} has no place for what {listed(names)} divide by or subtract at run time",
            "run with --set sites.explicit=never and --set search.shift=none, or with activations per token",
        )
    return (f"Quantized as if no alpha had been found, for want of a division at run time: {listed(names)}.",)
