"""What an export is made from: the integer operators and the float tensors of a result, read only as they were written.

Tensors lie in mapped files until they are used, so that an export needs little memory beyond the largest of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.model.hf_folder import empty_architecture
from alphasmith.objectives.model.stored_names import stored_names
from alphasmith.objectives.quantization.quantizers import unpack_int4
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.search.checkpoints.load import STRUCTURE
from alphasmith.storage.output.result_folder import ResultFolder


@dataclass(frozen=True, kw_only=True, eq=False)
class DeployedOperator:
    """One quantized operator as it is stored.

    Attributes:
        name: Of its module in the model.
        kind: ``linear`` or ``conv``.
        transposed: Whether the float weight is stored (in, out).
        scheme: Number formats and granularity.
        codes: (O, D) int8, or float8_e4m3fn; int4 codes one per element.
        scale: float32: () per tensor, (O, 1) per channel, (O, groups) per group.
        input_scale: () float32 of static activations, else None.
        input_zero: () uint8 code that stands for 0, of static activations with a zero point, else None.
        explicit: Whether the input is divided by scales, or shifted, at run time.
    """

    name: str
    kind: str
    transposed: bool
    scheme: Scheme
    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    input_zero: Tensor | None
    explicit: bool

    @property
    def digest(self) -> str:
        """SHA-256 over name, scheme, codes and scales: equal for equal integer operators, in whatever file they are."""
        digest = hashlib.sha256(f"{self.name}\n{self.scheme.name}\n{tuple(self.codes.shape)}\n".encode())
        # Scales count in the order of memory: formats give them shapes of their own.
        for tensor in (self.codes, self.scale, self.input_scale, self.input_zero):
            if tensor is not None:
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class ExportSource:
    """The result of a run or training, as exports read it.

    Attributes:
        result: Its folder.
        folder: Name of the checkpoint in it whose files travel: ``smoothed``, or ``quantized`` of a trained model.

    Args:
        result: The folder; every file that is read is compared with its digest.
    """

    def __init__(self, result: ResultFolder) -> None:
        self.result = result
        self.folder = "smoothed" if result.manifest.training is None else "quantized"
        self._structure = result.read_json(STRUCTURE)
        self._tensors: Mapping[str, Tensor] = result.read_checkpoint("quantized")

    @property
    def of_transformers(self) -> bool:
        """Whether the model is one of transformers."""
        return self.result.has(f"{self.folder}/config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformers configuration.

        Raises:
            InputError: The model is not one of transformers.
        """
        if not self.of_transformers:
            raise InputError(
                "--format",
                f"{self.result.path} is no model of transformers, whose folders this format extends",
                "use the result with load_quantized",
            )
        return self.result.read_json(f"{self.folder}/config.json")

    @cached_property
    def architecture(self) -> nn.Module:
        """The model without memory: what its modules are and how they are called.

        Raises:
            InputError: As ``config``, or the configuration cannot be read.
        """
        _ = self.config
        with self.result.only_named(self.folder) as checked:
            return empty_architecture(checked)

    @cached_property
    def operators(self) -> tuple[DeployedOperator, ...]:
        """All quantized operators, in the order of the model."""
        return tuple(self._operator(entry) for entry in self._structure["operators"])

    @property
    def stacks(self) -> tuple[str, ...]:
        """Parameters that hold several quantized matrices, e.g. of experts."""
        return tuple(entry["name"] for entry in self._structure.get("stacks", ()))

    @cached_property
    def float_tensors(self) -> Mapping[str, Tensor]:
        """The checkpoint as a model of transformers loads it, with float weights: of a trained model without those that are quantized.

        Raises:
            IntegrityError: A file is not as it was written.
        """
        if self.folder == "smoothed":
            return self.result.read_checkpoint("smoothed")
        known = self.architecture.state_dict()
        aliases: Mapping[str, str] = self._structure.get("aliases", {})
        return {name: value for name, value in self._tensors.items() if name in known and name not in aliases}

    @cached_property
    def weight_names(self) -> Mapping[str, str]:
        """Operator -> name of its float weight among :attr:`float_tensors`, which a class of transformers may rename on loading."""
        named = {entry["name"]: f"{entry['name']}.weight" for entry in self._structure["operators"]}
        if self.folder != "smoothed":
            return named
        tensors = self.float_tensors
        known = {name: weight for name, weight in named.items() if weight in tensors}
        others = {weight: name for name, weight in named.items() if name not in known}
        if not others or not self.of_transformers:
            return known
        parameters = dict(self.architecture.named_parameters())
        for weight, stored in stored_names(self.architecture, others).items():
            if stored in tensors and tensors[stored].shape == parameters[weight].shape:
                known[others[weight]] = stored
        return known

    def companions(self) -> tuple[str, ...]:
        """Files beside the weights, e.g. of the tokenizer, by their names in the checkpoint's folder."""
        return companions(self.result, self.folder)

    def sites_of(self, operators: Iterable[str]) -> tuple[str, ...]:
        """Names of the sites that operators read, in the order of the run."""
        wanted = set(operators)
        return tuple(site.name for site in self.result.manifest.sites if wanted & set(site.operators))

    def _operator(self, entry: Mapping[str, Any]) -> DeployedOperator:
        name, scheme = entry["name"], Scheme.parse(entry["scheme"])
        aliases: Mapping[str, str] = self._structure.get("aliases", {})

        def own(leaf: str) -> Tensor | None:
            full = f"{name}.{leaf}" if name else leaf
            return self._tensors.get(aliases.get(full, full))

        values, scale = own("weight_values"), own("weight_scale")
        if values is None or scale is None:
            raise InputError(name, "its quantized weight is not among the stored tensors", "run again")
        return DeployedOperator(
            name=name,
            kind=entry["kind"],
            transposed=entry["transposed"],
            scheme=scheme,
            codes=values if scheme.weights != "int4" else unpack_int4(values, self._columns(name, values)),
            scale=scale,
            input_scale=own("input_scale"),
            input_zero=own("input_zero"),
            explicit=own("smooth") is not None or own("shift") is not None,
        )

    def _columns(self, name: str, packed: Tensor) -> int:
        """D of an int4 weight: packed in pairs, so that the float weight must tell whether the last one counts."""
        weights = self.float_tensors if self.folder == "smoothed" else self.architecture.state_dict()
        weight = weights.get(self.weight_names.get(name, ""))
        return packed.shape[-1] * 2 if weight is None else weight.numel() // packed.shape[0]


def companions(result: ResultFolder, folder: str) -> tuple[str, ...]:
    """Files beside the weights of a checkpoint, e.g. of the tokenizer, by their names in its folder.

    Args:
        result: What it belongs to.
        folder: The checkpoint, e.g. ``smoothed``.
    """
    names = (name.removeprefix(f"{folder}/") for name in result.names(folder) if ".safetensors" not in name)
    own = {Path(STRUCTURE).name, "config.json"}
    return tuple(name for name in names if name not in own)


def to_json(value: object) -> str:
    """JSON as transformers writes its configurations: two spaces, sorted, one line at the end."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
