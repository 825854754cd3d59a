"""Which sites feed the experts of a mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from alphasmith.objectives.sites._weights import Operators
from alphasmith.objectives.sites.graph import Graph

_BY_DEFAULT = "expert inputs are not smoothed by default"


class Experts:
    """Recognises experts by what they read.

    Experts are modules of one ``nn.ModuleList`` that read rows picked by data out of one tensor, or stacked weights (a linear
    operator whose parameter has three axes) of a module that reads such rows. Where every expert reads every row, only the
    name tells it from other stacks of matrices, such as projections per head.

    Args:
        model: The model.
        graph: The traced call.
        operators: Its operators.
        groups: Of every site, its operators and those among them that read rows picked by data.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, operators: Operators, groups: Sequence[tuple[list[int], set[int]]]
    ) -> None:
        self._operators = operators
        self._groups = groups
        owners = [graph.nodes[uses[0].node].module for uses in operators.uses]
        routing = {owners[index] for _, routed in groups for index in routed}
        self._stacked = {
            index
            for index, (record, uses) in enumerate(zip(operators.records, operators.uses, strict=True))
            if record.kind == "linear"
            and len(graph.values[uses[0].key.parameter].shape) > 2
            and (owners[index] in routing or _named_experts(model, owners[index]))
        }
        lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        #: Prefix of every expert module -> why it cannot be trusted to be complete ("" when all experts were reached).
        self._modules: dict[str, str] = {}
        for members, routed in groups:
            self._find_modules(lists, graph, members, routed)

    def _find_modules(
        self, lists: dict[str, nn.ModuleList], graph: Graph, members: list[int], routed: set[int]
    ) -> None:
        names = {self._operators.records[i].name for i in members}
        for index in routed:
            parts = self._operators.records[index].name.split(".")
            for depth in range(1, len(parts)):
                prefix = ".".join(parts[:depth])
                if prefix not in lists or not parts[depth].isdigit():
                    continue
                rest = "".join(f".{part}" for part in parts[depth + 1 :])
                siblings = [f"{prefix}.{k}" for k in range(len(lists[prefix])) if str(k) != parts[depth]]
                idle = [s for s in siblings if s not in graph.modules]
                if not siblings or not (idle or any(s + rest in names for s in siblings)):
                    continue
                missing = [s for s in siblings if s + rest not in names]
                problem = f"the example batch sends nothing to {missing[0]}" if missing else ""
                for sibling in (f"{prefix}.{parts[depth]}", *siblings):
                    self._modules[sibling] = problem

    def refusal(self, group: int, smooth: bool) -> str:
        """Why site number ``group`` is left alone because it feeds experts; "" when it is not.

        Args:
            group: Number of the site.
            smooth: Whether the user asked for expert inputs to be smoothed.
        """
        members, _ = self._groups[group]
        if any(index in self._stacked for index in members):
            return "" if smooth else _BY_DEFAULT
        for index in members:
            for prefix, problem in self._modules.items():
                if f"{self._operators.records[index].name}.".startswith(f"{prefix}."):
                    return problem if smooth else _BY_DEFAULT
        return ""


def _named_experts(model: nn.Module, path: str) -> bool:
    """Whether a module or one around it has a name or class of experts."""
    parts = path.split(".") if path else []
    classes = (type(model.get_submodule(".".join(parts[:depth]))).__name__ for depth in range(len(parts) + 1))
    return any("expert" in name.lower() or "moe" in name.lower() for name in (*parts, *classes))
