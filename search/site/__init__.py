"""The search of one site: parametrizations, proposals, exact scores, result.

- ``_group_count``: how many groups a site gets where K is ``auto``
- ``_noise_report``: how far the noise model of a site is trusted, when its per-channel limit ends a study
- ``_opening``: the beginning of a search: the noise model, a first proposal, the best single alpha
- ``_proposals``: proposals of the noise model at a site, made before the sampler has seen a loss
- ``_scorer``: exact losses of a site's candidates: on growing subsets of its search rows
- ``_static_range``: the static range of the winner's activation, judged on held-out rows
- ``memory``: memory that the search of one site takes
- ``parametrization``: parametrizations of a site (shift, statistic, grouping)
- ``result``: the result of a search at one site: the winner, its losses, and how the search went
- ``search``: the search at one site: group its channels, bound their alphas, try candidates, guard the winner
- ``settings``: settings of the search at a site
"""

__all__ = ["memory", "parametrization", "result", "search", "settings"]
