"""Smoothing, a low-rank branch and a quantized residual together: y = (X / s) L + Q(X / s) Q(R), formula fB11.

- ``choice``: alpha and rank of a layer chosen together by its output error, within a number of bytes
- ``encoding``: a weight as branch and residual, refitted while the error of its output falls
- ``layers``: linear layers and convolutions that run in this form
- ``placement``: the layers of a model in this form wherever that has fewer bytes
- ``rows``: what a layer reads: sampled rows and the range of every channel
- ``settings``: how a weight becomes branch and residual
- ``_smoothed``: a weight and its rows under smoothing scales, decomposed once
- ``stored``: branch and residual as plain tensors and a JSON-able entry, and back, bit for bit
"""

__all__ = ["choice", "encoding", "layers", "placement", "rows", "settings", "stored"]
