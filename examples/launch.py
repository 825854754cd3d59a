"""A launch script: train a small classifier, search it, compare the quantized model with the float one.

    python launch.py

The model, the batches and the metric are plain Python; nothing needs a Hugging Face folder or a configuration file.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import alphasmith


def trained(pixels: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """A multilayer perceptron on 8x8 digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(300):
        rows = torch.randint(len(pixels), (64,))
        loss = nn.functional.cross_entropy(model(pixels[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    """Train, search, reload."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, test = slice(0, 1200), slice(1200, None)
    model = trained(pixels[train], labels[train])

    def accuracy(candidate: nn.Module) -> float:
        return float((candidate(pixels[test]).argmax(dim=1) == labels[test]).float().mean())

    config = alphasmith.RunConfig(
        name="digits perceptron",
        scheme={"weights": "int4", "activation_granularity": "token"},
        data={"samples": 256, "held_out": 128, "proof": 32, "batch_size": 64, "metric_name": "accuracy"},
    )
    result = alphasmith.run(config, model=model, batches=pixels[train].split(64), metric=accuracy)
    print(result.sites[["site", "mode", "identity", "best_single", "ours"]].to_string(index=False))
    quantized = alphasmith.load_quantized(result.folder, model)
    print(f"accuracy: float {accuracy(model):.4f}, quantized {accuracy(quantized):.4f}; see {result.folder}")


if __name__ == "__main__":
    main()
