"""One run from first to last line: launch, go on, outcome, manifest, record.

- ``_formats``: formats of sites in a run
- ``_lookup``: runs found, created and opened from a configuration or a recorded run
- ``_manifest_builder``: the manifest of a run, put together from what it decided
- ``_outcome``: what a run decided and made, between the search and the records
- ``pipeline``: the main job, end to end: search, guard, prove, quantize, keep
- ``recorder``: the driver's records of a run: the outcome, the output folder, the end
- ``worker``: an autonomous worker: searches sites of a run through its database, without its model or its data
"""

__all__ = ["pipeline", "recorder", "worker"]
