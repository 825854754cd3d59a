"""Progress of a run, read from its database, from anywhere.

- ``status``: as text and as JSON
- ``watch``: shown until the run ends
"""

__all__ = ["status", "watch"]
