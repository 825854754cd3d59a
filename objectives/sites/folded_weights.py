"""The weights of a model as the folds decided so far leave them, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from alphasmith.objectives.sites.folding import folded_parameters
from alphasmith.objectives.sites.types import Site
from alphasmith.objectives.smoothing import Smoothing


class FoldedWeights(Mapping[str, Tensor]):
    """Tensors by name with the producers' edits of smoothed sites applied when a tensor is asked for.

    Folding the input of ``o_proj`` changes rows of ``v_proj``: a site searched later must see these rows, while the model
    keeps its own. Nothing is kept, so every look-up of an edited tensor computes it anew.

    Args:
        tensors: Pristine parameters and buffers by full name; read, never written.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._folds: dict[str, list[tuple[Site, Smoothing]]] = {}

    def fold(self, site: Site, smoothing: Smoothing) -> None:
        """Scale what this site's producers write from now on; sites of other modes than ``fold`` have none.

        Args:
            site: A searched site.
            smoothing: Its winner; the shift is left out, because it changes no weight.
        """
        if site.mode != "fold":
            return
        scaled = replace(smoothing, shift=None)
        for name in {edit.parameter for edit in site.edits if edit.power < 0}:
            edits = tuple(e for e in site.edits if e.power < 0 and e.parameter == name)
            self._folds.setdefault(name, []).append((replace(site, edits=edits, shift_edits=()), scaled))

    def __getitem__(self, name: str) -> Tensor:
        """The tensor ``name`` after all folds so far."""
        value = self._tensors[name]
        for site, smoothing in self._folds.get(name, ()):
            value = folded_parameters({name: value}, site, smoothing)[name]
        return value

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._tensors)
