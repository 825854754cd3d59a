"""The order in which samples are trained on."""

from __future__ import annotations

import torch


class EndlessOrder:
    """Pass after pass over all samples, each in an order of its own; what was handed out is all of its state.

    Args:
        samples: Number of samples.
        seed: Of the orders.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self._samples, self._seed = samples, seed
        self._pass, self._order = -1, [0]
        self.drawn = 0

    def draw(self, count: int) -> list[int]:
        """Numbers of the next samples.

        Args:
            count: How many.
        """
        numbers = [self._at(self.drawn + place) for place in range(count)]
        self.drawn += count
        return numbers

    def _at(self, place: int) -> int:
        number, within = divmod(place, self._samples)
        if number != self._pass:
            # Seeds of neighbouring passes are as good as any: the generator mixes them.
            generator = torch.Generator().manual_seed((self._seed << 24) + number)
            self._pass, self._order = number, torch.randperm(self._samples, generator=generator).tolist()
        return self._order[within]
