"""Data frames as the figures and the report expect them: required columns, finite numbers, bounded length."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.storage.runs.entries import Losses

#: What the figures need of a frame; the losses are those on held-out rows.
SITE_COLUMNS = ("site", "position", "mode", "channels", *Losses.model_fields, "seconds", "trials")
#: Likewise, where they are known.
SHARE_COLUMNS = ("share", "share_measured")
GROUP_COLUMNS = ("site", "group", "size", "low", "high", "alpha", "magnitude")
TRIAL_COLUMNS = ("number", "kind", "loss", "state")
LOSS_COLUMNS = tuple(name for name in Losses.model_fields if name != "best_single_alpha")


def checked(frame: pd.DataFrame, columns: tuple[str, ...], name: str, numeric: tuple[str, ...]) -> pd.DataFrame:
    """The frame with a fresh index and float columns, or a reason why it cannot be drawn.

    Args:
        frame: Any frame that has at least ``columns``.
        columns: Required columns.
        name: Name of the argument, for the message.
        numeric: Columns to turn into float64; missing values become NaN ("not measured").

    Returns:
        A copy; the caller's frame is not touched.

    Raises:
        InputError: A column is missing or holds something that is not a number.
        NonFiniteError: A number is infinite; such a value must never be drawn as a loss.
    """
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise InputError(name, f"has no column {', '.join(missing)}", f"give the columns {', '.join(columns)}")
    result = frame.reset_index(drop=True).copy()
    for column in numeric:
        try:
            result[column] = pd.to_numeric(result[column]).astype("float64")
        except (TypeError, ValueError) as error:
            raise InputError(
                name, f"column {column} is not numeric", "give numbers, NaN where there is none"
            ) from error
        if bool(np.isinf(result[column].to_numpy()).any()):
            raise NonFiniteError(f"{name}: column {column} holds an infinite value")
    return result


def checked_sites(sites: pd.DataFrame) -> pd.DataFrame:
    """A valid site frame in network order; shares of the output's error are NaN where they are not given. See :func:`checked`."""
    given = sites.assign(**{name: np.nan for name in SHARE_COLUMNS if name not in sites.columns})
    numeric = ("position", *LOSS_COLUMNS, "best_single_alpha", "seconds", *SHARE_COLUMNS)
    frame = checked(given, SITE_COLUMNS, "sites", numeric)
    return frame.sort_values("position", kind="stable").reset_index(drop=True)


def checked_groups(groups: pd.DataFrame) -> pd.DataFrame:
    """A valid group frame; ``offset`` (natural logarithm of a group's own factor) is NaN where it is not given.

    See :func:`checked`.
    """
    given = groups if "offset" in groups.columns else groups.assign(offset=np.nan)
    numeric = ("group", "size", "low", "high", "alpha", "magnitude", "offset")
    return checked(given, GROUP_COLUMNS, "groups", numeric)


def checked_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """A valid trial frame, by number. See :func:`checked`."""
    frame = checked(trials, TRIAL_COLUMNS, "trials", ("number", "loss"))
    return frame.sort_values("number", kind="stable").reset_index(drop=True)


def ratio(top: pd.Series[float], bottom: pd.Series[float]) -> pd.Series[float]:
    """Element-wise quotient of two losses; NaN where either is missing or the divisor is 0."""
    return top / bottom.where(bottom > 0)


def geometric_mean(values: pd.Series[float]) -> float:
    """Geometric mean of the positive finite values; NaN when there is none.

    Ratios of losses are averaged geometrically: a factor 2 better and a factor 2 worse cancel.
    """
    kept = values[(values > 0) & np.isfinite(values)]
    return math.exp(float(np.log(kept.to_numpy()).mean())) if len(kept) else math.nan


def thinned_sites(sites: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most ``most`` rows: neighbours in network order share a row with their geometric mean losses.

    Args:
        sites: A checked site frame.
        most: Most rows of the result.

    Returns:
        The frame itself when it is short enough, else one row per stretch of the network; ``merged`` counts its sites.
    """
    if len(sites) <= most:
        return sites.assign(merged=1)
    stretch = (np.arange(len(sites)) * most) // len(sites)
    parts = sites.groupby(stretch, sort=True)
    result = parts.first()
    for column in LOSS_COLUMNS:
        result[column] = parts[column].apply(geometric_mean)
    result["position"] = parts["position"].mean()
    result["merged"] = parts.size()
    return result.reset_index(drop=True)
