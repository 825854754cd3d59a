"""What is kept: run, site and trial records, artifacts, migrations, output folders.

- ``artifacts``: the store of artifacts, on disk or in a bucket
- ``database``: the connection to the database: addresses, tables, retries, locks
- ``files``: files that survive a crash: durable writes and tensors with digests
- ``migrations``: alembic environment of the tables of Alphasmith (its own version table, Optuna's tables untouched)
- ``output``: the output folder of a run and the manifest that explains it
- ``queue``: work handed out under leases: tickets, attempts, workers, the driver
- ``runs``: records of runs, sites, groups and trials
- ``upkeep``: keeping a database in order: check, garbage, backup, upgrade
"""

__all__ = ["artifacts", "database", "files", "migrations", "output", "queue", "runs", "upkeep"]
