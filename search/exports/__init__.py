"""Formats that other tools read.

- ``_card``: the model card of an export
- ``_compressed_tensors``: checkpoints in the layout of compressed-tensors, which transformers and vLLM load
- ``_plain_sites``: operators as if no alpha had been found, for formats without a division at run time
- ``export``: ``alphasmith export``: a result in the format of another tool, whole or not at all
- ``onnx``: ONNX models that compute with the integers of a result
- ``recipes``: scripts for the quantizers of other tools, which begin from ``smoothed/``
- ``source``: what an export is made from, read only as it was written
- ``verification``: an exported folder against its record and against the run that it came from
"""

__all__ = ["export", "onnx", "recipes", "source", "verification"]
