"""The model that every scene searches: seven small sites, three of which must wait for three others."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, INNER, CLASSES, BLOCKS = 16, 24, 5, 3
#: Channels whose gain is raised, and by how much.
_LOUD, _GAIN = (3, 11), 40.0
#: Says which call of the metric is bad, and how; see :func:`metric`.
METRIC_PLAN = "CHAOS_METRIC"
#: What the names of files begin with that say that something was spoiled here.
MARK = "spoiled-"


class Block(nn.Module):
    """norm -> wide -> ReLU -> narrow and a residual: the scales of ``narrow``'s input fold into the weights of ``wide``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, INNER)
        self.narrow = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, WIDTH)."""
        return torch.as_tensor(x + self.narrow(F.relu(self.wide(self.norm(x)))))


class Chain(nn.Module):
    """Blocks one after the other, then a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, CLASSES)."""
        return torch.as_tensor(self.head(self.last(self.blocks(x))))


#: What every scene asks for: small, and without the noise model, so that the sampler proposes and resumed studies must follow it.
SETTINGS = {
    "model.factory": "tests.chaos.subject:model",
    "data.factory": "tests.chaos.subject:data",
    "data.samples": 32,
    "data.held_out": 8,
    "data.proof": 4,
    "groups.k": 2,
    "search.trials": 8,
    "search.rows": 64,
    "search.single_alphas": 5,
    "search.noise_model": False,
    "search.shift": ["none"],
    "search.refine_trials": 4,
    "search.threads": 1,
}
#: What a scene adds to them whose sites choose among formats.
FORMATS = {
    "sites__formats": ["int8-static", "uint8-static", "int8-token", "int16-static"],
    "budget__share_of_macs": 0.5,
}
#: Sites of the model: two per block and the head.
SITES = 2 * BLOCKS + 1


#: Functions of this file that records name.
FUNCTIONS = tuple(f"tests.chaos.subject:{name}" for name in ("model", "data", "metric"))


#: What every scene of a compression asks for; the function makes its model and task.
COMPRESSED = "tests.chaos.subject:compressed"
COMPRESSION: dict[str, Any] = {
    "task.factory": COMPRESSED,
    "train.steps": 4,
    "rounds.steps": 2,
    "rounds.most": 2,
    "branch.ranks": [0, 4],
    "branch.refits": 1,
    "clusters.k": [4, 16],
    "clusters.finetune": 1,
    "study.trials": 7,
    "study.inner": 2,
}


def compressed() -> tuple[nn.Module, Any]:
    """A small model of norms, convolutions and an LSTM, and its task; the same weights every time."""
    from tests.support.compressed_models import Listener, task

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Listener()
    return made.eval(), task()


def options(**more: object) -> list[str]:
    """The settings as options of the command line; ``section__field`` stands for ``section.field``."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in more.items()}
    return [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def allowed() -> list[str]:
    """The options that let the functions above run where a record names them."""
    return [part for name in FUNCTIONS for part in ("--allow-code", name)]


def model() -> nn.Module:
    """The same weights every time; a few channels are far above the others, as trained transformers have them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Chain()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[list(_LOUD)] *= _GAIN
    return made.eval()


def data() -> list[tuple[Tensor]]:
    """Batches of eight standard normal samples."""
    generator = torch.Generator().manual_seed(1)
    return [(batch,) for batch in torch.randn(48, 6, WIDTH, generator=generator).split(8)]


def metric(measured: nn.Module) -> float:
    """How often the largest outputs are those of the float model; the environment may spoil it for one candidate.

    ``CHAOS_METRIC=CALL:HOW``: from this call on, for the candidate model of this call, it raises (``raise``), returns NaN
    (``nan``) or finds no memory (``memory``). Calls are counted, and the candidate is kept, in files of the working folder.
    """
    reference = model()
    with torch.no_grad():
        found = [measured(x) for (x,) in data()]
        agreed = [
            torch.eq(a.argmax(-1), reference(x).argmax(-1)).double().mean()
            for a, (x,) in zip(found, data(), strict=True)
        ]
    plan = os.environ.get(METRIC_PLAN, "")
    if plan and _is_bad(torch.cat(found), int(plan.partition(":")[0])):
        match plan.partition(":")[2]:
            case "raise":
                raise ValueError("this metric fails")
            case "memory":
                raise MemoryError
            case _:
                return math.nan
    return float(torch.stack(agreed).mean())


def _is_bad(outputs: Tensor, call: int) -> bool:
    digest = hashlib.sha256(outputs.numpy().tobytes()).hexdigest()
    calls, bad = Path("metric-calls"), Path(f"{MARK}metric")
    with calls.open("a") as stream:
        stream.write("x")
    if calls.stat().st_size == call:
        bad.write_text(digest)
    return bad.exists() and bad.read_text() == digest
