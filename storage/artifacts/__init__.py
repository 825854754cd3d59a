"""The store of artifacts, on disk or in a bucket.

- ``_bucket``: an S3 bucket, or part of one, behind Optuna's artifact interface; errors are one line
- ``folder``: a folder of objects behind Optuna's artifact interface: every object appears whole or not at all
- ``run_artifacts``: objects of a run in the artifact store and the rows that find them again: by name in the run
- ``store``: tensors by content: what a run needs to go on, in a folder or a bucket that all its processes reach
"""

__all__ = ["folder", "run_artifacts", "store"]
