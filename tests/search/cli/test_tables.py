"""Results as text: what is cut is said, numbers are the given ones, failures are words."""

from __future__ import annotations

from typing import Any

from alphasmith.search.cli import tables as texts


def site(name: str, **changes: Any) -> dict[str, Any]:
    """A row as ``frame_rows`` gives it."""
    row: dict[str, Any] = {
        "site": name,
        "mode": "fold",
        "reason": "",
        "channels": 64,
        "identity": 8e-3,
        "alpha_half": 4e-4,
        "best_single": 2.5e-4,
        "best_single_alpha": 0.65,
        "ours": 2e-4,
        "limit": None,
    }
    return row | changes


def left(name: str, reason: str) -> dict[str, Any]:
    """A site that was not searched."""
    nothing = dict.fromkeys(("identity", "alpha_half", "best_single", "best_single_alpha", "ours", "limit"))
    return site(name, mode="left", reason=reason, **nothing)


def test_a_row_per_searched_site_with_its_gain() -> None:
    text = texts.sites_table([site("fc1"), site("fc2", best_single=None), left("gate", "it feeds experts")])
    first, second = (line.split() for line in text.splitlines() if line.strip().startswith("fc"))
    assert first[3:6] == ["8.00e-3", "4.00e-4", "0.65"]
    assert " ".join(first[6:-1]) == "best single alpha 2.50e-4, ours 2.00e-4, limit n/a"
    assert first[-1] == "0.800"
    assert "0.800" not in second
    assert "gate left: it feeds experts" in text


def test_a_row_says_what_was_chosen() -> None:
    chosen = {"groups": 4, "shift": True, "range_statistic": "margin", "range_factor": 1.1, "grouping": "kmeans"}
    text = texts.sites_table([site("fc1", **chosen), site("fc2", groups=2)])
    first, second = (line for line in text.splitlines() if line.strip().startswith("fc"))
    assert first.endswith("K 4, shift, range x1.1 (margin)")
    assert second.endswith("K 2")


def test_a_row_fits_whatever_was_chosen() -> None:
    chosen = {"groups": 16, "shift": True, "range_statistic": "percentile", "range_factor": 0.9312}
    text = texts.sites_table([site("a" * 60, mode="explicit", channels=16384, limit=1e-4, **chosen)])
    assert "range x0.931 (percentile)" in text
    assert "limit 1.00e-4" in text


def test_the_refinement_is_told() -> None:
    details = dict.fromkeys(("id", "name", "status", "reason", "scheme", "scope", "created", "finished", "folder"), "x")
    rows: dict[str, Any] = {"trials": 4, "hardware": {}, "sites": []}
    assert "refinement" not in texts.run_text(details | rows | {"refinement": None})
    entry = {"accepted": False, "reason": "every trial failed", "before": None}
    text = texts.run_text(details | rows | {"refinement": entry})
    assert "refinement at the output: not accepted: every trial failed" in text


def test_long_tables_are_cut_and_say_so() -> None:
    rows = [site(f"layer.{i}") for i in range(texts.MOST_SITES + 7)]
    rows += [left(f"left.{i}", f"reason {i % 11}") for i in range(22)]
    text = texts.sites_table(rows)
    assert f"layer.{texts.MOST_SITES - 1}" in text
    assert f"layer.{texts.MOST_SITES} " not in text
    assert "and 7 more sites" in text
    assert "left.0 and 1 more left: reason 0" in text
    assert "and 3 more reasons" in text
    assert "reason 9" not in text


def test_long_names_keep_their_end() -> None:
    name = "model.decoder.layers.11.encoder_attention.output.projection"
    text = texts.sites_table([site(name)])
    assert name not in text
    assert "..." in text
    assert "output.projection" in text


def test_nothing_searched_is_an_empty_table() -> None:
    assert texts.sites_table([]) == ""
    assert "no runs yet" in texts.runs_table([])


def test_failed_variants_are_words() -> None:
    losses = {"naive": None, "alpha_0.5": 0.25, "best_single": 0.125, "ours": 0.0625}
    metric = {"name": "accuracy", "higher_is_better": True, "float": 0.9, **losses}
    text = texts.model_table({"output": losses | {"loss": "kl", "metrics": [metric]}})
    accuracy = next(line for line in text.splitlines() if "accuracy" in line)
    assert accuracy.split()[-5:] == ["0.9000", "failed", "0.2500", "0.1250", "0.0625"]
    assert "(higher is better)" in accuracy
    assert "KL" in text


def test_verify_says_what_it_could_not_check() -> None:
    text = texts.verify_text({"artifacts": 7, "skipped": "the model was handed over by a script"})
    assert text.startswith("7 files")
    assert "equivalence not checked: the model was handed over" in text
