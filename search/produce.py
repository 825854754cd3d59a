"""What is written at the end of a run: the quantized weights and the folded, proven float model."""

from __future__ import annotations

from alphasmith.objectives.candidate_model import CandidateModel
from alphasmith.objectives.equivalence import Equivalence, fold_and_prove
from alphasmith.objectives.memory import measured_peak
from alphasmith.search.config import RunConfig
from alphasmith.search.outcome import Found, Products, Proof
from alphasmith.search.prepare import Prepared, search_device
from alphasmith.search.progress import Progress
from alphasmith.search.task import Task


def produce(
    config: RunConfig,
    task: Task,
    prepared: Prepared,
    candidate: CandidateModel,
    found: Found,
    baseline: int,
    progress: Progress,
) -> Products:
    """Quantize, then fold and prove on the same model; EquivalenceError leaves nothing behind.

    The quantized weights are kept while the model they came from is folded, so there is never a second float model.

    Args:
        config: The run's configuration.
        task: Its proof data.
        prepared: Sites.
        candidate: The model they are in; folded afterwards.
        found: What the search decided.
        baseline: Memory of the libraries, the model left out [bytes].
        progress: Told what happens.

    Raises:
        EquivalenceError: Folding changes what the float model computes.
    """
    progress.stage("quantizing", 1)
    candidate.apply(found.final)
    summary = candidate.summary()
    tensors, structure = candidate.payload()
    model = candidate.reset()
    candidate.check_pristine()
    progress.advance()
    progress.stage("proving equivalence", 1)
    foldable = [s for s in prepared.sites if s.mode == "fold" and s.name in found.final]
    proven: Equivalence | None = None
    if foldable:
        device = search_device(config)
        proven = fold_and_prove(
            model,
            foldable,
            found.final,
            [b.to(device) for b in task.proof],
            tolerance=config.proof.tolerance,
            float64_bytes=prepared.plan.float64,
        )
    progress.advance()
    return Products(
        folded=model,
        tensors=tensors,
        structure=structure,
        summary=summary,
        proof=Proof(
            tolerance=config.proof.tolerance,
            error=proven.error if proven else None,
            batches=len(task.proof),
            dtype=proven.dtype if proven else None,
        ),
        peak=measured_peak(baseline),
    )
