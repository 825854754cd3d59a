"""How far outputs are from their references: SNR, SI-SDR, STOI and, where it is installed, PESQ.

- ``_signals``: signal to noise of one output against its reference
- ``scores``: signal metrics over many outputs, guarded: what cannot be measured is left out and counted
"""

__all__ = ["scores"]
