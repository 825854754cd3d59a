"""The order in which samples are trained on, and seeds for places in it."""

from __future__ import annotations

import hashlib

import torch


def place_seed(seed: int, place: int, purpose: str) -> int:
    """A seed of its own for every place, the same in every process.

    Args:
        seed: Of the whole training; of any size.
        place: Number of the place.
        purpose: What is drawn there, so that two things drawn at one place differ.
    """
    digest = hashlib.blake2b(f"{seed}/{place}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


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
            generator = torch.Generator().manual_seed(place_seed(self._seed, number, "order"))
            self._pass, self._order = number, torch.randperm(self._samples, generator=generator).tolist()
        return self._order[within]
