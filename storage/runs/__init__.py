"""Records of runs, sites, groups and trials.

- ``_run_rows``: runs as records, row by row: a row of another shape stands in nobody's way
- ``_trials``: trials of a run, read from Optuna's tables: those that have ended and say who proposed them
- ``compressions``: joint compressions in SQL: each is an Optuna study that says itself what it is of
- ``data_frames``: records as pandas frames, for figures, tables and notebooks
- ``entries``: what is known of a site, once: the winner carries these parts, the database and the manifest keep them
- ``records``: records of runs, sites, groups and trials: frozen, validated, free of SQL and of torch
- ``run_store``: runs and their sites in SQL, and the trials that Optuna's tables hold of them: one contract
- ``trainings``: trainings of compressed models in SQL, beside the runs that made these
"""

__all__ = ["compressions", "data_frames", "entries", "records", "run_store", "trainings"]
