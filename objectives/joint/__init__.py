"""Compression by sparse, low-rank and codebook forms of a model's weights together.

- ``branch``: smoothing, a low-rank branch and a quantized residual together
- ``codebook``: weights as a table of shared values and an index each
- ``drop``: how much of its metrics a model may lose while it is made smaller
- ``losses``: what a model in float is trained on: task losses by name
- ``low_rank``: weights as a product of two thin matrices
- ``metrics``: how far outputs are from their references: SNR, SI-SDR, STOI, PESQ
- ``packed``: a whole model as what is stored of it, and back
- ``ports``: what a task gives to the stages: loss, data, metrics
- ``rounds``: a model trained sparse, then made lower in rank and trained again until it loses too much
- ``sparsity``: scales of normalizations pushed to zero while a model is trained
- ``structure``: which normalization reads what which layer makes
- ``tasks``: tasks of labelled samples: classes, next tokens, waveforms
"""

__all__ = [
    "branch",
    "codebook",
    "drop",
    "losses",
    "low_rank",
    "metrics",
    "packed",
    "ports",
    "rounds",
    "sparsity",
    "structure",
    "tasks",
]
