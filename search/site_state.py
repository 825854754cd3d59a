"""What a search at one site found, as tensors for the artifact store; and candidates as JSON for the records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.tensor_state import StateFormat
from alphasmith.search.candidates import Candidate
from alphasmith.search.site_result import SiteResult

_FORMAT = StateFormat(SiteResult, version=1, what="site result", remedy="search the site again")


def result_state(result: SiteResult) -> dict[str, Tensor]:
    """The whole result as contiguous CPU tensors that share no memory, e.g. for safetensors."""
    return _FORMAT.state(result)


def result_from_state(state: Mapping[str, Tensor]) -> SiteResult:
    """The result whose ``state`` this is, equal to the bit; its tensors are where those of ``state`` are.

    Raises:
        InputError: Something is missing, or another version of Alphasmith wrote it.
    """
    return _FORMAT.record(state)


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON: ``{"kind": ..., "params": {...}}``, with the parameters that Optuna's trials have."""
    return {"kind": candidate.kind, "params": candidate.params()}


def candidate_of(value: Mapping[str, Any]) -> Candidate:
    """The candidate that :func:`candidate_json` made ``value`` from.

    Raises:
        InputError: It is no candidate, or one that another version of Alphasmith wrote.
    """
    try:
        found = asdict(Candidate.of(value["kind"], value["params"]))
        return TypeAdapter(Candidate).validate_python(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("candidate", "a recorded candidate cannot be read", "search without search.reuse") from error
