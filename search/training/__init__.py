"""A compressed model trained further on labelled media: what is read, what is kept, where it is recorded. Source: claim A-13.

- ``_checkpoints``: checkpoints of a training as files
- ``_draw``: which samples are trained on and which are held out
- ``_kept``: samples kept in memory once they are decoded
- ``_parent``: the result that a training starts from
- ``_result``: the folder of a trained model: an integer model again, its manifest, its report
- ``_samples``: labelled samples, read from media as the model wants them or taken from a script
- ``_study``: a study over the settings of a training
- ``config``: what a training is asked for
- ``finetune``: from a run's folder to a folder beside it
"""

__all__ = ["config", "finetune"]
