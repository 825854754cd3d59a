"""The model's output: whole-model search, sweep, refinement, variants.

- ``_descent``: coordinate search at the output: one unit after the other
- ``_output_scorer``: losses of candidate models at the output, for studies
- ``_settings``: what sites may be set to, by kind or one by one, and the Optuna parameters it becomes
- ``held_out``: the held-out judge of whole models: two of them compared sample by sample
- ``refinement``: whole-model refinement, from coarse to fine
- ``refinement_stage``: the refinement of the sites' winners at the model's output, after all sites were searched
- ``search``: claim A-2 to the letter: one study, K alphas over all channels of the model, N candidate models
- ``sweep``: one alpha for the whole model, swept at the output
- ``variants``: the whole model under every candidate that matters: loss at the output on held-out data
"""

__all__ = ["held_out", "refinement", "refinement_stage", "search", "sweep", "variants"]
