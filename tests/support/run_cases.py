"""Tiny models with outliers, their data, and configurations with which a whole run takes a second or two."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alphasmith.objectives.media.batch import Batch, call, main_output
from alphasmith.search import RunConfig, RunResult, run

WIDTH, CLASSES, VOCABULARY, LENGTH = 16, 5, 48, 12
#: Channels whose gain is raised, and by how much.
LOUD, GAIN = (3, 11), 40.0


def with_loud_channels(model: nn.Module) -> nn.Module:
    """The model with a few norm channels far above the others, as trained transformers have them."""
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if "Norm" in type(module).__name__ and isinstance(weight, Tensor):
                weight[list(LOUD)] *= GAIN
    return model.eval()


class Mlp(nn.Module):
    """norm -> fc1 -> ReLU -> fc2, a residual, norm -> head: every site folds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 24)
        self.fc2 = nn.Linear(24, WIDTH)
        self.last = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, CLASSES)."""
        x = x + self.fc2(F.relu(self.fc1(self.norm(x))))
        return torch.as_tensor(self.head(self.last(x)))


class Recurrent(nn.Module):
    """Embedding, two LSTM layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, VOCABULARY)."""
        return torch.as_tensor(self.head(self.lstm(self.table(ids))[0]))


class Pictures(nn.Module):
    """Two convolutions with batch norm between them, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.body = nn.Conv2d(WIDTH, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, CLASSES)."""
        x = F.relu(self.body(F.relu(self.bn(self.stem(x)))))
        return torch.as_tensor(self.head(x.mean((2, 3))))


class Routed(nn.Module):
    """A router and two experts read the same norm; every row goes to one of the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B * L, CLASSES)."""
        x = self.norm(x).flatten(0, 1)
        chosen = self.router(x).argmax(-1)
        y = x.new_zeros(len(x), 8)
        for index, expert in enumerate(self.experts):
            mine = torch.where(chosen == index)[0]
            y = y.index_add(0, mine, expert(x[mine]))
        return torch.as_tensor(self.head(y))


def seeded(build: Any, seed: int = 0) -> nn.Module:
    """A model with the same random weights every time; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return with_loud_channels(build())


def tiny_llama() -> nn.Module:
    """One layer, grouped-query attention, loud norm channels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    )
    return seeded(lambda: LlamaForCausalLM(config))


def tiny_mixtral() -> nn.Module:
    """One layer with two experts behind a router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return seeded(lambda: MixtralForCausalLM(config))


#: A search whose winners are refined at the output.
REFINED: dict[str, Any] = {"search": {"trials": 6, "refine": True, "refine_trials": 4}}


def vectors(samples: int = 48, *shape: int, seed: int = 1) -> list[Tensor]:
    """Batches of eight standard normal samples; default shape (LENGTH, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(samples, *(shape or (LENGTH, WIDTH)), generator=generator).split(8))


def tokens(samples: int = 48, seed: int = 1) -> list[Tensor]:
    """Batches of eight token sequences (8, LENGTH) int64."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, VOCABULARY, (samples, LENGTH), generator=generator).split(8))


def answer(model: nn.Module, value: Any) -> Tensor:
    """Main output of a model on one tensor."""
    with torch.no_grad():
        return main_output(call(model, Batch(args=(value,))))


class Likeness:
    """A metric without labels: share of largest outputs that agree with those of a reference, higher is better."""

    def __init__(self, reference: nn.Module, batches: Iterable[Any]) -> None:
        self.batches = list(batches)
        self.expected = [answer(reference, b).argmax(-1) for b in self.batches]

    def __call__(self, model: nn.Module) -> float:
        pairs = zip(self.batches, self.expected, strict=True)
        shares = [torch.eq(answer(model, b).argmax(-1), e).double().mean() for b, e in pairs]
        return float(torch.stack(shares).mean())


def settings(folder: Path, values: Mapping[str, Any] | None = None) -> RunConfig:
    """A small configuration whose database and output lie in ``folder``; ``values`` go on top, section by section."""
    plain: dict[str, Any] = {
        "storage": f"sqlite:///{folder / 'runs.db'}",
        "out": folder / "out",
        "data": {"samples": 32, "tuning": 0, "held_out": 12, "proof": 4},
        "groups": {"k": 2},
        # The guard and the refinement at the output have tests of their own.
        "search": {"trials": 5, "rows": 64, "single_alphas": 5, "refine": False, "guard": "site"},
    }
    for key, value in (values or {}).items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, Mapping) else value
    return RunConfig.build(plain)


def launch(
    folder: Path, model: nn.Module, batches: Iterable[Any], values: Mapping[str, Any] | None = None, **keywords: Any
) -> RunResult:
    """Run with :func:`settings`."""
    return run(settings(folder, values), model=model, batches=batches, **keywords)


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    """What the database itself says, past all of our own code."""
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


#: Query of (study, number, seconds) of every trial: one that was made again has other seconds.
TRIAL_SECONDS = (
    "SELECT study_name, number, value_json FROM trials JOIN studies USING (study_id) "
    "JOIN trial_user_attributes USING (trial_id) WHERE key = 'seconds'"
)


def alphasmith(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own, in ``cwd``."""
    command = [sys.executable, "-m", "alphasmith.search.cli.main", *arguments]
    # Without a copy the child also sees COLUMNS=80, which readline sets behind the back of os.environ.
    return subprocess.run(
        command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False
    )


def saved_llama(folder: Path) -> Path:
    """:func:`tiny_llama` as a Hugging Face folder with a tokenizer of one token per letter."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    model: Any = tiny_llama()
    model.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz ."
    tokenizer = Tokenizer(models.WordLevel({"?": 0} | {c: i + 1 for i, c in enumerate(letters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def written_texts(file: Path, count: int = 40) -> Path:
    """Lines of text with the letters of :func:`saved_llama`'s tokenizer, of different lengths."""
    words = ("scale", "range", "group", "fold", "site", "trial", "a", "quantized", "loss", "row")
    lines = [" ".join(words[(i * k + k) % len(words)] for k in range(1, 4 + i % 5)) + "." for i in range(1, count + 1)]
    file.write_text("\n".join(json.dumps({"text": line}) for line in lines) + "\n")
    return file


def result_of_folder(folder: Path, model: Path, data: Path, values: Mapping[str, Any] = {}, **media: object) -> Path:
    """Output folder of a small run of a model folder, in ``folder``; ``media`` are further fields of ``data``."""
    few = {"samples": 16, "held_out": 6, "proof": 2, "path": str(data), **media}
    config = {"search": {"trials": 4}, **values, "model": {"path": str(model)}, "data": few}
    return run(settings(folder, config)).folder
