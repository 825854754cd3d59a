"""Compression by sparse, low-rank and codebook forms of a model's weights together.

- ``codebook``: weights as a table of shared values and an index each
- ``low_rank``: weights as a product of two thin matrices
- ``metrics``: how far outputs are from their references: SNR, SI-SDR, STOI, PESQ
- ``packed``: a whole model as what is stored of it, and back
- ``sparsity``: scales of normalizations pushed to zero while a model is trained
- ``structure``: which normalization reads what which layer makes
"""

__all__ = ["codebook", "low_rank", "metrics", "packed", "sparsity", "structure"]
