"""Alembic environment of the tables of Alphasmith (version table of its own, Optuna's tables untouched)."""
