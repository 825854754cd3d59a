"""Plotly figures of sites, alphas and histories.

- ``_alphas``: figures of the chosen alphas: against the magnitude of their groups, and over sites and groups
- ``_history``: search history: losses by trial number, of one study or of many
- ``_parts``: parts that several figures share: named rows, line segments, and figures that have nothing to show yet
- ``_shares``: figure of the sites that make the largest part of the error at the model's output
- ``_theme``: one look for every figure: palette, fonts, axes, and the words for the series
- ``compression``: size against what was lost
- ``formats``: output loss against the cost of formats of sites
- ``sites``: figures of a run, from data frames: where each site stands, which alphas were chosen
- ``training``: the curve of a training: losses by updates, and what was kept
"""

__all__ = ["compression", "formats", "sites", "training"]
