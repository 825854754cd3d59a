"""The integer model of a run or an output folder, with what its inputs are read with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.literals import MediaKind
from alphasmith.objectives.media import MediaSource, media_kind
from alphasmith.objectives.media.items import ItemLimits, ItemReader
from alphasmith.objectives.media.text import has_tokenizer
from alphasmith.objectives.model.loading import LoadedModel, load_model, wrap_module
from alphasmith.objectives.quantization.operator import QuantizedOperator
from alphasmith.search.checkpoints.find import as_written, find_result
from alphasmith.search.checkpoints.load import load_quantized
from alphasmith.search.config import RunConfig
from alphasmith.search.devices import usable_device
from alphasmith.search.inputs.permission import check_code
from alphasmith.storage.output.manifest import FILE_NAME
from alphasmith.storage.output.result_folder import ResultFolder

#: What transformers calls the main input of a model -> what that is.
MAIN_INPUTS: Mapping[str, MediaKind] = {
    "input_ids": "text",
    "pixel_values": "image",
    "pixel_values_videos": "video",
    "input_values": "audio",
    "input_features": "audio",
}
#: What the configuration that a factory returns beside its model may say of its input.
_SETTINGS: Mapping[str, MediaKind] = {
    "sampling_rate": "audio",
    "num_frames": "video",
    "num_channels": "image",
    "image_size": "image",
}


@dataclass(frozen=True, kw_only=True)
class ModelPlace:
    """Where the model of a result is, and how to build it where the result does not say.

    Attributes:
        source: The id of a run or training, or the beginning of one, or an output folder.
        storage: Address of the database that ids are looked up in; None: the usual one.
        model: The float architecture with any weights, from a script; its attribute ``config`` tells how media are read.
        path: Where the original model folder is now, for a factory that is called with it.
        factory: ``module:function`` that builds the architecture; naming it runs it.
        factory_path: Folder of that module.
        allow_code: Further functions and folders that the manifest may lead to, as of ``resume``.
        device: Torch device; None: the first GPU, else the CPU.
    """

    source: Path | str
    storage: str | None = None
    model: nn.Module | None = None
    path: Path | None = None
    factory: str | None = None
    factory_path: Path | None = None
    allow_code: Collection[str | Path] = ()
    device: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerModel:
    """A quantized model, ready to run.

    Attributes:
        model: In evaluation mode, on ``device``.
        config: A transformers configuration, what the factory returned beside the model, or None.
        result: The output folder it came from.
        data: The data section of its run.
        device: Where it is.
        folder: Where the original model is, for processors, when it was built by a factory; None: in ``result``, or nowhere.
        architecture: The float architecture that it was built on, where ``result`` does not say how; None: it does.
    """

    model: nn.Module
    config: Any
    result: ResultFolder
    data: Any
    device: torch.device
    folder: Path | None
    architecture: nn.Module | None = None

    def setting(self, name: str) -> Any:
        """Value of the model's configuration, be it a mapping or one of transformers; None: it has none."""
        return self.config.get(name) if isinstance(self.config, Mapping) else getattr(self.config, name, None)

    @contextmanager
    def processors(self) -> Iterator[Path | None]:
        """A folder with tokenizer, image processor or feature extractor; None: there is none.

        Raises:
            InputError: Field ``RUN``: one of the files has changed.
        """
        if self.folder is not None or not self.result.has("quantized/config.json"):
            yield self.folder
        else:
            with as_written(), self.result.only_named("quantized") as folder:
                yield folder

    def reader(self, kind: MediaKind | None, limits: ItemLimits) -> ItemReader:
        """What reads its items.

        Args:
            kind: What it takes; None: as the model or its run say.
            limits: What an item may ask for.

        Raises:
            InputError: Nothing says what it takes, or what reads it is missing.
        """
        data = self.data
        source = MediaSource(
            path=Path(), sampling_rate=data.sampling_rate, frames=data.frames, image_size=data.image_size
        )
        with self.processors() as folder:
            found = kind or self._kind(folder)
            if found is None:
                raise InputError(
                    "--kind",
                    "is missing, and neither the model nor its run say what it takes",
                    "give text, image, audio or video",
                )
            return ItemReader(found, model_folder=folder, model_config=self.config, limits=limits, source=source)

    def takes(self) -> MediaKind | None:
        """What the model takes, as it or its run say; None: nothing says it.

        Raises:
            InputError: A file of its tokenizer has changed.
        """
        with self.processors() as folder:
            return self._kind(folder)

    def _kind(self, folder: Path | None) -> MediaKind | None:
        name = str(getattr(self.model, "main_input_name", "")) if self.setting("model_type") else ""
        if name in MAIN_INPUTS:
            found = MAIN_INPUTS[name]
            return "video" if found == "image" and self.setting("num_frames") else found
        if self.data.kind != "auto":
            return self.data.kind  # type: ignore[no-any-return]
        if has_tokenizer(folder):
            return "text"
        if isinstance(self.config, Mapping):
            for setting, kind in _SETTINGS.items():
                if self.config.get(setting):
                    return kind
        if self.data.path is None:
            return None
        try:
            return media_kind(MediaSource(path=self.data.path, files=self.data.files))
        except InputError:
            return None  # the run's media have moved


def open_model(place: ModelPlace, *, keep_dense: bool = False) -> IntegerModel:
    """Load the integer model of a result; the digests of all that decides what is computed are compared.

    Args:
        place: Where it is.
        keep_dense: Keep weights that are multiplied in floating point dequantized between calls, at most 4 bytes for each.

    Raises:
        InputError: No such run or folder, a run that is not finished, code that nobody allowed, an architecture that is missing, or a
            file that is not as it was written.
    """
    device = usable_device(place.device, "--device")
    with as_written():
        result = find_result(place.source, place.storage)
        config = _config_of(result)
        loaded: LoadedModel | None = None
        if place.model is not None:
            loaded = wrap_module(place.model)
        elif not result.has("quantized/config.json"):
            loaded = _built(place, result, config)
        model = load_quantized(result.path, None if loaded is None else loaded.model).to(device)
    for module in model.modules():
        if isinstance(module, QuantizedOperator):
            module.keep_dense = module.keep_codes = keep_dense
    return IntegerModel(
        model=model,
        config=getattr(model, "config", None) if loaded is None else loaded.config,
        result=result,
        data=config.data,
        device=device,
        folder=None if loaded is None else loaded.folder,
        architecture=None if loaded is None else loaded.model,
    )


def _config_of(result: ResultFolder) -> RunConfig:
    """Model and data of a run's configuration, without what runs code beside the model."""
    model, data = (result.manifest.config.get(name) for name in ("model", "data"))
    kept = {} if not isinstance(model, Mapping) else {**model, "trust_remote_code": False}
    media = {} if not isinstance(data, Mapping) else {**data, "factory": None, "metric": None, "metric_name": None}
    return RunConfig.build({"model": kept, "data": media})


def _built(place: ModelPlace, result: ResultFolder, config: RunConfig) -> LoadedModel:
    """The architecture by a function: the caller's, or the run's where the caller allows it."""
    where = result.path / FILE_NAME
    given = {"path": place.path, "factory": place.factory, "factory_path": place.factory_path}
    source = config.model.model_dump()
    if place.factory is not None:
        source |= {"factory_path": None}
    source |= {name: value for name, value in given.items() if value is not None}
    if source["factory"] is None:
        told = f"{where} does not say how to build the model: a script handed it over"
        raise InputError("--factory", told, "name a function that returns the model: --factory module:function")
    chosen = RunConfig.build({"model": source}).model
    named = [name for name in given.values() if name is not None]
    check_code(RunConfig.build({"model": source}), [*place.allow_code, *named], str(where))
    return load_model(path=chosen.path, factory=chosen.factory, factory_path=chosen.factory_path)
