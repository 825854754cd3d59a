"""Matrices as a product of two thin ones, by singular values. Source: claim B-5, formulas fB4 to fB6."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphasmith.objectives.errors import InputError, NonFiniteError

#: Smallest scale of a row or column relative to the largest: scales are divided out again, so none may be 0.
_FLOOR = 1e-6
#: Added to the diagonal of a covariance before it is taken apart, relative to its mean; ten times more until that succeeds.
_RIDGE = 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Factors:
    """A matrix A (m, n) as ``left @ right``, both with the square roots of the singular values in them.

    Attributes:
        left: (m, r) in the type of A.
        right: (r, n).
        singular: (min(m, n),) singular values of what was decomposed, descending.
        kept: Share of their squares that the first r have, 0 to 1; 1 for a zero matrix.
        notes: What people should know, a line each.
    """

    left: Tensor
    right: Tensor
    singular: Tensor
    kept: float
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """r."""
        return int(self.left.shape[1])


@dataclass(frozen=True, eq=False, kw_only=True)
class Weighting:
    """What the error of a decomposition is measured in: the smallest ``|diag(rows) (A - left right) inputs|``.

    Attributes:
        rows: (m,) factor of every output, e.g. gamma / sqrt(var + eps) of a normalization behind it; its sign plays no part.
        columns: (n,) factor of every input, e.g. the root mean square of its activation (the activation-scaled form).
        covariance: (n, n) mean of x x^T over inputs x: the error is then that of the output (the whitened form); in place of ``columns``.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    covariance: Tensor | None = None


def decompose(
    matrix: Tensor,
    *,
    energy: float | None = None,
    rank: int | None = None,
    weighting: Weighting | None = None,
    name: str = "matrix",
) -> Factors:
    """Take a matrix apart at a rank. Source: claim B-5, formulas fB4, fB5.

    A decomposition that does not converge is repeated in float64.

    Args:
        matrix: (m, n) floating, finite.
        energy: eta, 0 to 1: the smallest rank whose squared singular values have this share of all. At least one singular
            value is kept, so a zero matrix has rank 1.
        rank: The rank in its place, at least 1; one above min(m, n) counts as that.
        weighting: What the error is measured in; None: in the elements of the matrix.
        name: What to call the matrix in errors.

    Raises:
        InputError: Not one of ``energy`` and ``rank`` is given, either is out of range, shapes do not fit, or neither
            type converges.
        NonFiniteError: The matrix or the weighting holds NaN or infinity.
    """
    _check(matrix, energy, rank, name)
    given = weighting or Weighting()
    scaled, undo = _weighted(matrix.detach(), given, name)
    notes: list[str] = []
    u, s, vt = _singular(scaled, name, notes)
    squares = torch.cumsum(s.double() ** 2, 0)
    total = float(squares[-1])
    if rank is None:
        rank = 1 + int(torch.searchsorted(squares, (energy or 0.0) * total * (1 - 1e-12))) if total else 1
    rank = min(rank, s.numel())
    root = s[:rank].sqrt()
    left, right = undo(u[:, :rank] * root, root.unsqueeze(1) * vt[:rank])
    return Factors(
        left=left.to(matrix.dtype).contiguous(),
        right=right.to(matrix.dtype).contiguous(),
        singular=s,
        kept=float(squares[rank - 1]) / total if total else 1.0,
        notes=tuple(notes),
    )


def saving_rank(rows: int, columns: int) -> int:
    """Largest rank at which the factors have fewer numbers than their matrix, r < mn / (m + n); 0: none. Source: formula fB6."""
    return (rows * columns - 1) // (rows + columns)


def _check(matrix: Tensor, energy: float | None, rank: int | None, name: str) -> None:
    if matrix.dim() != 2 or not matrix.numel() or not matrix.is_floating_point():
        raise InputError(name, f"{tuple(matrix.shape)} of {matrix.dtype} is no floating matrix", "give (m, n)")
    if (energy is None) == (rank is None):
        raise InputError("svd", "takes either an energy or a rank", "give one of them")
    if energy is not None and not 0 < energy <= 1:
        raise InputError("svd.energy", f"{energy} is no share", "use more than 0 and at most 1, such as 0.99")
    if rank is not None and rank < 1:
        raise InputError("svd.rank", f"{rank} is below 1", "use a positive number")
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"{name}: NaN or infinity in the matrix")


def _singular(matrix: Tensor, name: str, notes: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Thin U, S, V^T, in float64 where float32 does not converge."""
    wide = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    for attempt in dict.fromkeys((wide, wide.double())):
        try:
            found = torch.linalg.svd(attempt, full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in torch's own list
            continue
        if bool(torch.isfinite(found.S).all()):  # some libraries return NaN in place of an error
            if attempt is not wide:
                notes.append(f"{name}: its singular values converged in float64 only")
            return found.U, found.S, found.Vh
    raise InputError(name, "its singular values do not converge, in float64 neither", "leave it out of svd")


def _weighted(matrix: Tensor, given: Weighting, name: str) -> tuple[Tensor, _Undo]:
    """The matrix in the units of the error, and the way back for its factors."""
    m, n = matrix.shape
    rows = None if given.rows is None else _scale(given.rows, m, f"{name}: rows", matrix)
    columns = None if given.columns is None else _scale(given.columns, n, f"{name}: columns", matrix)
    root = None
    if given.covariance is not None:
        if columns is not None or tuple(given.covariance.shape) != (n, n):
            problem = f"{tuple(given.covariance.shape)} does not stand alone for {n} inputs"
            raise InputError("svd.covariance", problem, f"give ({n}, {n}), and no columns")
        root = _root(given.covariance.detach().to(matrix.device), name)
    scaled = matrix if rows is None else rows.unsqueeze(1) * matrix
    if columns is not None:
        scaled = scaled * columns
    if root is not None:
        scaled = (scaled.double() @ root).to(scaled.dtype)
    return scaled, _Undo(rows, columns, root)


class _Undo:
    """Takes a weighting out of the factors of what was weighted."""

    def __init__(self, rows: Tensor | None, columns: Tensor | None, root: Tensor | None) -> None:
        self._rows, self._columns, self._root = rows, columns, root

    def __call__(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if self._rows is not None:
            left = left / self._rows.unsqueeze(1)
        if self._columns is not None:
            right = right / self._columns
        if self._root is not None:
            right = torch.linalg.solve_triangular(self._root, right.double(), upper=False, left=False)
        return left, right


def _scale(values: Tensor, size: int, what: str, like: Tensor) -> Tensor:
    """Positive scales; what is 0, or far below the largest, counts as a millionth of it."""
    if tuple(values.shape) != (size,):
        raise InputError("svd", f"{what} have shape {tuple(values.shape)}", f"give {size} numbers")
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{what} hold NaN or infinity")
    found = values.detach().to(like.device, torch.float32 if like.dtype != torch.float64 else torch.float64).abs()
    largest = float(found.max())
    return found.clamp_min(_FLOOR * largest) if largest > 0 else torch.ones_like(found)


def _root(covariance: Tensor, name: str) -> Tensor:
    """L of L L^T, float64, of a covariance with just enough added to its diagonal."""
    wide = covariance.double()
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError(f"{name}: NaN or infinity in the covariance of its inputs")
    mean = float(wide.diagonal().mean())
    if mean <= 0:
        return torch.eye(wide.shape[0], dtype=torch.float64, device=wide.device)
    ridge = _RIDGE
    while ridge <= 1:
        unit = torch.eye(wide.shape[0], dtype=torch.float64, device=wide.device)
        root, failed = torch.linalg.cholesky_ex(wide + ridge * mean * unit)
        if not int(failed):
            return torch.as_tensor(root)
        ridge *= 10
    raise InputError("svd.covariance", f"that of {name} is far from positive", "give the mean of x x^T over inputs")
