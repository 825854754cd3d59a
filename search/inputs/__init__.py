"""What a run works on: model and data, sites, hardware, calibration.

- ``_plain_model``: the model that is searched: plain operators in place of what hides its products
- ``_weighed_rows``: calibration rows with weights in units of the model's output
- ``calibration_cache``: calibration rows and statistics in the artifact store
- ``folder_task``: a Hugging Face model and labelled media as a task of joint compression
- ``format_cost``: what a site costs on the target in every format: multiply-adds, bytes moved, seconds
- ``hardware``: the budget of the machine that will run the model, and how scarce it is
- ``kernel_probe``: what libraries make of 8-bit products on this machine: exact integers, or saturating pairs
- ``labelled_samples``: samples with labels, of media that are read when asked for
- ``permission``: code that a record names: it runs only where whoever starts the process names it, too
- ``preparation``: from a task to searchable sites: discovery, memory plan, calibration, hardware
- ``streaming``: how much of the model a run has in memory: all of it, or block by block
- ``task``: the task of a run: a float model, three disjoint splits of data, and a task metric if there is one
- ``versions``: versions that a result depends on
"""

__all__ = [
    "calibration_cache",
    "folder_task",
    "format_cost",
    "hardware",
    "kernel_probe",
    "labelled_samples",
    "permission",
    "preparation",
    "streaming",
    "task",
    "versions",
]
