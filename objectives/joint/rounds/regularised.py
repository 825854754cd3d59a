"""Training with the sparsity terms, from which the rounds start. Source: claims B-1, B-4; formulas fB1 to fB3."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from alphasmith.objectives.joint.ports import JointTask
from alphasmith.objectives.joint.rounds._updates import update
from alphasmith.objectives.joint.rounds.outcome import Regularised, UpdatePoint
from alphasmith.objectives.joint.rounds.settings import RegularisedSettings
from alphasmith.objectives.joint.sparsity.targets import find_targets
from alphasmith.objectives.joint.sparsity.terms import sparsity_terms
from alphasmith.objectives.model.private_copy import private_copy


def train_regularised(
    model: nn.Module,
    task: JointTask,
    settings: RegularisedSettings,
    *,
    progress: Callable[[UpdatePoint], None] = lambda point: None,
    stop: Callable[[], bool] = lambda: False,
) -> Regularised:
    """Train a copy of a model on its task with both sparsity terms; the same settings give the same bits. Source: formula fB3.

    A loss or gradient that is not finite ends the training at the last good weights, with the step named.

    Args:
        model: Trained or not; left as it is. All floating parameters of the copy are trained.
        task: Loss and samples; nothing is measured.
        settings: How.
        progress: Receives every point of the curve.
        stop: Polled before every update; True ends the training as interrupted.

    Raises:
        InputError: There is no sample to train on, a setting is out of range, or the loss is no scalar.
    """
    copy = private_copy(model).eval()
    device = next((parameter.device for parameter in copy.parameters()), None)
    example = task.train.batch(range(min(2, len(task.train)))).to(device)
    targets = find_targets(copy, example)
    sparsity = settings.sparsity
    wanted = sparsity.encoder > 0 or sparsity.recurrent > 0
    training = update(
        copy,
        task,
        settings.updates,
        terms=(lambda trained: sparsity_terms(trained, targets, sparsity)) if wanted else None,
        progress=progress,
        stop=stop,
    )
    return Regularised(model=copy, training=training, targets=targets)
