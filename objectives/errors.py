"""Errors a user can act on, named by remedy.

The command line prints every ``AlphasmithError`` as one line; ``InputError`` and ``EquivalenceError`` end it with exit code 2.
"""

from __future__ import annotations


class AlphasmithError(Exception):
    """Base class of every error raised on purpose by Alphasmith."""


class InputError(AlphasmithError, ValueError):
    """Something the user gave cannot be used.

    Args:
        field: The configuration field, file or argument at fault, e.g. ``"scheme.weights"``.
        problem: What is wrong with it, in one clause.
        remedy: What to do about it, in one clause.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        self.field = field
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {problem}; {remedy}")


class NonFiniteError(AlphasmithError):
    """A candidate's loss, scale or tensor is NaN or infinite: a failed trial with this message as its reason."""


class EquivalenceError(AlphasmithError):
    """Folding changed the float model beyond the stated tolerance; nothing is written.

    Args:
        site: Name of the site at fault, or of all sites together when no single one is.
        error: Measured relative output error.
        tolerance: The largest relative output error allowed.
        output: Name of the output that it was measured in; empty where there is one only.
    """

    def __init__(self, site: str, error: float, tolerance: float, output: str = "") -> None:
        self.site = site
        self.error = error
        self.tolerance = tolerance
        self.output = output
        where = f" in {output}" if output not in ("", "output") else ""
        super().__init__(
            f"site {site}: folding changes the float model by {error:.3g} (relative){where}, more than the tolerance "
            f"{tolerance:.3g}; exclude it with --set sites.exclude='[\"{site}\"]' or raise proof.tolerance"
        )


class IntegrityError(AlphasmithError):
    """A stored artifact does not have the digest that was recorded for it."""
