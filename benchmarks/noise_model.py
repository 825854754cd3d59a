"""How well the noise model ranks candidates, scheme by scheme, against the exact loss.

    python -m benchmarks.noise_model [SHARED_DATA] [--schemes ...] [--models ...] [--seeds ...] [--threads N] [--out]

64 random candidates per layer: 1 to 8 groups, alphas around a random one, offsets; on every second layer the rows are shifted.
Per scheme, over layers: median of |log(predicted / exact)|; Kendall's tau (median, smallest); regret, the exact loss of the
model's favourite over the least exact loss (median, largest); and the exact loss where the model's descent over 8 groups with
offsets ends, over the least of the 64. SHARED_DATA adds the sites of trained models, at most eight of each.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import kendalltau
from torch import Tensor

from alphasmith.objectives.calibration.site_data import SiteData
from alphasmith.objectives.groups import group_channels
from alphasmith.objectives.judge.site_objective import SiteObjective
from alphasmith.objectives.noise.model import NoiseModel
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.smoothing import LogScales, Smoothing, coefficient_map
from benchmarks.layers import REPORTING_SEEDS, Size, layer_data, layers
from benchmarks.shared_sites import shared_sites
from benchmarks.timing import machine, parser, publish, table, torch_threads, with_threads

SCHEMES = (
    "w8a8-channel-static",
    "w8a8-channel-token",
    "w8a8-tensor-static",
    "w8a8-tensor-token",
    "w8a8-g64-static",
    "w4a8-channel-static",
    "w4a8-g64-token",
    "w4a16-g64",
    "wfp8afp8-channel-static",
    "wfp8afp8-channel-token",
)
MODELS = ("kwt1", "resnet8_cifar10")
CANDIDATES = 64
GROUPS = 8
SITES_PER_MODEL = 8
SIZE = Size(rows=1024, channels=256, outputs=256)
HEADER = ("layers", "scheme", "count", "abs log ratio", "tau", "least tau", "regret", "worst regret", "descent / best")


@dataclass(frozen=True)
class Agreement:
    """The noise model against the exact loss on one layer.

    Attributes:
        log_ratio: Median of |log(predicted / exact)|.
        tau: Kendall's rank correlation.
        regret: Exact loss of the model's favourite over the least exact loss, at least 1.
        descent: Exact loss at the end of the model's descent over the least exact loss of the random candidates.
    """

    log_ratio: float
    tau: float
    regret: float
    descent: float


def space_of(data: SiteData, shift: Tensor | None, groups: int) -> LogScales:
    """Alphas and offsets of k-means groups."""
    activation = data.magnitudes("absmax", shift)
    labels = group_channels(activation, method="kmeans", k=groups).labels
    return coefficient_map(activation, data.weight_absmax, labels, ties=data.ties, offsets=True)


def random_scales(data: SiteData, shift: Tensor | None, generator: torch.Generator) -> Tensor:
    """(N, C) scales of random candidates."""
    spaces = [space_of(data, shift, groups) for groups in range(1, min(GROUPS, data.channels) + 1)]
    found = []
    for index in range(CANDIDATES):
        space = spaces[index % len(spaces)]
        centre = 0.1 + 0.8 * torch.rand(1, generator=generator, dtype=torch.float64)
        alphas = centre + 0.3 * (torch.rand(space.groups, generator=generator, dtype=torch.float64) - 0.5)
        offsets = 0.3 * torch.randn(space.groups, generator=generator, dtype=torch.float64)
        found.append(space.scales(torch.cat((alphas, offsets))))
    return torch.stack(found)


def compare(data: SiteData, scheme: Scheme, seed: int, *, shifted: bool) -> Agreement | None:
    """Score random candidates of one layer both ways; None where no candidate has a loss."""
    shift = data.input_range.middle(data.ties) if shifted else None
    objective = SiteObjective(data, scheme)
    model = NoiseModel(data, scheme, shift=shift, energy=objective.reference_energy)
    scales = random_scales(data, shift, torch.Generator().manual_seed(seed))
    exact = torch.tensor([objective.loss(Smoothing(scales=s, shift=shift)) for s in scales], dtype=torch.float64)
    if not bool((exact > 0).all()):
        return None
    predicted = model.losses(scales)
    space = space_of(data, shift, min(GROUPS, data.channels))
    k = space.groups
    low, high = torch.cat((torch.zeros(k), -torch.ones(k))), torch.ones(2 * k)
    starts = torch.stack([torch.cat((torch.full((k,), alpha), torch.zeros(k))) for alpha in (0.3, 0.5, 0.7, 0.9)])
    end = Smoothing(scales=space.scales(model.minimise(space, low, high, starts).theta), shift=shift)
    return Agreement(
        log_ratio=float((predicted / exact).log().abs().median()),
        tau=float(kendalltau(predicted.numpy(), exact.numpy()).statistic),
        regret=float(exact[predicted.argmin()] / exact.min()),
        descent=objective.loss(end) / float(exact.min()),
    )


def synthetic(seeds: Sequence[int]) -> list[SiteData]:
    """One layer of every kind and seed."""
    return [layer_data(layer)[0] for seed in seeds for layer in layers(seed, size=SIZE)]


def trained(folder: Path) -> list[SiteData]:
    """Some sites of a shared model, evenly spread over its depth."""
    sites = [site.data for site in shared_sites(folder)]
    taken = min(len(sites), SITES_PER_MODEL)
    return [sites[i * len(sites) // taken] for i in range(taken)]


def row(label: str, scheme: str, found: Sequence[Agreement]) -> tuple[str, ...]:
    """One line of the table."""

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    tau, regret = [a.tau for a in found], [a.regret for a in found]
    return (
        label,
        scheme,
        str(len(found)),
        f"{middle([a.log_ratio for a in found]):.3f}",
        f"{middle(tau):.3f}",
        f"{min(tau):.3f}",
        f"{middle(regret):.4f}",
        f"{max(regret):.4f}",
        f"{middle([a.descent for a in found]):.3f}",
    )


def main() -> None:
    arguments_of = with_threads(parser(__doc__))
    arguments_of.add_argument("data", type=Path, nargs="?")
    arguments_of.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    arguments_of.add_argument("--models", nargs="*", default=list(MODELS))
    arguments_of.add_argument("--seeds", type=int, nargs="*", default=list(REPORTING_SEEDS[:1]))
    arguments = arguments_of.parse_args()
    with torch_threads(arguments.threads):
        where = machine()
        sets = [("synthetic", synthetic(arguments.seeds))]
        if arguments.data is not None:
            sets += [(name, trained(arguments.data / name)) for name in arguments.models]
        rows = []
        for label, sites in sets:
            for scheme in arguments.schemes:
                compared = [
                    compare(data, Scheme.parse(scheme), index, shifted=index % 2 == 1)
                    for index, data in enumerate(sites)
                ]
                found = [agreement for agreement in compared if agreement is not None]
                if found:
                    rows.append(row(label, scheme, found))
                    print(" | ".join(rows[-1]), flush=True)
    publish("NOISE_MODEL", f"{where}\n\n{table(HEADER, rows)}", arguments.out)


if __name__ == "__main__":
    main()
