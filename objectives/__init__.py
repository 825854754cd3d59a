"""What a candidate costs: sites, calibration, groups, scales, quantization, losses, folding.

- ``blocks``: a model that is larger than memory: its repeated blocks, one at a time, as models of their own
- ``calibration``: what the float model does on data: statistics, rows, the data of a site
- ``dead_channels``: scales of channels that say nothing, or hardly anything, of their own scale
- ``demo``: small models trained on data that ships with Python packages, for the embedded demo
- ``errors``: errors a user can act on, named by remedy
- ``extras``: packages that only some installations have
- ``finite``: whether a tensor is free of NaN and infinity
- ``groups``: groups of channels by magnitude: claims A-6, A-8, A-10
- ``joint``: compression by sparse, low-rank and codebook forms of a model's weights together
- ``judge``: the exact loss of a candidate, at a site and at the output; proof and memory
- ``literals``: the words that configuration, search, records and figures have in common, each written down once
- ``media``: one interface for text, images, audio, video and in-memory batches
- ``model``: the float model: loading, recurrent layers, task metrics
- ``noise``: the model of rounding noise, its optimum, the limit per channel
- ``partition``: optimal one-dimensional k-means, for groups of channels and for codebooks
- ``quantization``: what is deployed: schemes, quantizers, integer operators, their files
- ``reading``: what strangers wrote: paths, files and JSON, read within bounds, refused in one line
- ``sensitivity``: what the model's output feels of the error of a site, a row, an output
- ``sites``: sites: which operators read which tensor, and what can absorb a scale
- ``smoothing``: smoothing scales from channel statistics and alphas: formula fA1, its one home
- ``stored_types``: the types a model's tensors came in: searched in float32, kept in its own type again
- ``text``: values as text, each in one way everywhere: sizes, numbers, durations, times, names, errors
- ``training``: the compressed model trained further, through its quantizers: claim A-13
"""

__all__ = [
    "blocks",
    "calibration",
    "dead_channels",
    "demo",
    "errors",
    "extras",
    "finite",
    "groups",
    "joint",
    "judge",
    "literals",
    "media",
    "model",
    "noise",
    "partition",
    "quantization",
    "reading",
    "sensitivity",
    "sites",
    "smoothing",
    "stored_types",
    "text",
    "training",
]
