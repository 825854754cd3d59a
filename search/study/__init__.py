"""One Optuna study of anything: candidates, space, sampler, record.

- ``_sampler``: optuna samplers and pruners by name, made to sample a frozen space
- ``alpha_ranges``: alpha ranges of groups from their magnitudes and from the hardware
- ``candidates``: what can be tried at a site or at the whole model, its Optuna parameters
- ``fault_isolation``: isolation of failing candidates
- ``guard``: the guard: the best trial of a study keeps its place only if no baseline beats it on held-out data
- ``space``: the frozen search space of a study: numbers inside their ranges and choices, hashed
- ``study``: one recorded study of anything that has a kind and parameters: a site, the whole model, a refinement
- ``study_record``: logs of a study: kept in the database of this process, or sent to the process that has one
- ``trial``: one trial: how scoring a candidate ended, the result on record, and how it stands in Optuna's tables
- ``types``: what a study is given: a scorer, a search space, and the context in which it is made
- ``writer``: one thread that writes to the database while the search goes on: order is kept
"""

__all__ = [
    "alpha_ranges",
    "candidates",
    "fault_isolation",
    "guard",
    "space",
    "study",
    "study_record",
    "trial",
    "types",
    "writer",
]
