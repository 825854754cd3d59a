"""One run from first to last line: launch, go on, outcome, manifest, record.

- ``_blockwise``: a run block by block: one block's weights, rows and activations in memory at a time, everything else in files
- ``_formats``: formats of sites in a run
- ``_look_ahead``: what a run block by block sees of its model before anything is on record: sites, memory, room on the device
- ``_lookup``: runs found, created and opened from a configuration or a recorded run
- ``_manifest_builder``: the manifest of a run, put together from what it decided
- ``_outcome``: what a run decided and made, between the search and the records
- ``_parts``: what is known of one part of a model that is read block by block, and all parts put together
- ``_rounded``: scales rounded to powers of two, and what that costs at the output
- ``_states``: what goes from block to block, as files of a folder that a killed run finds again
- ``pipeline``: the main job, end to end: search, guard, prove, quantize, keep
- ``recorder``: the driver's records of a run: the outcome, the output folder, the end
- ``site_searches``: the searches of the sites of a model, and what of its calibration candidates are built from
- ``worker``: an autonomous worker: searches sites of a run through its database, without its model or its data
"""

__all__ = ["pipeline", "recorder", "site_searches", "worker"]
