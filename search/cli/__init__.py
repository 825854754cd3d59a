"""The command line and its texts.

- ``_db``: ``alphasmith db``: making, upgrading, checking, cleaning and copying the trial database
- ``_status``: progress of a run as text and as JSON, read from its database
- ``_options``: options that several commands take, and how every command prints its answer
- ``_watch``: progress of a run from anywhere: all that is shown is read from its database
- ``commands``: what each command does, apart from reading its arguments and printing its answer
- ``main``: the command line, ``alphasmith``
- ``tables``: results as plain text for a terminal
"""

__all__ = ["commands", "main", "tables"]
