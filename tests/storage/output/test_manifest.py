"""The manifest: round trips, refuses contradictions, and is the same for the same run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.quantization.scheme import Scheme
from alphasmith.storage.files.durable import ArtifactDigest
from alphasmith.storage.output import manifest as room
from alphasmith.storage.output.entries import SchemeEntry, SiteEntry
from alphasmith.storage.output.manifest import Manifest, parse_manifest, read_manifest, schema, schema_text
from alphasmith.storage.runs.entries import Group, Losses

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
DIGEST = "0123456789abcdef" * 4
LOSSES = {"identity": 1.0, "alpha_0.5": 0.5, "best_single": 0.4, "best_single_alpha": 0.6, "ours": 0.3, "limit": 0.25}


def content(**changes: Any) -> dict[str, Any]:
    """A manifest as JSON, with every part filled in."""
    return {
        "schema_version": 3,
        "run": {"id": "r-1", "name": "demo", "created": NOW, "started": NOW, "finished": NOW + timedelta(minutes=1)},
        "versions": {"alphasmith": "0.1.0", "torch": "2.13.0"},
        "config": {"groups": 4, "search": {"seconds": 60, "study": "mine"}},
        "seeds": {"search": 0},
        "notes": ["synthetic outliers"],
        "model": {"kind": "demo", "name": "image", "digest": DIGEST, "parameter_count": 10},
        "data_digest": DIGEST,
        "scheme": SchemeEntry.of(Scheme()).model_dump(),
        "conventions": {
            "statistic": "absmax",
            "percentile": None,
            "clamp": 1e-5,
            "clamp_max": 1e5,
            "dead_channels": "s = 1",
        },
        "hardware": {
            "budget": {"memory": 2**34, "threads": 1000, "bandwidth": 1e12},
            "required": {"memory": 2**33, "threads": None, "bandwidth": 2.5e10},
            "rho": 0.5,
            "explanation": "half of the reference",
        },
        "scope": "site",
        "space_hash": DIGEST,
        "study": None,
        "groups": [],
        "sites": [
            {
                "name": "q",
                "position": 0,
                "mode": "fold",
                "reason": "",
                "channels": 3,
                "operators": ["q", "k"],
                "producers": ["norm"],
                "edits": [{"parameter": "norm.weight", "power": -1, "offset": 1.0, "channel": "channel/q/0"}],
                "shift_edits": [
                    {"parameter": "norm.bias", "channel": "shift_channel/q/0", "weight": "", "transposed": False},
                    {"parameter": "q.bias", "channel": "shift_channel/q/1", "weight": "q.weight", "transposed": False},
                ],
                "study": "r-1/q",
                "groups": [
                    {
                        "index": 0,
                        "size": 2,
                        "magnitude": 1.0,
                        "low": 0.1,
                        "high": 0.5,
                        "alpha": 0.2,
                        "explanation": "e",
                        "beta": 0.7,
                        "offset": -0.125,
                    },
                    {"index": 1, "size": 1, "magnitude": 9.0, "low": 0.5, "high": 0.9, "alpha": 0.8, "explanation": ""},
                ],
                "labels": [0, 1, 0],
                "losses": {"search": LOSSES, "held_out": LOSSES | {"limit": None}},
                "winner": "sampler",
                "trials": 32,
                "exact_evaluations": 40,
                "seconds": 1.5,
                "shift": True,
                "range_statistic": "percentile",
                "range_factor": 0.93,
                "grouping": "kmeans",
                "statistic": "absmax",
                "facts": {
                    "stopped": "within 1 % of the limit",
                    "noise_model": {"median_log_ratio": 0.02, "kendall_tau": 0.9, "seconds": 0.1, "proposals": 2},
                    "k_tried": [1, 2],
                    "range_losses": {"absmax": 2.4e-4, "percentile": 2.3e-4},
                },
            }
        ],
        "skipped": [{"name": "head", "reason": "weight shared with embeddings"}],
        "output": {
            "naive": 0.1,
            "alpha_0.5": 0.05,
            "best_single": None,
            "ours": 0.03,
            "kept": "ours",
            "search": LOSSES,
            "held_out": LOSSES | {"identity": None},
            "metrics": [
                {
                    "name": "accuracy",
                    "higher_is_better": True,
                    "float": 0.97,
                    "naive": 0.8,
                    "alpha_0.5": 0.95,
                    "best_single": None,
                    "ours": 0.96,
                }
            ],
        },
        "proof": {"tolerance": 1e-4, "error": 1e-7, "batches": 2},
        "payload": {"weights_float": 400, "weights_quantized": 100, "other": 20},
        "guard": [{"site": "q", "proposed": "sampler", "kept": "sampler", "reason": "better on held-out rows"}],
        "refinement": {
            "accepted": True,
            "before": 1.23e-3,
            "after": 1.1e-3,
            "difference": 1.3e-4,
            "standard_error": 2e-5,
            "reason": "the held-out output loss falls by 6.5 standard errors",
            "deltas": {"q_proj,k_proj": -0.1},
            "changed": {"q": "alphas -0.100"},
            "trials": 16,
            "seconds": 3.5,
            "study": "r-1/refinement",
        },
        "memory": {"predicted": 1000, "measured": 900},
        "artifacts": [
            {"kind": "scales", "path": "scales.safetensors", "sha256": DIGEST, "bytes": 12, "reproducible": True},
            {"kind": "report", "path": "report.html", "sha256": DIGEST, "bytes": 99, "reproducible": False},
        ],
    } | changes


def make(**changes: Any) -> Manifest:
    return Manifest.model_validate(content(**changes))


def site(**changes: Any) -> dict[str, Any]:
    first: dict[str, Any] = content()["sites"][0]
    return first | changes


def test_round_trip_and_bytes() -> None:
    manifest = make()
    text = manifest.to_json()
    assert parse_manifest(text) == manifest
    assert parse_manifest(text).to_json() == text
    assert json.loads(text)["sites"][0]["losses"]["search"]["alpha_0.5"] == 0.5
    assert json.loads(text)["output"]["metrics"][0]["float"] == 0.97
    assert json.loads(text)["run"]["created"] == "2026-01-31T12:00:00Z"


def test_a_manifest_of_version_1_is_read_with_defaults() -> None:
    old = json.loads(make().to_json())
    for name in ("shift", "range_statistic", "range_factor", "grouping", "statistic", "facts", "shift_edits"):
        del old["sites"][0][name]
    for group in old["sites"][0]["groups"]:
        del group["beta"], group["offset"]
    del old["refinement"], old["sites"][0]["position"], old["conventions"]["clamp_max"]
    read = parse_manifest(json.dumps(old | {"schema_version": 1}))
    assert read.schema_version == 3
    assert (read.refinement, read.sites[0].shift, read.sites[0].range_factor) == (None, False, 1.0)
    assert (read.sites[0].position, read.conventions.clamp_max) == (0, None)
    assert parse_manifest(read.to_json()) == read


def test_times_are_written_in_utc() -> None:
    east = NOW.astimezone(timezone(timedelta(hours=9)))
    run = content()["run"]
    assert make(run=run | {"created": east}).to_json() == make().to_json()
    with pytest.raises(ValidationError, match="timezone"):
        make(run=run | {"created": NOW.replace(tzinfo=None)})


def test_without_times_is_equal_for_equal_results() -> None:
    later = NOW + timedelta(days=3)
    artifacts = content()["artifacts"]
    slower_facts = site()["facts"] | {"noise_model": site()["facts"]["noise_model"] | {"seconds": 7.0}}
    other = make(
        run={"id": "r-2", "name": "demo", "created": later, "started": later, "finished": later},
        sites=[site(seconds=99.0, study="r-2/q", facts=slower_facts)],
        refinement=content()["refinement"] | {"seconds": 9.0, "study": "r-2/refinement"},
        study="r-2",
        memory={"predicted": 1000, "measured": None},
        artifacts=[artifacts[0], artifacts[1] | {"sha256": DIGEST[::-1], "bytes": 1}],
    )
    assert other.to_json() != make().to_json()
    assert other.without_times() == make().without_times()
    # Free values keep keys that merely look like times.
    assert json.loads(make().without_times())["config"]["search"] == {"seconds": 60, "study": "mine"}


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": {"search": 1}},
        {"config": {"groups": 5}},
        {"memory": {"predicted": 1001}},
        {"sites": [site(trials=33)]},
        {"sites": [site(shift=False)]},
        {"sites": [site(facts=site()["facts"] | {"stopped": "no improvement in 8 sampler trials"})]},
        {"refinement": content()["refinement"] | {"accepted": False}},
        {"artifacts": [content()["artifacts"][0] | {"sha256": DIGEST[::-1]}]},
        {"run": content()["run"] | {"name": "other"}},
    ],
)
def test_without_times_still_sees_every_result(changes: dict[str, Any]) -> None:
    assert make(**changes).without_times() != make().without_times()


def test_committed_schema_is_current() -> None:
    committed = Path(room.__file__).with_name("manifest.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "write manifest.schema_text() to storage/output/manifest.schema.json"


def test_schema_accepts_what_is_written_and_nothing_else() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    written = json.loads(make().to_json())
    validator.validate(written)
    for broken in (
        written | {"schema_version": 1},
        written | {"extra": 1},
        written | {"data_digest": "x"},
        {key: value for key, value in written.items() if key != "payload"},
    ):
        assert not validator.is_valid(broken)


@pytest.mark.parametrize(
    ("build", "part"),
    [
        (lambda: make(sites=[site(labels=[0, 1])]), "2 labels for 3 channels"),
        (lambda: make(sites=[site(labels=[0, 0, 0])]), "groups say"),
        (lambda: make(sites=[site(labels=[0, 5, 0])]), "groups say"),
        (lambda: make(sites=[site(labels=[])]), "groups say"),
        (lambda: make(sites=[site(), site()]), "occurs twice"),
        (lambda: make(sites=[site(groups=[])]), "nowhere described"),
        (lambda: make(sites=[site(extra=1)]), "Extra inputs"),
        (lambda: make(sites=[site(range_factor=0.0)]), "greater than 0"),
        (lambda: make(sites=[site(range_statistic="luck")]), "range_statistic"),
        (lambda: make(sites=[site(losses={"search": LOSSES, "held_out": LOSSES | {"ours": float("nan")}})]), "finite"),
        (lambda: make(proof={"tolerance": 1e-4, "error": 1e-3, "batches": 1}), "above its tolerance"),
        (lambda: make(conventions=content()["conventions"] | {"statistic": "percentile"}), "percentile"),
        (lambda: make(artifacts=[content()["artifacts"][0] | {"path": "../x"}]), "inside the output folder"),
        (lambda: make(artifacts=[content()["artifacts"][0] | {"path": "/x"}]), "inside the output folder"),
        (lambda: Group(index=0, size=1, magnitude=1, low=0.9, high=0.1, alpha=0.5), "above high"),
    ],
)
def test_contradictions_are_refused(build: Callable[[], object], part: str) -> None:
    with pytest.raises(ValidationError, match=part):
        build()


def test_free_values_must_be_finite_too() -> None:
    with pytest.raises(ValidationError, match="finite"):
        make(config={"a": [float("inf")]})


def test_parts_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make().scope = "model"  # type: ignore[misc]


def test_model_scope_uses_the_groups_of_the_model() -> None:
    groups = site()["groups"]
    manifest = make(scope="model", study="whole", groups=groups, sites=[site(groups=[], losses=None, study=None)])
    assert manifest.sites[0].labels == (0, 1, 0)


def test_listed_files_keep_their_digests_and_reports_count_as_changing() -> None:
    written = [
        ArtifactDigest(path="smoothed/model.safetensors", sha256=DIGEST, bytes=12),
        ArtifactDigest(path="report.html", sha256=DIGEST, bytes=99),
    ]
    listed = make().with_artifacts(written)
    assert [(entry.kind, entry.reproducible) for entry in listed.artifacts] == [("smoothed", True), ("report", False)]
    assert [(e.path, e.sha256, e.bytes) for e in listed.artifacts] == [(w.path, w.sha256, w.bytes) for w in written]


def test_scheme_round_trip() -> None:
    for scheme in (Scheme(), Scheme(weights="int4", weight_granularity="group", group_size=32, activations="none")):
        assert SchemeEntry.of(scheme).scheme() == scheme


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "is not JSON"),
        ("[]", "schema_version None"),
        ('{"schema_version": 4}', "schema_version 4"),
        ('{"schema_version": 2}', "run: Field required"),
        ('{"schema_version": 3, "sites": 1}', "run: Field required"),
        ('{"schema_version": 1, "sites": [1]}', "run: Field required"),
        (make().to_json().replace('"groups": 4', '"groups": 1e999'), "not finite|finite"),
        (make().to_json().replace('"trials": 32', '"trials": -1'), r"sites\.0\.trials"),
    ],
)
def test_unreadable_manifest_names_the_field(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part) as caught:
        parse_manifest(text)
    assert "\n" not in str(caught.value)


def test_read_from_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(make().to_json(), encoding="utf-8")
    assert read_manifest(tmp_path) == read_manifest(tmp_path / "manifest.json") == make()
    with pytest.raises(InputError, match="no file"):
        read_manifest(tmp_path / "none")


FINITE = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = FINITE.map(abs)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | FINITE
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=5,
)


@st.composite
def sites(draw: st.DrawFn) -> SiteEntry:
    labels = draw(st.lists(st.integers(0, 3), max_size=8))
    groups = []
    for index in sorted(set(labels)):
        low, high = sorted(draw(st.tuples(FINITE, FINITE)))
        groups.append(
            Group(
                index=index,
                size=labels.count(index),
                magnitude=draw(POSITIVE),
                low=low,
                high=high,
                alpha=draw(FINITE),
                beta=draw(st.none() | FINITE),
                offset=draw(st.none() | FINITE),
            )
        )
    losses = st.builds(
        Losses,
        identity=POSITIVE,
        alpha_half=POSITIVE,
        best_single=POSITIVE,
        best_single_alpha=FINITE,
        ours=POSITIVE,
        limit=st.none() | POSITIVE,
    )
    pair = {"search": draw(losses), "held_out": draw(losses)}
    return SiteEntry(
        name=draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=8)),
        position=draw(st.integers(0, 9)),
        mode=draw(st.sampled_from(["fold", "explicit", "left"])),
        channels=len(labels),
        operators=tuple(draw(st.lists(st.text("ab."), max_size=2))),
        groups=tuple(groups),
        labels=tuple(labels),
        losses=draw(st.none() | st.just(pair)),
        seconds=draw(POSITIVE),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    found=st.lists(sites(), max_size=3, unique_by=lambda entry: entry.name),
    config=st.dictionaries(st.text("abc", max_size=3), JSON, max_size=3),
    seconds=POSITIVE,
)
def test_any_manifest_survives_the_journey(found: list[SiteEntry], config: dict[str, Any], seconds: float) -> None:
    manifest = make(sites=found, config=config, guard=[])
    text = manifest.to_json()
    again = parse_manifest(text)
    assert again == manifest
    assert again.to_json() == text
    jsonschema.validate(json.loads(text), schema())
    slower = manifest.model_copy(
        update={"sites": tuple(entry.model_copy(update={"seconds": seconds}) for entry in manifest.sites)}
    )
    assert slower.without_times() == manifest.without_times()


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"schema_version": ' * 500, '{"schema_version": "\\ud800"}', "1" * 5000]
)
def test_a_manifest_that_no_parser_takes_is_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_manifest(text)
    assert str(caught.value).isprintable()


def test_a_manifest_that_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(InputError, match=r"manifest\.json is not a plain file"):
        read_manifest(tmp_path)
