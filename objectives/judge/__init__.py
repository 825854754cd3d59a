"""The exact loss of a candidate, at a site and at the output; proof and memory.

- ``_module_calls``: calls of a model's modules: intercepted, compared, and traced for what they read, take and leave behind
- ``_prefix``: outputs of a model's modules under one candidate, returned in the place of computing them again for others
- ``_site_kernel``: squared output errors of quantized rows: the arithmetic behind the exact judge of one site
- ``answers``: every floating tensor of an output, how far two answers are apart, and what they carry
- ``candidate_batch``: candidates of one site scored together on growing subsets of its rows
- ``early_proof``: sites folded by random scales before the search; those that change the model are left alone
- ``equivalence``: proof that folding did not change the float model, and the name of the site that did when it fails
- ``losses``: losses between two outputs on identical data: formula fA5 and its relative and divergence forms
- ``memory``: peak memory of a run: predicted before it starts, fitted to a budget, measured afterwards
- ``model_objective``: exact loss of a whole candidate model: its output against the float model's on identical data
- ``producer_noise``: what a site's scales do to the weights that produce its input, in the loss of a candidate
- ``site_objective``: exact loss of a site: its rows and weights quantized under given scales
"""

__all__ = [
    "answers",
    "candidate_batch",
    "early_proof",
    "equivalence",
    "losses",
    "memory",
    "model_objective",
    "producer_noise",
    "site_objective",
]
