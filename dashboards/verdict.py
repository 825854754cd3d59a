"""What a run came to, in the same words in a terminal and in the report: the verdict, the whole model, what is left to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from alphasmith.objectives.literals import Variant
from alphasmith.objectives.quantization.formats import told
from alphasmith.objectives.sites.coverage import Coverage, CoveredWeight, percent
from alphasmith.objectives.text import counted, listed, number

#: A manifest as parsed from its JSON; every key is optional.
Content = Mapping[str, Any]

#: Few sites make up the output error where this part of it comes from at most this part of them.
_MOST_OF_IT, _FEW = 2 / 3, 1 / 4
#: How shares of the output error came about, and the field of a site that has them: parts of all of it.
_SHARES = (("predicted", "share"), ("measured", "share_measured"))
#: Sites whose loss is so much above that of free scales per channel are named.
_ABOVE_LIMIT = 1.1
#: Share of the size from which on what stays float is named.
_LARGE = 0.25
#: Names in one sentence.
_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class OutputColumn:
    """A variant that the whole model was scored under.

    Attributes:
        heading: Of its column.
        key: Of its figure in the manifest's ``output`` and metrics.
        words: What follows its figure in the verdict.
    """

    heading: str
    key: str
    words: str


#: From the float model over the baselines to the result.
OUTPUT_COLUMNS = (
    OutputColumn(heading="float", key="float", words="float"),
    OutputColumn(heading="none", key="naive", words="without smoothing"),
    OutputColumn(heading="alpha 0.5", key="alpha_0.5", words="at alpha 0.5"),
    OutputColumn(heading="one alpha", key="one_alpha", words="with one swept alpha"),
    OutputColumn(heading="best single", key="best_single", words="with the best single alpha"),
    OutputColumn(heading="ours", key="ours", words="ours"),
)
#: Of the variants, as the text calls them.
VARIANT_NAMES: Mapping[Variant | str, str] = {
    "identity": "no smoothing",
    "alpha_0.5": "alpha 0.5",
    "one_alpha": "one swept alpha",
    "best_single": "the best single alpha of every site",
    "ours": "ours",
}
_LOSS_NAMES = {"mse": "relative MSE", "kl": "KL, nats", "task": "from the metric"}


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Figures of the whole model, as text.

    Attributes:
        columns: The variants that were scored.
        rows: Label and a figure per column: the loss at the output on held-out data, then every metric.
    """

    columns: tuple[OutputColumn, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def run_verdict(manifest: Content) -> str:
    """What a run came to, in one sentence without a stop: size, metric (else loss at the output) of every variant, what was kept.

    Args:
        manifest: Of the run.

    Returns:
        E.g. ``26 % of the size; perplexity 99.3 without smoothing, 58.7 at alpha 0.5, 49.8 with one swept alpha, 49.3 ours,
        48.2 float``; what was not measured is left out.
    """
    output = manifest.get("output") or {}
    size = size_share(manifest.get("payload") or {})
    metric = next((m for m in output.get("metrics") or () if _known(m)), None)
    figures = ""
    if metric is not None:
        figures = f"{metric['name']} {_figures(metric)}"
    elif _known(output):
        figures = f"output loss ({_LOSS_NAMES[output.get('loss', 'mse')]}) {_figures(output)}"
    kept = str(output.get("kept") or "ours")
    parts = (
        "" if size is None else f"{percent(size)} of the size",
        figures,
        "" if kept == "ours" else f"kept: {VARIANT_NAMES.get(kept, kept)}",
    )
    return "; ".join(filter(None, parts))


def training_verdict(manifest: Content) -> str:
    """What a training came to, in one sentence without a stop, with what the run before it came to; empty where there was none.

    Args:
        manifest: Of the training's result.

    Returns:
        E.g. ``trained further: accuracy 0.25 before, 1 after, on 12 held-out samples; the trained model is kept; before it: 26 % of ...``.
    """
    entry = manifest.get("training")
    if not entry:
        return ""
    before, after = entry["curve"][0], next(p for p in entry["curve"] if p["step"] == entry["best_step"])
    measured = entry["metric_name"] if before["metric"] is not None and after["metric"] is not None else None
    key, name = ("held_out_loss", "loss") if measured is None else ("metric", measured)
    kept = "the trained model is kept" if entry["kept"] else "the untrained model is kept"
    figures = f"{name} {number(before[key])} before, {number(after[key])} after"
    if not entry["best_step"]:
        figures = f"{name} {number(before[key])} before, and never better"
    told = f"trained further: {figures}, on {counted(len(entry['held_out']), 'held-out sample')}; {kept}"
    run = run_verdict(manifest)
    return f"{told}; before it: {run}" if run else told


def formats_verdict(manifest: Content) -> str:
    """What was chosen among formats of sites, in one sentence without a stop; empty where there was no choice.

    Args:
        manifest: Of the run.

    Returns:
        E.g. ``formats: int8-token at 3 of 24 sites: a, b, c; int8-static at the rest; 8 % of multiply-adds in dearer formats; output loss
        0.0079 -> 0.0052``.
    """
    entry = manifest.get("formats")
    if not entry:
        return ""
    point = next(p for p in entry["points"] if p["number"] == entry["picked"])
    first = next((p for p in entry["points"] if not p["formats"]), None)
    parts = [f"formats: {told(point['formats'], entry['sites'], entry['own'])}", _cost(entry, point)]
    if first is not None and first is not point and first["loss"] is not None and point["loss"] is not None:
        parts.append(f"output loss {number(first['loss'])} -> {number(point['loss'])} on tuning samples")
    if entry.get("metric") is not None:
        parts.append(f"metric {number(entry['metric'])}")
    return "; ".join(parts)


def format_grid(entry: Content) -> tuple[tuple[str, ...], list[list[str]]]:
    """The front of formats as a table, from the cheapest point to the dearest.

    Args:
        entry: The manifest's ``formats``.
    """
    timed = entry["cost_unit"] != "share of multiply-adds"
    columns = ("point", *(("time",) if timed else ()), "dearer multiply-adds", "output loss", "predicted", "formats")
    shown = [p for p in entry["points"] if p["on_front"] or p["number"] == entry["picked"]]
    rows = []
    for point in sorted(shown, key=lambda p: (p["cost"], p["number"])):
        kept = " (this one)" if point["number"] == entry["picked"] else ""
        row = [
            f"{point['number']}{kept}",
            *([f"{point['cost']:.3f}"] if timed else []),
            percent(point["share_of_macs"]),
        ]
        row += ["failed" if value is None else number(value) for value in (point["loss"], point["predicted"])]
        rows.append([*row, told(point["formats"], entry["sites"], entry["own"], named=False)])
    return columns, rows


def _cost(entry: Content, point: Content) -> str:
    share = f"{percent(point['share_of_macs'])} of multiply-adds in dearer formats"
    if entry["cost_unit"] == "share of multiply-adds":
        return share
    return f"{point['cost']:.3f} times the time of {entry['own']}, {share}"


def whole_model(output: Content) -> WholeModel:
    """The table of whole-model results.

    Args:
        output: The manifest's ``output``; a variant that no row has a figure of is left out, one that broke down is ``failed``.
    """
    loss = dict(output)
    if _known(output):
        loss["float"] = 1.0 if output.get("loss") == "task" else 0.0
    found: list[tuple[str, Content, bool]] = []
    if _known(output):
        found.append((f"output loss ({_LOSS_NAMES[output.get('loss', 'mse')]})", loss, False))
    for metric in output.get("metrics") or ():
        better = "higher" if metric.get("higher_is_better") else "lower"
        found.append((f"{metric.get('name')} ({better} is better)", metric, True))
    columns = tuple(c for c in OUTPUT_COLUMNS if any(values.get(c.key) is not None for _, values, _ in found))
    return WholeModel(
        columns=columns,
        rows=tuple(
            (name, tuple(_text(values.get(c.key), is_metric) for c in columns)) for name, values, is_metric in found
        ),
    )


def swept_alpha(output: Content) -> str:
    """Which one alpha the whole model was scored with, e.g. ``one alpha for the model: 0.85, the best of 10 at its output``.

    Args:
        output: The manifest's ``output``.

    Returns:
        Empty where none was swept.
    """
    sweep = output.get("sweep")
    return f"one alpha for the model: {sweep['alpha']:g}, the best of {sweep['trials']} at its output" if sweep else ""


def advice(manifest: Content) -> list[str]:
    """What to do about the rest: where the error comes from, what stays float, what was not measured; a sentence each.

    Args:
        manifest: Of the run; nothing is said that does not stand in it.
    """
    return [
        *_error_sources(manifest),
        *_room_to_the_limit(manifest.get("sites") or ()),
        *_float_part(manifest),
        *_no_metric(manifest.get("output") or {}),
    ]


def size_share(payload: Content) -> float | None:
    """Size of the quantized model over that of the model as it came; None where it was not recorded."""
    given = payload.get("model_given")
    return (payload["weights_quantized"] + payload["other"]) / given if given else None


def _known(figures: Content) -> bool:
    """Whether a variant has a figure."""
    return any(figures.get(column.key) is not None for column in OUTPUT_COLUMNS if column.key != "float")


def _figures(values: Content) -> str:
    """The figures of the verdict: the strongest plain baseline is one alpha for the model, else the best single alphas."""
    shown = [c for c in OUTPUT_COLUMNS if c.key not in ("float", "one_alpha", "best_single")]
    swept = "one_alpha" if values.get("one_alpha") is not None else "best_single"
    shown[-1:-1] = [c for c in OUTPUT_COLUMNS if c.key == swept]
    told = [f"{'failed' if values.get(c.key) is None else number(values[c.key])} {c.words}" for c in shown]
    if values.get("float") is not None:
        told.append(f"{number(values['float'])} float")
    return ", ".join(told)


def _text(value: float | None, is_metric: bool) -> str:
    """A figure of the table; metrics keep the digits that variants differ in."""
    if value is None:
        return "failed"
    if not is_metric or not 1e-3 <= abs(value) < 1e6:
        return number(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _error_sources(manifest: Content) -> list[str]:
    """Where the output error comes from, where that is a few sites."""
    if (tried := manifest.get("format_advice")) is not None:
        return [_tried(tried)]
    sites = manifest.get("sites") or ()
    how, key = next((pair for pair in _SHARES if any(s.get(pair[1]) is not None for s in sites)), _SHARES[0])
    shares = {str(site["name"]): float(site[key]) for site in sites if site.get(key) is not None}
    largest = sorted(shares, key=lambda name: -shares[name])
    reached = list(accumulate(shares[name] for name in largest))
    few = 1 + sum(part < _MOST_OF_IT for part in reached[:-1])
    if not reached or reached[few - 1] < _MOST_OF_IT or few > _FEW * len(sites):
        return []
    scheme = manifest.get("scheme") or {}
    static = scheme.get("activations") not in (None, "none") and scheme.get("activation_granularity") != "token"
    token = ', or give activations a scale per token (scheme.activation_granularity = "token")' if static else ""
    makes = f"{few} of {counted(len(sites), 'site')} {'makes' if few == 1 else 'make'} {percent(reached[few - 1])}"
    names = listed(largest[:few], _NAMED)
    return [f"{makes} of the {how} output error: {names}; leave their layers in float (sites.skip){token}"]


def _tried(entry: Content) -> str:
    """What another format at few sites was measured to bring."""
    few = len(entry["sites"])
    makes = f"{few} of {counted(entry['of'], 'site')} {'makes' if few == 1 else 'make'} {percent(entry['share'])}"
    names = listed(entry["sites"], _NAMED)
    brings = f"output loss {number(entry['before'])} -> {number(entry['after'])}"
    cost = f"cost {percent(entry['share_of_macs'])} of multiply-adds"
    return (
        f"{makes} of the predicted output error: {names}; {entry['format']} at {'it' if few == 1 else 'those'}: {brings}, {cost} "
        f"(budget.share_of_macs chooses such formats)"
    )


def _room_to_the_limit(sites: Sequence[Content]) -> list[str]:
    """Where scales chosen freely for every channel lose less."""
    searched = [(str(s["name"]), losses["held_out"]) for s in sites if (losses := s.get("losses")) is not None]
    known = [(name, of) for name, of in searched if of.get("limit") is not None]
    above = [(of["ours"] / of["limit"], name) for name, of in known if of["ours"] > _ABOVE_LIMIT * of["limit"] > 0]
    if not above:
        return []
    above.sort(reverse=True)
    names = listed([f"{name} ({factor:.2g} times)" for factor, name in above], _NAMED)
    where = (
        f"at {len(above)} of {counted(len(known), 'site')} the loss is more than {_ABOVE_LIMIT:g} times that of scales"
    )
    remedy = "more groups (groups.k) or trials (search.trials) may find part of it"
    return [f"{where} chosen freely for every channel: {names}; {remedy}"]


def _float_part(manifest: Content) -> list[str]:
    """What keeps the model from getting smaller."""
    payload = manifest.get("payload") or {}
    found = Coverage(weights=tuple(CoveredWeight(**weight) for weight in manifest.get("weights") or ()))
    if not found.left or not payload:
        return []
    share = payload["other"] / max(payload["weights_quantized"] + payload["other"], 1)
    if share < _LARGE:
        return []
    reason, _, layers = found.reasons()[0]
    return [f"{percent(share)} of the size that is left is not quantized weights: {listed(layers, _NAMED)} ({reason})"]


def _no_metric(output: Content) -> list[str]:
    if output.get("metrics") or not _known(output):
        return []
    return [
        "no task metric was measured: the output loss tells variants apart, not how well the model works (data.metric)"
    ]
