"""The connection to the database: addresses, tables, retries, locks.

- ``connection``: the connection to a database: opening, creation of the schema, and Optuna's storage on it
- ``optuna_private``: all that is used of Optuna and private to it: its tables and their models, its cache
- ``retries``: retries of what the database lost: a dropped connection, a server that restarts, a deadlock
- ``schema_lock``: one process at a time makes or changes the schema (racing processes fail or corrupt it)
- ``tables``: our tables, beside Optuna's and without keys into them
- ``urls``: storage addresses: which driver, where, and how to print them without their password
"""

__all__ = ["connection", "optuna_private", "retries", "schema_lock", "tables", "urls"]
