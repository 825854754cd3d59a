"""``search_site``: what it takes in many forms, and what it refuses in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from alphasmith.objectives.errors import InputError
from alphasmith.search.site.search import search_site


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x.numpy(),
        lambda x: x.double().numpy(),
        lambda x: x.numpy().astype(">f8"),
        lambda x: pd.DataFrame(x.numpy()),
        lambda x: x.tolist(),
        lambda x: nn.Parameter(x),
        lambda x: x.double(),
        lambda x: x.to_sparse(),
    ],
)
def test_x_and_w_in_every_form_give_the_same_result(given: Callable[[Tensor], Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 6, generator=generator), torch.randn(3, 6, generator=generator)
    found = search_site(given(x), given(w), scheme={"weights": "int4"}, groups=1, trials=4)
    plain = search_site(x, w, scheme="w4a8-channel-static", groups=1, trials=4)
    assert (found.held_out_loss, found.winner) == (plain.held_out_loss, plain.winner)
    assert torch.equal(found.scales, plain.scales)


@pytest.mark.parametrize(
    ("keywords", "field", "words"),
    [
        ({"x": np.zeros((4, 6), dtype=object)}, "x", "array of numbers"),
        ({"x": pd.DataFrame({"a": ["b", "c"]})}, "x", "numeric columns"),
        ({"x": [[1.0], [1.0, 2.0]]}, "x", "array of numbers"),
        ({"x": [(torch.zeros(2, 6), torch.zeros(2))]}, "x", "array of numbers"),
        ({"x": np.full((4, 6), np.nan)}, "x", "remove"),
        ({"x": np.zeros((0, 6))}, "x", "rows"),
        ({"x": 3.0}, "x, w", "(T, C)"),
        ({"w": np.zeros(6)}, "x, w", "(T, C)"),
        ({"w": nn.Linear(6, 3)}, "w", "array of numbers"),
        ({"scheme": {"weights": "int3"}}, "scheme.weights", "correct"),
        ({"scheme": {"wieghts": "int8"}}, "scheme.wieghts", "'weights'"),
        ({"scheme": {"weights": "fp8"}}, "scheme.activations", "fp8"),
        ({"scheme": "w8a9"}, "scheme", "w8a8-channel-static"),
        ({"scheme": 8}, "scheme", "w8a8-channel-static"),
        ({"scheme": None}, "scheme", "w8a8-channel-static"),
        ({"groups": "many"}, "groups.k", "correct"),
        ({"trials": "many"}, "search.trials", "correct"),
        ({"seed": 2**40}, "search.seed", "correct"),
        ({"settings": "run.toml"}, "config", "RunConfig"),
        ({"settings": {"serach": {}}}, "serach", "'search'"),
        ({"storage": Path("runs.db")}, "storage", "correct"),
    ],
)
def test_what_cannot_be_searched_is_one_line(keywords: dict[str, Any], field: str, words: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(8, 6), "w": torch.ones(3, 6), "scheme": "w8a8-channel-static"}
    with pytest.raises(InputError) as caught:
        search_site(**{**given, **keywords})
    assert caught.value.field == field
    assert words in caught.value.remedy
    assert "\n" not in str(caught.value)
