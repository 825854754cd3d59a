"""Alpha and rank of a layer chosen together by its output error, within a number of bytes. Source: formula fB11."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.joint.branch._smoothed import SmoothedWeight
from alphasmith.objectives.joint.branch.encoding import BranchWeight, check_rank, encode
from alphasmith.objectives.joint.branch.rows import LayerRows
from alphasmith.objectives.joint.branch.settings import BranchSettings
from alphasmith.objectives.joint.branch.stored import stored_size
from alphasmith.objectives.joint.low_rank.decomposition import saving_rank

#: Smoothed weights that are kept with their singular values; a study comes back to few alphas at a time.
_KEPT = 16
#: Alphas that are tried where none are given.
ALPHAS = (None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One candidate.

    Attributes:
        settings: Of it.
        error: Squared error of the output over its squares, on the fitting rows; None: it failed.
        stored_bytes: What it takes; at most that, where it failed.
        reason: Why it failed; empty where it did not.
    """

    settings: BranchSettings
    error: float | None
    stored_bytes: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best candidate, and all that were tried.

    Attributes:
        best: Of the smallest error; of equal ones the first.
        tried: In the order in which they were tried.
    """

    best: Tried
    tried: tuple[Tried, ...]


class LayerErrors:
    """Errors of one layer under any settings: singular values are found once an alpha, and no candidate is measured twice.

    Args:
        weight: (O, C, kernel), floating and finite.
        rows: (T, D) that set scales and ranges and give the error.
        name: What to call it in errors.

    Raises:
        InputError: Shapes do not fit.
        NonFiniteError: The weight or a row holds NaN or infinity.
    """

    def __init__(self, weight: Tensor, rows: Tensor | LayerRows, *, name: str = "weight") -> None:
        self._rows = rows if isinstance(rows, LayerRows) else LayerRows(x=rows)
        self._rows.check(weight, name)
        self._weight, self._name = weight, name
        self._smoothed: OrderedDict[tuple[object, ...], SmoothedWeight] = OrderedDict()
        self._tried: dict[BranchSettings, Tried] = {}

    def error(self, settings: BranchSettings) -> Tried:
        """Error and bytes under given settings; what is not finite or has a rank that saves nothing fails with the reason."""
        if settings not in self._tried:
            size = stored_size(self._weight.shape, settings)
            try:
                made = self.encode(settings)
                self._tried[settings] = Tried(settings=settings, error=made.error, stored_bytes=made.stored_bytes)
            except (InputError, NonFiniteError) as error:
                self._tried[settings] = Tried(settings=settings, error=None, stored_bytes=size, reason=str(error))
        return self._tried[settings]

    def encode(self, settings: BranchSettings) -> BranchWeight:
        """The weight under given settings.

        Raises:
            InputError: The rank saves nothing, or singular values do not converge.
            NonFiniteError: The float output is zero where the candidate's is not.
        """
        check_rank(self._weight, settings, self._name)
        key = (settings.alphas, settings.group_method)
        if key not in self._smoothed:
            self._smoothed[key] = SmoothedWeight(self._weight, self._rows, settings, self._name)
            while len(self._smoothed) > _KEPT:
                self._smoothed.popitem(last=False)
        self._smoothed.move_to_end(key)
        return encode(self._smoothed[key], settings, self._name)


def choose_alpha_and_rank(
    weight: Tensor,
    rows: Tensor | LayerRows,
    budget: int,
    residuals: Sequence[BranchSettings],
    *,
    alphas: Sequence[float | None] = ALPHAS,
    ranks: Sequence[int] | None = None,
    errors: LayerErrors | None = None,
    name: str = "weight",
) -> Choice:
    """The best of alphas x ranks x forms of the residual that a number of bytes holds. Source: formula fB11.

    Args:
        weight: (O, C, kernel), floating and finite.
        rows: (T, D) that candidates are made with and judged on.
        budget: Most bytes of all tensors stored of the weight.
        residuals: Forms of the residual and all else; their alpha and rank are replaced.
        alphas: Coefficients; None among them is no smoothing.
        ranks: Ranks; None: 0, the largest that the budget holds beside a form, and a half and a quarter of it.
        errors: Of this weight on these rows, to share what earlier calls found.
        name: What to call it in errors.

    Raises:
        InputError: No candidate fits the budget, or all of them fail.
        NonFiniteError: The weight or a row holds NaN or infinity.
    """
    measured = errors or LayerErrors(weight, rows, name=name)
    tried: list[Tried] = []
    for residual in residuals:
        for alpha in alphas:
            base = replace(residual, alpha=alpha, rank=0)
            for rank in ranks_within(weight, budget, base) if ranks is None else ranks:
                candidate = replace(base, rank=rank)
                if stored_size(weight.shape, candidate) <= budget and candidate not in [one.settings for one in tried]:
                    tried.append(measured.error(candidate))
    if not tried:
        smallest = min(stored_size(weight.shape, replace(one, alpha=None, rank=0)) for one in residuals)
        raise InputError("budget", f"{budget} bytes hold no form of {name}", f"give {smallest} bytes or more")
    finite = [(one.error, place) for place, one in enumerate(tried) if one.error is not None]
    if not finite:
        raise InputError(name, f"every candidate fails ({tried[0].reason})", "leave this layer out")
    return Choice(best=tried[min(finite)[1]], tried=tuple(tried))


def ranks_within(weight: Tensor, budget: int, settings: BranchSettings) -> tuple[int, ...]:
    """0, and the largest rank that fits a number of bytes, a half and a quarter of it; empty where not even rank 0 does.

    Args:
        weight: (O, C, kernel).
        budget: Most bytes of all tensors stored of the weight.
        settings: All but the rank.
    """
    left = budget - stored_size(weight.shape, replace(settings, rank=0))
    if left < 0:
        return ()
    one = stored_size(weight.shape, replace(settings, rank=1)) - stored_size(weight.shape, replace(settings, rank=0))
    most = min(left // one, saving_rank(weight.shape[0], weight[0].numel()))
    return tuple(sorted({0, most // 4, most // 2, most}))
