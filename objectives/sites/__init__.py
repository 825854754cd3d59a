"""Sites: which operators read which tensor, and what can absorb a scale.

- ``_edits``: parameter edits made from the labels of a propagation
- ``_experts``: which sites feed the experts of a mixture-of-experts layer
- ``_propagation``: which values shrink along with a site's input: labels, ties
- ``_reach``: parameters that the traced call did not read: whose they are, and which tensors their layers could meet
- ``_reasons``: every weight of a model, and why it cannot be quantized, as the traced call shows it
- ``_rules``: rules for what an operation does to scales: one per aten operation, keyed by its name
- ``_shifts``: where a shift of a site's input can go into biases (Outlier Suppression+, arXiv 2304.09145)
- ``_weights``: linear and convolution operators of a graph, found by the identity of their weight
- ``coverage``: how much of a model is quantized: every weight with its share, its status and the true reason
- ``discovery``: sites of a model, found by tensor identity in one traced forward pass (traps T5, T6)
- ``folded_weights``: the weights of a model as the folds decided so far leave them
- ``folding``: smoothing folded into parameters: the one home of ``p' = (p + offset) * s**power - offset``
- ``graph``: one traced forward pass as a graph of values in single-assignment form
- ``types``: what discovery finds, as plain frozen records
"""

__all__ = ["coverage", "discovery", "folded_weights", "folding", "graph", "types"]
