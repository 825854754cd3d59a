"""The model's output: whole-model search, refinement, variants.

- ``_output_scorer``: losses of candidate models at the output, for studies
- ``_refinement_space``: the search space of a whole-model refinement: kinds of sites, choices of sites
- ``_refinement_verdict``: the held-out judge of a refinement
- ``refinement``: whole-model refinement
- ``refinement_stage``: the refinement of the sites' winners at the model's output, after all sites were searched
- ``search``: claim A-2 to the letter: one study, K alphas over all channels of the model, N candidate models
- ``variants``: the whole model under every candidate that matters: loss at the output on held-out data
"""

__all__ = ["refinement", "refinement_stage", "search", "variants"]
