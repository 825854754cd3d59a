"""Fuzzing: what strangers may write, spoilt at random; no exception but ours may escape, nothing may hang or crash.

A few examples of every target are part of ``make test``; ``python -m tests.fuzz --minutes 60`` goes on for as long as it is told.
"""
