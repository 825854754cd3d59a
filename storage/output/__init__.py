"""The output folder of a run and the manifest that explains it.

- ``_parents``: folders made on the way to a place, which go again where nobody came to use them
- ``_named_files``: files of a folder as its manifest names them, only as they were written, never through links
- ``checkpoint``: a checkpoint as one safetensors file, or as shards with an index
- ``compressed_folder``: the output folder of a joint compression: written once, read only as it was written
- ``compression_manifest``: the manifest of a joint compression
- ``entries``: the parts of a manifest; ``manifest`` puts them together
- ``export_record``: ``export.json``: what an exported folder is, and what it was made from
- ``format_entries``: the parts of a manifest about formats of sites
- ``manifest``: the manifest: the JSON that explains a result completely
- ``output_folder``: the output folder of a run: appears whole or not at all
- ``reservation``: a place for a result, reserved by one process while it works towards it
- ``reserved_work``: who works on a training or a compression: the process that has reserved the place of its result
- ``result_folder``: reading an output folder: only files that its manifest names, only as they were written, never through links
- ``training_entry``: the section of a manifest that says how a compressed model was trained further
"""

__all__ = [
    "checkpoint",
    "compressed_folder",
    "compression_manifest",
    "entries",
    "export_record",
    "format_entries",
    "manifest",
    "output_folder",
    "reservation",
    "reserved_work",
    "result_folder",
    "training_entry",
]
