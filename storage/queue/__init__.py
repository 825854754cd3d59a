"""Work handed out under leases: tickets, attempts, workers, the driver.

- ``_driver_lease``: the driver's lease: one process at a time may record a run
- ``_plan``: the plan of a run: its tickets in order, what they wait for
- ``_reads``: reads of a work queue: tickets, workers, results and how far a run is
- ``_transitions``: state transitions of tickets under leases, each inside a transaction that its caller began
- ``board``: the work queue of a run: waiting sites, leases, and accepted results
- ``leases``: leases: who holds one, by whose clock it ends, and the thread that keeps it alive
- ``records``: records shared between the processes that work on one run: tickets, claims, workers
- ``status``: status of a run: its state, its sites and who works on it, as of one moment by the database's clock
- ``trial_claims``: trials of a study that several processes share: which is whose, and which belong to nobody any more
"""

__all__ = ["board", "leases", "records", "status", "trial_claims"]
