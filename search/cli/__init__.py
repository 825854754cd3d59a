"""The command line and its texts.

- ``_compress``: ``alphasmith compress``: a model made smaller by sparse, low-rank and codebook forms together
- ``_db``: ``alphasmith db``: making, upgrading, checking, cleaning and copying the trial database
- ``_export``: ``alphasmith export`` and ``alphasmith recipe``: a result in the format of another tool, or as a script for its quantizer
- ``_finetune``: ``alphasmith finetune``: a compressed model trained further on labelled media
- ``_layout``: tables and sentences as a terminal holds them
- ``_options``: options that several commands take, and how every command prints its answer
- ``_processing``: ``alphasmith classify`` and ``alphasmith generate``: the compressed model at work
- ``_serve``: ``alphasmith serve``: the integer model of a run behind HTTP
- ``answers``: what the smaller commands answer, as plain text for a terminal
- ``commands``: what each command does, apart from reading its arguments and printing its answer
- ``main``: the command line, ``alphasmith``
- ``tables``: what a run came to, as plain text for a terminal: at its end, and whenever ``alphasmith show`` is asked
- ``watching``: progress of a run from anywhere: all that is shown is read from its database
"""

__all__ = ["answers", "commands", "main", "tables", "watching"]
