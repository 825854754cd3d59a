"""Small hand-written modules, one per thing that discovery has to get right."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, H, D = 12, 4, 3


class Mlp(nn.Module):
    """Pre-norm block with a residual: norm -> fc1 -> ReLU -> fc2, and a head behind a second norm."""

    def __init__(self, activation: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C) if norm is None else norm
        self.fc1 = nn.Linear(C, 20)
        self.activation = nn.ReLU() if activation is None else activation
        self.fc2 = nn.Linear(20, C)
        self.last = nn.LayerNorm(C)
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, 5)."""
        x = x + self.fc2(self.activation(self.fc1(self.norm(x))))
        return torch.as_tensor(self.head(self.last(x)))


class OffsetNorm(nn.Module):
    """RMS norm that multiplies by (1 + w), written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class Gated(nn.Module):
    """SwiGLU with the two halves of one fused projection."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(C)
        self.both = nn.Linear(C, 16, bias=False)
        self.down = nn.Linear(8, C)
        self.gate_first = gate_first

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        a, b = self.both(self.norm(x)).chunk(2, -1)
        return torch.as_tensor(self.down(F.silu(a) * b if self.gate_first else a * F.silu(b)))


class Attention(nn.Module):
    """Grouped-query attention; ``kernel`` is ``matmul`` or ``sdpa``, ``fused`` puts q, k and v in one projection."""

    def __init__(self, kernel: str, fused: bool, kv_heads: int = 2) -> None:
        super().__init__()
        self.kernel, self.fused, self.kv_heads = kernel, fused, kv_heads
        self.norm = nn.LayerNorm(C)
        sizes = [H * D, kv_heads * D, kv_heads * D]
        if fused:
            self.qkv = nn.Linear(C, sum(sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(C, size) for size in sizes)
        self.sizes = sizes
        self.o = nn.Linear(H * D, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        batch, length, _ = x.shape
        n = self.norm(x)
        q, k, v = self.qkv(n).split(self.sizes, -1) if self.fused else (self.q(n), self.k(n), self.v(n))
        q, k, v = (t.view(batch, length, -1, D).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(H // self.kv_heads, 1) for t in (k, v))
        if self.kernel == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = (q @ k.transpose(-1, -2) / D**0.5).softmax(-1) @ v
        return x + torch.as_tensor(self.o(y.transpose(1, 2).reshape(batch, length, H * D)))


class Convolutions(nn.Module):
    """Convolution, batch norm, in-place ReLU, depthwise and grouped convolutions, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3)."""
        x = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        x = F.max_pool2d(F.leaky_relu(self.depthwise(x)), 2)
        x = torch.relu(self.grouped(x))
        x = torch.relu(self.pointwise(x))
        return torch.as_tensor(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class FrozenNorm(nn.Module):
    """Batch norm written out with buffers, as detection backbones do, between two convolutions."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 5, 3)
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 5, H - 4, W - 4)."""
        scale = (self.weight * (self.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        bias = self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale
        return torch.as_tensor(self.second(torch.relu(self.first(x) * scale + bias)))


class PostNorm(nn.Module):
    """The norm's output feeds a linear and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.next = nn.LayerNorm(C), nn.LayerNorm(C)
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        x = self.norm(x)
        return torch.as_tensor(self.next(x + self.fc(x)))


class Positions(nn.Module):
    """Token embedding plus a slice of stored positions, read by a linear: both tables absorb the scales, all rows."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, C)
        self.positions = nn.Parameter(torch.randn(1, 40, C))
        self.fc = nn.Linear(C, C)
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, 30, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, 30)."""
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        return torch.as_tensor(self.head(self.norm(self.fc(x))))


class Windows(nn.Module):
    """Zero padding after the norm, rolled into windows: padding carries no scale and must not block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B * windows, 4, C)."""
        length = x.shape[1]
        x = F.pad(self.norm(x), (0, 0, 0, -length % 4)).roll(1, 1)
        return torch.as_tensor(self.fc(x.reshape(-1, 4, C)))


class StackedExperts(nn.Module):
    """Router and experts stored as stacked weights, applied in a loop over the experts that get tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.router = nn.Linear(C, 4)
        self.up = nn.Parameter(torch.randn(4, 10, C))
        self.down = nn.Parameter(torch.randn(4, C, 10))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        n = self.norm(x).reshape(-1, C)
        chosen = self.router(n).argmax(-1)
        out = torch.zeros_like(n)
        for expert in chosen.unique().tolist():
            rows = torch.where(chosen == expert)[0]
            y = F.linear(torch.relu(F.linear(n[rows], self.up[expert])), self.down[expert])
            out.index_add_(0, rows, y)
        return x + out.reshape(x.shape)


class ModuleExperts(nn.Module):
    """Router and experts that are modules of their own."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.router = nn.Linear(C, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(C, 10), nn.ReLU(), nn.Linear(10, C)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        n = self.norm(x).reshape(-1, C)
        chosen = self.router(n).argmax(-1)
        out = torch.zeros_like(n)
        for expert in chosen.unique().tolist():
            rows = torch.where(chosen == expert)[0]
            out.index_add_(0, rows, self.experts[expert](n[rows]))
        return x + out.reshape(x.shape)


class Shared(nn.Module):
    """One linear applied to two tensors with norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(C), nn.LayerNorm(C)
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return torch.as_tensor(self.fc(self.a(x)).sigmoid() + self.fc(self.b(x)).tanh())


class Joined(nn.Module):
    """A linear reads two norms side by side, and another pools a class token in front of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(C), nn.LayerNorm(C)
        self.token = nn.Parameter(torch.randn(1, 1, C))
        self.wide = nn.Linear(2 * C, 4)
        self.c = nn.LayerNorm(C)
        self.pooled = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, 4)."""
        wide = self.wide(torch.cat((self.a(x), self.b(x.abs())), -1)).mean(1)
        row = torch.cat((self.token.expand(x.shape[0], 1, C), self.c(x)), 1)
        return torch.as_tensor(wide.sigmoid() + self.pooled(row[:, 0] + row[:, 1:].mean(1)))


class WrittenThrough(nn.Module):
    """The norm's output is overwritten through a view before the linear reads it: not to be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        y = self.norm(x)
        y[:, :1].add_(1.0)
        return torch.as_tensor(self.fc(y))


class RandomNet(nn.Module):
    """A random program over tensors (B, L, C): every step reads earlier ones, so sharing and residuals abound."""

    _STEPS = (
        "linear", "linear", "linear", "again", "norm", "norm", "rms", "relu", "relu", "gelu", "add", "mul", "bias", "scale",
        "gate", "mix", "halves", "first", "where", "shift", "heads", "mean", "double",
    )  # fmt: skip

    def __init__(self, seed: int, steps: int = 14) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.steps: list[tuple[str, int, int, int]] = []
        self.parts = nn.ModuleList()
        self.vectors = nn.ParameterList()
        linears: list[int] = []
        for number in range(steps):
            kind = rng.choice(self._STEPS)
            # mostly the last value, so that chains are long enough to fold
            a, b = (max(0, number - int(rng.expovariate(1.8))) for _ in range(2))
            part = -1
            if kind == "again" and linears:
                part = rng.choice(linears)
            elif kind in ("linear", "again", "norm", "rms"):
                part = len(self.parts)
                if kind in ("linear", "again"):
                    linears.append(part)
                    self.parts.append(nn.Linear(C, C, bias=rng.random() < 0.5))
                else:
                    self.parts.append(nn.LayerNorm(C) if kind == "norm" else nn.RMSNorm(C))
            elif kind in ("bias", "scale"):
                part = len(self.vectors)
                self.vectors.append(nn.Parameter(torch.zeros(rng.choice([1, C]))))
            self.steps.append((kind, a, b, part))
        self.end = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, 4)."""
        values = [x]
        for kind, a, b, part in self.steps:
            values.append(self._step(kind, values[a], values[b], part))
        return torch.as_tensor(self.end(F.layer_norm(values[-1] + values[-2] * 0.5, (C,))))

    def _step(self, kind: str, a: Tensor, b: Tensor, part: int) -> Tensor:
        if kind in ("linear", "again", "norm", "rms"):
            return torch.as_tensor(self.parts[part](a))
        if kind in ("bias", "scale"):
            vector = torch.as_tensor(self.vectors[part])
            return a + vector if kind == "bias" else a * vector
        left, right = a.chunk(2, -1)
        steps: dict[str, Callable[[], Tensor]] = {
            "relu": lambda: torch.relu(a),
            "gelu": lambda: F.gelu(a),
            "add": lambda: a + b,
            "mul": lambda: a * b,
            "gate": lambda: torch.sigmoid(b) * a,
            "mix": lambda: (b @ b.transpose(1, 2) / C).softmax(-1) @ a,
            "halves": lambda: torch.cat((right, left), -1),
            "first": lambda: a[:, :1].expand_as(a) + b,
            "where": lambda: torch.where(b > 0, a, torch.zeros_like(a)),
            "shift": lambda: F.pad(a, (0, 0, 1, 0))[:, :-1],
            "heads": lambda: a.unflatten(-1, (H, D)).transpose(1, 2).flatten(0, 1).reshape(-1, H, *a.shape[1:2], D)
            .transpose(1, 2).flatten(2),
            "mean": lambda: a + a.mean(1, keepdim=True),
            "double": lambda: left.repeat(1, 1, 2),
        }  # fmt: skip
        return steps[kind]()


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` in float64 and eval mode with random parameters and statistics, so that no wrong fold can hide."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(noise + 0.5 if "var" in name else noise * 2 - 1)
    return module
