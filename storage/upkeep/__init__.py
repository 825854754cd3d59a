"""Keeping a database in order: check, garbage, backup, upgrade.

- ``backup``: a copy of a whole database in one file, consistent while others write; it appears whole or not at all
- ``check``: consistency checks of a database and its artifact stores
- ``delete``: deleting a run or a training: its records, its studies and the objects that nothing else needs
- ``garbage``: garbage collection: objects, rows, studies and folders of ended runs that nothing refers to
- ``upgrade``: bringing both sets of tables up to date: a backup first, then Optuna's, then ours
"""

__all__ = ["backup", "check", "delete", "garbage", "upgrade"]
