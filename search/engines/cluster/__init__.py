"""Candidates evaluated on a Ray cluster.

- ``_actors``: actors on the nodes of a Ray cluster: the trainable that searches a site
- ``_connection``: finds a Ray cluster, or starts one
- ``_mailbox``: the mailbox between the searches on a Ray cluster and the process that records them
- ``_racer``: scores candidate models on the nodes of a Ray cluster
- ``_ray_private``: all that is used of Ray and private to it: the idle actors of a Tune run, and the actor of a trial
- ``_tune_run``: the Tune run of an engine: a thread in which Ray Tune schedules the searches of sites as its trials
- ``engine``: the engine of a cluster: Ray Tune schedules the searches of sites as its trials, on every node there is
"""

__all__ = ["engine"]
