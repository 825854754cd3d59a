"""What a site costs on the target in every format: multiply-adds, bytes moved, seconds. Source: claim A-3, formulas fA7 and fA19."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.scheme import ActivationFormat, Scheme
from alphasmith.objectives.sites.types import Site
from alphasmith.search.inputs.hardware import BYTES_PER_WEIGHT, HardwareBudget

#: float32 multiply-adds that one of the threads which a GPU runs at once does in a second.
_RATE = 1e8
#: float32 multiply-adds that a machine does while it moves one byte, where only one of both is known; CPUs and GPUs are about alike.
_BALANCE = 8.0
#: A multiply-add between operands of 8 bits over one of float32: a register holds four times as many. int16 takes two of them.
_BYTE, _HALF, _FLOAT = 0.25, 0.5, 1.0
#: Bytes of a number in the format activations are multiplied in.
_BYTES: dict[ActivationFormat, int] = {"int8": 1, "uint8": 1, "fp8": 1, "int16": 2, "none": 4}
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class SiteShape:
    """Sizes of a site in one forward.

    Attributes:
        rows: T, rows of its input: tokens, or places of a convolution's output.
        inputs: Numbers of one row that are rounded.
        outputs: O, outputs of all operators together.
        weights: Weights of all operators together; every row meets each of them once.
    """

    rows: int
    inputs: int
    outputs: int
    weights: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise InputError(name, f"{value} is below 1", "give the sizes of a site that is multiplied with")

    @classmethod
    def of(cls, site: Site, rows: int) -> SiteShape:
        """Shape of a site.

        Args:
            site: The site.
            rows: T.
        """
        weights = [
            o.in_channels // o.groups * o.out_channels * prod(o.kernel) * max(o.stacked, 1) for o in site.operators
        ]
        return cls(
            rows=rows, inputs=site.channels, outputs=sum(o.out_channels for o in site.operators), weights=sum(weights)
        )


@dataclass(frozen=True, kw_only=True)
class FormatCost:
    """What one forward of a site takes.

    Attributes:
        multiply_adds: In units of one multiply-add between float32 numbers.
        moved: Bytes read and written: weights, input, codes, output.
        held: Bytes of weights and their scales that stay in memory.
        seconds: The longer of computing and moving; None where neither threads nor bandwidth of the target are known.
        amount: The same in seconds, or as if the bandwidth were one byte a second: what formats are compared by.
    """

    multiply_adds: float
    moved: float
    held: float
    seconds: float | None
    amount: float


def format_cost(shape: SiteShape, scheme: Scheme, hardware: HardwareBudget) -> FormatCost:
    """Cost of a site in a format on a machine. Source: formula fA19.

    Args:
        shape: The site.
        scheme: Its formats.
        hardware: What the target offers; of threads and bandwidth, the unknown one is put at the usual ratio to the other.
    """
    multiply_adds = _multiply_adds(shape, scheme)
    scales = 0 if scheme.is_float else shape.outputs
    if scheme.group_size is not None:
        scales = -(-shape.weights // scheme.group_size)
    held = shape.weights * BYTES_PER_WEIGHT[scheme.weights] + _FLOAT_BYTES * scales
    values = shape.rows * shape.inputs
    moved = held + _FLOAT_BYTES * (values + shape.rows * shape.outputs)
    if scheme.activations != "none":  # codes are written once and read once
        moved += 2 * _BYTES[scheme.activations] * values
        if scheme.activation_granularity == "token":  # the row is read once more, to find its range
            moved += _FLOAT_BYTES * values
    threads, bandwidth = hardware.gpu_threads, hardware.bandwidth
    known = threads is not None or bandwidth is not None
    speed = 1.0 if bandwidth is None else float(bandwidth)
    rate = _BALANCE * speed if threads is None else _RATE * threads
    speed = rate / _BALANCE if bandwidth is None else speed
    amount = max(multiply_adds / rate, moved / speed)
    return FormatCost(
        multiply_adds=multiply_adds, moved=moved, held=held, seconds=amount if known else None, amount=amount
    )  # fmt: skip


def relative_costs(
    shapes: Iterable[SiteShape], schemes: Iterable[Scheme], hardware: HardwareBudget
) -> Mapping[str, float]:
    """Cost of all sites in each of some formats, over that of the first.

    Args:
        shapes: The sites.
        schemes: The formats.
        hardware: What the target offers.

    Raises:
        InputError: There is no site or no format.
    """
    sites, formats = list(shapes), list(schemes)
    if not sites or not formats:
        raise InputError("formats", "there is nothing to compare", "give a site and a format")
    amounts = {s.name: sum(format_cost(shape, s, hardware).amount for shape in sites) for s in formats}
    return {name: amount / amounts[formats[0].name] for name, amount in amounts.items()}


def _multiply_adds(shape: SiteShape, scheme: Scheme) -> float:
    """In units of one between float32 numbers; what a row or an output takes beside the product is one each."""
    values, results = shape.rows * shape.inputs, shape.rows * shape.outputs
    products = shape.rows * shape.weights
    if scheme.activations == "none":
        return _FLOAT * products + (0 if scheme.is_float else shape.weights)  # weights become float once
    total = (_HALF if scheme.activations == "int16" else _BYTE) * products + values + results
    if scheme.activation_granularity == "token":
        # Every row finds its range; with a zero point both ends of it, and every output takes out its row's.
        total += values * (2 if scheme.asymmetric else 1) + results * (2 if scheme.asymmetric else 1)
    if scheme.group_size is not None:
        total += products / scheme.group_size  # sums of groups are scaled one by one
    return total
