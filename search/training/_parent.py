"""The result that a training starts from: whole, finished, and as it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.objectives.model.labels import is_classifier
from alphasmith.search.checkpoints.find import as_written
from alphasmith.search.checkpoints.load import load_smoothed
from alphasmith.search.processing.answers import are_distributions
from alphasmith.search.processing.opening import IntegerModel, ModelPlace, open_model
from alphasmith.storage.files.durable import digest_file
from alphasmith.storage.output.manifest import FILE_NAME


@dataclass(frozen=True, kw_only=True, eq=False)
class Parent:
    """A finished result.

    Attributes:
        opened: Its integer model, and how its inputs are read.
        digest: sha256 of its manifest.
        place: Where it was found, for who needs the architecture again.
    """

    opened: IntegerModel
    digest: str
    place: ModelPlace

    @property
    def run(self) -> str:
        """Id of the run that made it."""
        return self.opened.result.manifest.run.id

    def float_model(self) -> nn.Module | None:
        """The float model, in evaluation mode; None: a trained result holds none.

        Raises:
            InputError: The architecture is needed and nobody names it.
        """
        result = self.opened.result
        if not result.names("smoothed"):
            return None
        with as_written():
            return load_smoothed(result.path, self.opened.architecture).to(self.opened.device).eval()


def open_parent(place: ModelPlace) -> Parent:
    """Open a result, after the digest of every file was compared.

    Args:
        place: Where it is.

    Raises:
        InputError: No such result, a run that is not finished, a file that is not as it was written, or an architecture that is missing.
    """
    opened = open_model(place)
    with as_written():
        opened.result.check()
    digest = digest_file(opened.result.path / FILE_NAME).sha256
    return Parent(opened=opened, digest=digest, place=place)


def ends_in_probabilities(opened: IntegerModel, batch: Batch) -> bool:
    """Whether a model answers with probabilities, not with scores before a softmax.

    Args:
        opened: The model.
        batch: Any samples.
    """
    if is_classifier(opened.model):
        return False
    with torch.no_grad():
        rows: Any = main_output(call(opened.model, batch.to(opened.device)))
    if rows.dim() != 2 or rows.shape[1] < 2:
        return False
    return bool(are_distributions(rows).all())
