"""Tiny random models of many architectures, and what discovery must find in each.

To add one, append an ``Architecture`` to ``TEXT``, ``MEDIA`` or ``MODULES``: ``test_architectures.py`` folds every site of
every entry. Models are random in every parameter and buffer (norms are not 1, biases not 0, running statistics not
fresh), so that a wrong fold cannot hide behind a neutral value.
"""

from __future__ import annotations

from tests.support.architecture_media import MEDIA
from tests.support.architecture_modules import MODULES
from tests.support.architecture_records import Architecture
from tests.support.architecture_text import TEXT

ARCHITECTURES: tuple[Architecture, ...] = (*TEXT, *MEDIA, *MODULES)
