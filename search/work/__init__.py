"""Sites handed out: plan, sources, stage, accepted results, the session under a lease.

- ``_published_site``: a site as another process needs it, without the model: its rows, its weights
- ``plan``: the plan of a run: which sites it will search
- ``session``: one run, open for work: its records, its tickets, its objects in the artifact store
- ``site_records``: results of searches as the storage keeps them: one site's record, its groups
- ``site_results``: accepted results of sites: stored once, read again when the run is resumed
- ``site_sources``: sources of a site's rows and weights: the model in this process, or what its driver has published
- ``site_stage``: the stage that searches all sites of a run, one study each, shared with other workers
- ``waiting``: waiting for a database and what is to be worked on in it to appear
"""

__all__ = ["plan", "session", "site_records", "site_results", "site_sources", "site_stage", "waiting"]
