"""One interface for text, images, audio, video and in-memory batches.

- ``_audio``: audio files, by the model's own feature extractor where it has one
- ``_bounds``: bounds of what media files and the settings of processors may ask for, and their formats
- ``_conversations``: conversations as data sets hold them, as text by the tokenizer's chat template
- ``_images``: images, by the model's own image processor where it has one
- ``_loader``: loading of media from disk by kind
- ``_records``: tables and records: jsonl, csv and parquet files, a record at a time
- ``_source``: where calibration media lie and how much of them is wanted
- ``_targets``: what samples stand for, as data sets say it
- ``_video``: video: files decoded by PyAV, or folders of frames
- ``batch``: one batch of media as the model is called with it
- ``batches``: batches as a lazy sequence, the three splits, and a digest of what was used
- ``in_memory``: batches as a launch script has them
- ``items``: single items as a model takes them, from files, bytes and texts
- ``text``: text: windows of plain files, fields of records, conversations, and the tokenizer beside a model
"""

from __future__ import annotations

from alphasmith.objectives.media._bounds import Content, NamedBytes
from alphasmith.objectives.media._loader import load_media, media_kind
from alphasmith.objectives.media._source import MediaSource
from alphasmith.objectives.media.batches import MediaBatches, Splits, data_digest, split_batches
from alphasmith.objectives.media.in_memory import in_memory

__all__ = [
    "Content",
    "MediaBatches",
    "MediaSource",
    "NamedBytes",
    "Splits",
    "data_digest",
    "in_memory",
    "load_media",
    "media_kind",
    "split_batches",
]
