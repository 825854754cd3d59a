"""Joint compression of a model as a study: sparse, low-rank and codebook forms together.

- ``_cache``: finished stages as files under the digest of what they were made from
- ``_launch``: what a compression works with: begun anew, or as its record says
- ``_result``: the folder of a compressed model, its manifest, its report
- ``_signals``: voiced and unvoiced signals in noise, generated
- ``_space``: what a trial chooses
- ``_stages``: from a trained model to a packed one, stage by stage
- ``_study``: trials, drops as constraints, the front
- ``_task``: the model and what it is for
- ``_workers``: trials worked on in this process, or by workers that join the study in the database
- ``artifact``: a compressed model, and what explains it, out of its output folder
- ``compress``: a compression from first to last
- ``config``: what a compression is asked for
- ``embedded``: the embedded default: a speech-enhancement model, its data and its metrics
- ``worker``: one more worker on a compression
"""

__all__ = ["artifact", "compress", "config", "embedded", "worker"]
