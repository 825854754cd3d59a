"""The compressed model trained further, through its quantizers: claim A-13.

- ``_rounding``: quantizers that gradients pass
- ``_teacher``: the float model's outputs for every sample, computed once
- ``_verdict``: whether one model is better than another on the same samples, beyond their noise
- ``fake_quantized``: a compressed model in float whose weights and activations are rounded in every forward pass
- ``loop``: updates, looks at held-out samples, checkpoints, the verdict
- ``losses``: losses of single samples, the distance from the float model, and their mix
- ``outcome``: what a training came to: its curve, what was kept and why
- ``ports``: what a training is given by others: samples, a metric of single samples, a place for checkpoints
- ``sampler``: the order in which samples are trained on
- ``schedule``: how the learning rate goes over the updates
- ``settings``: how a compressed model is trained
"""

__all__ = ["fake_quantized", "loop", "losses", "outcome", "ports", "sampler", "schedule", "settings"]
