"""A whole model as what is stored of it: codebooks, factors, and what stays float.

- ``_classes``: which class of layer a tensor belongs to
- ``_layout``: how a model's modules differ from those of the architecture it was made of, and the way there
- ``_lossless``: what nobody trains, bit by bit in fewer bytes
- ``forms``: in which form layers run: what is faster on the machine and the data at hand
- ``inputs``: what the matrices of a model read while it runs on samples
- ``packing``: every tensor of a model under a codebook or as it is, and the bytes of all of it
- ``restoring``: a packed model out of the float architecture, bit by bit
- ``tuning``: tables trained on the task while every weight keeps its entry
"""

__all__ = ["forms", "inputs", "packing", "restoring", "tuning"]
