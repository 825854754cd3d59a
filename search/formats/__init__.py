"""Formats of sites under a budget: what smoothing alone cannot mend, mended where it costs least.

- ``_plans``: a format for every site, what it costs, how it is told
- ``_prediction``: what every site would add to the loss at the model's output in every format
- ``_program``: which format every site gets: the integer program behind the front
- ``advice``: what another format at the few sites that make most of the error would bring
- ``record``: the study of the choices, on record as it is made
- ``stage``: the stage of a run: predict, solve, measure, pick
"""

__all__ = ["advice", "record", "stage"]
