"""Which format every site gets: the integer program behind the front, and its next best answers. Formula fA18."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from alphasmith.objectives.errors import AlphasmithError, InputError

#: A site's format, by its place among the choices; one for every site.
Plan = tuple[int, ...]
#: By how much a limit may be exceeded, relative to the largest cost there is: what the solver itself calls equal.
TOLERANCE = 1e-6
#: Shares of the way from the least cost to the largest at which the front is asked for.
STEPS = (0.0, 0.01, 0.02, 0.04, 0.08, 0.12, 0.18, 0.25, 0.4, 0.6, 1.0)


@dataclass(frozen=True, eq=False)
class Program:
    """The sum of losses is to be low under a limit of the sum of costs, one choice for each site.

    Attributes:
        losses: (S, F) what a site adds to the loss under each choice, not negative; NaN or infinite: not possible.
        costs: (S, F) what a site costs under each choice, not negative.

    Raises:
        InputError: The two differ in shape, a number is negative, or a site has no choice.
    """

    losses: np.ndarray
    costs: np.ndarray

    def __post_init__(self) -> None:
        if self.losses.ndim != 2 or self.losses.shape != self.costs.shape or not self.losses.size:
            raise InputError(
                "losses", f"have shape {self.losses.shape}, costs {self.costs.shape}", "give (S, F) of both"
            )
        known = np.isfinite(self.losses) & np.isfinite(self.costs)
        if not known.any(axis=1).all():
            raise InputError("losses", "leave a site without a choice", "give a finite loss and cost for every site")
        if (self.losses[known] < 0).any() or (self.costs[known] < 0).any():
            raise InputError("losses", "or costs are negative", "give numbers of 0 or more")

    @property
    def possible(self) -> np.ndarray:
        """(S, F) whether a choice has a loss and a cost."""
        found: np.ndarray = np.isfinite(self.losses) & np.isfinite(self.costs)
        return found

    def loss(self, plan: Plan) -> float:
        """Sum of the losses of a plan."""
        return float(self.losses[np.arange(len(plan)), list(plan)].sum())

    def cost(self, plan: Plan) -> float:
        """Sum of the costs of a plan."""
        return float(self.costs[np.arange(len(plan)), list(plan)].sum())

    @property
    def least(self) -> float:
        """Cost of the cheapest plan."""
        return float(np.where(self.possible, self.costs, np.inf).min(axis=1).sum())

    @property
    def most(self) -> float:
        """Cost of the dearest plan."""
        return float(np.where(self.possible, self.costs, -np.inf).max(axis=1).sum())

    def meets(self, cost: float, limit: float) -> bool:
        """Whether a cost keeps within a limit, but for :data:`TOLERANCE`."""
        return cost <= limit + TOLERANCE * (self.most or 1.0)

    def best(self, limit: float, without: Sequence[Plan] = (), *, apart: int = 1) -> Plan | None:
        """The plan of the lowest loss that costs at most ``limit``. Source: formula fA18; solved by HiGHS through scipy.

        Args:
            limit: Largest cost, kept within :data:`TOLERANCE` of :attr:`most`.
            without: Plans that are not wanted again.
            apart: Sites at which the plan has to differ from each of them.

        Returns:
            None where no plan is left.

        Raises:
            AlphasmithError: The solver gave up.
        """
        sites, choices = self.losses.shape
        scale = self.most or 1.0
        if not self.meets(self.least, limit):
            return None
        possible = self.possible.ravel()
        worst = float(self.losses[self.possible].max()) or 1.0
        losses = np.where(possible, self.losses.ravel(), 0.0) / worst
        costs = np.where(possible, self.costs.ravel(), 0.0) / scale
        numbers = np.arange(sites * choices)
        one = coo_array((np.ones(numbers.size), (numbers // choices, numbers)), shape=(sites, numbers.size))
        constraints = [
            LinearConstraint(csr_array(one), 1, 1),
            LinearConstraint(costs[None, :], -np.inf, limit / scale + TOLERANCE / 2),
        ]
        for plan in without:
            row = np.zeros(numbers.size)
            row[np.arange(sites) * choices + np.array(plan)] = 1
            constraints.append(LinearConstraint(row[None, :], -np.inf, sites - apart))
        found = milp(
            losses,
            integrality=np.ones(numbers.size),
            bounds=Bounds(0, possible.astype(float)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            if found.status == 2:  # infeasible: every plan within the limit is one that is not wanted
                return None
            raise AlphasmithError(f"the integer program of the formats was not solved ({found.message})")
        return tuple(int(place) for place in found.x.reshape(sites, choices).argmax(axis=1))

    def front(self, limits: Sequence[float]) -> list[Plan]:
        """The best plans under several limits, each once, by cost; losses fall as costs rise.

        Args:
            limits: Any numbers; those that no plan meets are passed over.
        """
        found = {plan for limit in limits if (plan := self.best(limit)) is not None}
        ordered = sorted(found, key=lambda plan: (self.cost(plan), self.loss(plan)))
        kept: list[Plan] = []
        for plan in ordered:
            if not kept or self.loss(plan) < self.loss(kept[-1]):
                kept.append(plan)
        return kept

    def limits(self) -> list[float]:
        """Costs at which the front is asked for: :data:`STEPS` of the way from the least to the largest."""
        return [self.least + step * (self.most - self.least) for step in STEPS]
