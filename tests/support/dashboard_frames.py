"""Invented but plausible frames for the dashboard tests; nothing here is a measurement."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def site_frame(count: int, seed: int = 0) -> pd.DataFrame:
    """A site frame of ``count`` rows, ordered losses limit <= ours <= best single <= alpha 0.5 <= identity."""
    generator = np.random.default_rng(seed)
    limit = 10 ** generator.uniform(-4.2, -3.2, count)
    ours = limit * generator.uniform(1.02, 1.12, count)
    best = ours * generator.uniform(1.0, 1.15, count)
    half = best * generator.uniform(1.0, 2.0, count)
    identity = half * 10 ** generator.uniform(0.1, 1.6, count)
    modes = ["left" if i % 11 == 7 else "explicit" if i % 7 == 3 else "fold" for i in range(count)]
    free = np.array([mode != "left" for mode in modes])
    shares = generator.dirichlet(np.full(count, 0.3))
    return pd.DataFrame(
        {
            "site": [f"model.layers.{i // 4}.{KINDS[i % 4]}" for i in range(count)],
            "share": shares,
            "share_measured": np.where(shares >= np.sort(shares)[-min(count, 3)], 1.1 * shares, np.nan),
            "position": np.arange(count),
            "mode": modes,
            "reason": ["" if mode == "fold" else "the producer is a GELU, which is not homogeneous" for mode in modes],
            "channels": [256 if i % 4 != 3 else 1024 for i in range(count)],
            "identity": identity,
            "alpha_half": np.where(free, half, np.nan),
            "best_single": np.where(free, best, identity),
            "best_single_alpha": np.where(free, generator.uniform(0.4, 0.9, count), np.nan),
            "ours": np.where(free, ours, identity),
            "limit": np.where(free & (np.arange(count) % 5 != 4), limit, np.nan),
            "seconds": generator.uniform(0.4, 3.0, count),
            "trials": np.where(free, 32, 0),
            "groups": np.where(free, 4, 0),
            "shift": [mode != "left" and i % 5 == 2 for i, mode in enumerate(modes)],
            "range_statistic": [
                "percentile" if mode != "left" and i % 4 == 1 else "absmax" for i, mode in enumerate(modes)
            ],
            "range_factor": [0.93 if mode != "left" and i % 4 == 1 else 1.0 for i, mode in enumerate(modes)],
            "grouping": np.where(free, "kmeans", ""),
            "statistic": np.where(free, "absmax", ""),
            "stopped": np.where(free, "within 1 % of the limit", ""),
        }
    )


def group_frame(count: int, groups: int = 4, seed: int = 0) -> pd.DataFrame:
    """A group frame of ``count`` sites with ``groups`` groups each."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        magnitudes = np.sort(10 ** generator.uniform(-1, 1.8, groups))
        for k in range(groups):
            low, high = 0.1 + 0.4 * k / max(groups - 1, 1), 0.5 + 0.4 * k / max(groups - 1, 1)
            alpha = generator.uniform(low, high)
            site = f"model.layers.{i // 4}.{KINDS[i % 4]}"
            size = 200 if k == 0 else 20
            offset = generator.uniform(-0.4, 0.4) if i % 2 else math.nan
            rows.append((site, k, size, low, high, alpha, magnitudes[k], offset))
    return pd.DataFrame(rows, columns=["site", "group", "size", "low", "high", "alpha", "magnitude", "offset"])


def trial_frame(count: int, seed: int = 0, site: str | None = None) -> pd.DataFrame:
    """A trial frame of one study: three baselines, one proposal of the noise model, then sampled trials."""
    generator = np.random.default_rng(seed)
    kinds = (["identity", "alpha_0.5", "best_single", "model"] + ["sampler"] * count)[:count]
    first = {"identity": 8.7e-3, "alpha_0.5": 3.31e-4, "best_single": 2.47e-4, "model": 2.35e-4}
    sampled = 2.26e-4 * (1 + np.abs(generator.normal(0, 1.2, count)) / np.sqrt(np.arange(1, count + 1)))
    state = [
        "FAIL" if i > 3 and i % 13 == 0 else "PRUNED" if i > 3 and i % 9 == 0 else "COMPLETE" for i in range(count)
    ]
    loss = [first.get(kind, value) for kind, value in zip(kinds, sampled, strict=True)]
    frame = pd.DataFrame({"number": np.arange(count), "kind": kinds, "state": state})
    frame["loss"] = [value if known == "COMPLETE" else np.nan for value, known in zip(loss, state, strict=True)]
    for k in range(4):
        frame[f"alpha_{k}"] = generator.uniform(0.1, 0.9, count)
    if site is not None:
        frame["site"] = site
    return frame


def study_frames(sites: int, trials: int = 32) -> pd.DataFrame:
    """Trial frames of several sites, one under the other."""
    names = site_frame(sites)["site"]
    return pd.concat([trial_frame(trials, seed, name) for seed, name in enumerate(names)], ignore_index=True)


def manifest(sites: pd.DataFrame) -> dict[str, object]:
    """A manifest of the documented shape for a site frame; a test holds it against the schema."""
    losses = {"identity": 2.1e-2, "alpha_0.5": 3.4e-3, "best_single": 2.9e-3, "best_single_alpha": 0.62, "ours": 2.7e-3}
    return {
        "schema_version": 3,
        "run": {
            "id": "r-20250301-7f3a",
            "name": "tiny-llama w8a8",
            "created": "2025-03-01T09:59:58Z",
            "started": "2025-03-01T10:00:00Z",
            "finished": "2025-03-01T10:04:10.123Z",
        },
        "model": {"kind": "hf", "name": "tiny-llama", "parameter_count": 1_204_480, "digest": "5e" * 32},
        "data_digest": "77" * 32,
        "scheme": {
            "name": "w8a8-channel-static",
            "weights": "int8",
            "weight_granularity": "channel",
            "activations": "int8",
            "activation_granularity": "static",
        },
        "conventions": {"statistic": "absmax", "clamp": 1e-5, "clamp_max": 1e5, "dead_channels": "s = 1"},
        "scope": "site",
        "space_hash": "c0ffee",
        "notes": ["48 of 64 texts were shorter than 128 tokens; padding is masked"],
        "skipped": [{"name": "lm_head", "reason": "shares its weight with the embedding"}],
        "output": {
            "naive": 2.1e-2,
            "alpha_0.5": 3.4e-3,
            "best_single": 2.9e-3,
            "ours": 2.7e-3,
            "kept": "ours",
            "search": losses,
            "held_out": losses | {"limit": 2.5e-3},
            "metrics": [
                {
                    "name": "top-1 accuracy",
                    "higher_is_better": True,
                    "float": 0.961,
                    "naive": 0.902,
                    "alpha_0.5": 0.953,
                    "best_single": 0.956,
                    "ours": 0.958,
                }
            ],
        },
        "hardware": {
            "budget": {"memory": 8 * 2**30, "threads": 1024, "bandwidth": 2e11},
            "required": {"memory": 10 * 2**30, "threads": 2048, "bandwidth": 1e11},
            "rho": 0.25,
            "explanation": "memory is the scarce resource: 8 GiB of 10.7 GiB required",
        },
        "proof": {"tolerance": 1e-5, "error": 3.1e-7, "batches": 4},
        "guard": [
            {
                "site": "model.layers.1.self_attn.q_proj",
                "proposed": "sampler",
                "kept": "best_single",
                "reason": "2.6e-4 on held-out rows, best single alpha 2.4e-4",
            }
        ],
        "refinement": {
            "accepted": True,
            "before": 1.23e-3,
            "after": 1.1e-3,
            "difference": 1.3e-4,
            "standard_error": 2e-5,
            "reason": "held-out output loss falls by 0.00013 against a standard error of 2e-05",
            "deltas": {"q_proj": -0.1},
            "changed": {"model.layers.0.self_attn.q_proj": "alphas -0.100"},
            "trials": 16,
            "seconds": 3.5,
            "study": "r-20250301-7f3a/refinement",
        },
        "payload": {"weights_float": 4_817_920, "weights_quantized": 1_204_480, "other": 61_000},
        "memory": {"predicted": 512 * 2**20, "measured": 431 * 2**20},
        "seeds": {"search": 0, "calibration": 1, "held_out": 2},
        "versions": {"alphasmith": "0.1.0", "torch": "2.13.0", "optuna": "5.0.0", "python": "3.11.9"},
        "config": {
            "storage": "postgresql://smith:secret-word@db.example/alphasmith",
            "groups": {"method": "kmeans", "count": 4},
            "trials": 32,
        },
        "artifacts": [
            {"kind": "smoothed", "path": "smoothed/model.safetensors", "sha256": "9f" * 32, "bytes": 4_818_112}
        ],
        "sites": [
            {
                "name": str(row["site"]),
                "mode": row["mode"],
                "position": row["position"],
                "reason": row["reason"],
                "channels": row["channels"],
                "operators": [str(row["site"])],
            }
            for row in sites.to_dict("records")
        ],
    }
