"""The model card of an export: what was done to the model, what it costs, and how it is loaded."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.objectives.text import listed, number
from alphasmith.storage.output.export_record import ExportRecord
from alphasmith.storage.output.manifest import Manifest

#: Where a model card is looked for, and where that of the original model is kept.
CARD = "README.md"
ORIGINAL_CARD = f"ORIGINAL_{CARD}"

_LOADING = {
    "compressed-tensors": """In transformers, after `pip install transformers compressed-tensors`:

```python
from transformers import CLASS

model = CLASS.from_pretrained("FOLDER")
```

Language models in vLLM, which needs nothing else: `vllm serve FOLDER`, or

```python
from vllm import LLM

model = LLM(model="FOLDER")
```

Codes and scales are checked by `alphasmith verify FOLDER`.""",
    "onnx": """Needs `pip install onnxruntime`:

```python
import onnxruntime

options = onnxruntime.SessionOptions()
OPTIONS
session = onnxruntime.InferenceSession("FOLDER/FILE", options)
print([value.name for value in session.get_inputs()])  # what it takes
outputs = session.run(None, {...})
```""",
}
#: What of a class of transformers stands in the way of a quantized checkpoint: ``splits``, it may make several weights of one tensor;
#: ``initializes``, it initializes a weight of every linear layer, and packed ones have none.
Obstacle = Literal["splits", "initializes"]
#: What comes before loading, as of transformers 5.23.
_BEFORE: Mapping[Obstacle, str] = {
    "splits": """from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# No weight of this checkpoint is split on loading; transformers refuses quantized checkpoints of classes that may split one.
whole = [entry for entry in get_checkpoint_conversion_mapping("CLASS") if len(entry.target_patterns) == 1]
register_checkpoint_conversion_mapping("CLASS", whole, overwrite=True)

""",
    "initializes": """from transformers import PreTrainedModel

# Nothing is to be initialized in a packed layer, which has no plain weight.
initialize = PreTrainedModel._initialize_weights
PreTrainedModel._initialize_weights = lambda self, module, *more: (
    None if hasattr(module, "weight_packed") else initialize(self, module, *more)
)

""",
}
#: Session options by layout of ONNX models.
_OPTIONS = {
    "ort-u8": "# no option needed: unsigned codes are exact on every processor",
    "ort-s8": "# no option needed: exact on processors with VNNI",
    "qdq": 'options.add_session_config_entry("session.x64quantprecision", "1")  # exact on x86 without VNNI, too',
}


def model_card(
    manifest: Manifest,
    record: ExportRecord,
    *,
    architecture: str,
    original: str | None,
    licences: Sequence[str],
    obstacles: Sequence[Obstacle] = (),
) -> str:
    """The card as Markdown, with the licence of the original model.

    Args:
        manifest: Of the result.
        record: Of the export, without files.
        architecture: Class of transformers that the model is of.
        original: The card of the original model, or None.
        licences: Names of the licence files that travel with the model.
        obstacles: What of its class stands in the way of loading it.
    """
    front = "\n".join(("---", *_front(record, original), "---"))
    parts = [front, f"# {manifest.model.name}, {record.scheme}", *_done(manifest, record), *_losses(manifest, record)]
    parts += ["## Loading", _loading(record, architecture, obstacles)]
    if record.notes or record.left or record.unsmoothed:
        parts += ["## What differs", "\n".join(f"- {line}" for line in _differs(record))]
    parts += ["## Licence", _licence(original, licences), "## Provenance", _provenance(manifest, record)]
    return "\n\n".join(parts) + "\n"


def _loading(record: ExportRecord, architecture: str, obstacles: Sequence[Obstacle]) -> str:
    told = _LOADING[record.format]
    before = "".join(_BEFORE[obstacle] for obstacle in obstacles)
    told = told.replace("model = CLASS.", f"{before}model = CLASS.", 1)
    told = told.replace("CLASS", architecture).replace("OPTIONS", _OPTIONS.get(record.layout or "", ""))
    models = [entry.path for entry in record.artifacts if entry.path.endswith(".onnx")]
    if len(models) > 1:
        told += f"\n\nModels: {listed(models)}."
    return told.replace("FILE", models[0] if models else "")


def _front(record: ExportRecord, original: str | None) -> Iterator[str]:
    licence = _stated(original, "license")
    if licence:
        yield f"license: {licence}"
    yield "tags:"
    yield f"- {record.format}"
    yield "- quantized"


def _stated(original: str | None, field: str) -> str:
    """A field of the front matter of a card; empty: it has none."""
    block = re.match(r"---\n(.*?)\n---", original or "", flags=re.DOTALL)
    found = re.search(rf"^{field}:[ ]*([\w.+-]+)[ ]*$", block.group(1), flags=re.MULTILINE) if block else None
    return found.group(1) if found else ""


def _done(manifest: Manifest, record: ExportRecord) -> Iterator[str]:
    count = len(record.operators)
    yield (
        f"Quantized to {record.scheme} with smoothing coefficients that Alphasmith searched: every channel j of an input is "
        "divided by s_j = a_j^alpha / w_j^(1 - alpha), the weights are multiplied by it, and channels of one group share an "
        f"alpha. {count} operators are quantized."
    )
    smoothed = [site for site in manifest.sites if site.mode != "left" and site.winner not in (None, "identity")]
    alphas = [group.alpha for site in smoothed for group in site.groups if group.alpha is not None]
    if alphas:
        yield (
            f"Alphas of {len(alphas)} groups at {len(smoothed)} sites: from {min(alphas):.2f} to {max(alphas):.2f}, "
            f"median {statistics.median(alphas):.2f}."
        )
    else:
        yield "No site has an alpha: what was kept is the model without smoothing."
    divided = sum(site.mode == "explicit" for site in manifest.sites)
    if divided and not record.unsmoothed:
        yield f"{divided} of {len(manifest.sites)} sites are divided at run time, the others in the weights before them."
    if manifest.training is not None:
        yield f"The quantized model was trained further ({manifest.training.id})."


def _losses(manifest: Manifest, record: ExportRecord) -> Iterator[str]:
    output = manifest.output
    columns = [
        ("no smoothing", output.naive, "naive"),
        ("alpha 0.5", output.alpha_half, "alpha_half"),
        ("one alpha for the model", output.one_alpha, "one_alpha"),
        ("best alpha per site", output.best_single, "best_single"),
        ("this model", output.ours if output.kept == "ours" else None, "ours"),
    ]
    told = {"mse": "relative squared error", "kl": "KL divergence [nats]", "task": "loss of the task metric"}
    names = " | ".join(name for name, _, _ in columns)
    rows = [f"| | float | {names} |", "|---" * (len(columns) + 2) + "|"]
    if any(value is not None for _, value, _ in columns):
        rows.append(f"| {told[output.loss]} at the output | 0 | {' | '.join(number(v, 4) for _, v, _ in columns)} |")
    for metric in output.metrics:
        values = " | ".join(number(getattr(metric, field), 4) for _, _, field in columns)
        rows.append(f"| {metric.name} | {number(metric.float_model, 4)} | {values} |")
    if len(rows) > 2:
        yield "## Quality"
        trained = "" if manifest.training is None else " before it was trained further"
        yield f"On held-out samples, {_products(record)}{trained}:"
        yield "\n".join(rows)
    if output.kept != "ours":
        yield f"What was kept is the baseline {output.kept}: the search found nothing better at the output."


def _products(record: ExportRecord) -> str:
    """What the losses were measured with."""
    schemes = {Scheme.parse(operator.scheme) for operator in record.operators}
    if any(scheme.kernel != "exact" for scheme in schemes):
        return "products of 8-bit integers that saturate in pairs"
    if all(scheme.integer_operands for scheme in schemes):
        return "exact products of integers"
    return "products of the rounded values"


def _differs(record: ExportRecord) -> Iterator[str]:
    for site in record.unsmoothed:
        yield (
            f"site {site.name} is written as if no alpha had been found: its loss is {number(site.loss_unsmoothed)}, "
            f"{number(site.loss)} with what was found"
        )
    if record.left:
        yield f"float here, quantized in the run: {listed([one.name for one in record.left])}"
    yield from record.notes


def _licence(original: str | None, licences: Sequence[str]) -> str:
    stated = _stated(original, "license")
    if licences:
        return f"That of the original model: see {listed(licences)}."
    if stated:
        return f"That of the original model: {stated}."
    return "That of the original model, whose folder does not state it."


def _provenance(manifest: Manifest, record: ExportRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))
    rows = [f"- run {record.run}", f"- weights of the original (sha256): {manifest.model.digest}"]
    rows += [f"- calibration data (sha256): {manifest.data_digest}", f"- {versions}"]
    rows += [
        "- every operator's codes and scales have a digest in `export.json`; check them with `alphasmith verify FOLDER`"
    ]
    return "\n".join(rows)
