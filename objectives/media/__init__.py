"""One interface for text, images, audio, video and in-memory batches."""

from __future__ import annotations

from alphasmith.objectives.media.batches import MediaBatches, Splits, data_digest, in_memory, split_batches
from alphasmith.objectives.media.loader import load_media
from alphasmith.objectives.media.source import MediaKind, MediaSource

__all__ = [
    "MediaBatches",
    "MediaKind",
    "MediaSource",
    "Splits",
    "data_digest",
    "in_memory",
    "load_media",
    "split_batches",
]
