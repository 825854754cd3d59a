from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from alphasmith.dashboards.guard import Guard
from alphasmith.dashboards.server import application
from alphasmith.objectives.errors import InputError

Answer = tuple[int, dict[str, str], bytes]


def call(
    app: Callable[..., Iterable[bytes]],
    method: str,
    path: str,
    *,
    host: str | None = "localhost:8080",
    body: object = None,
    **headers: str,
) -> Answer:
    """One WSGI request; answers (status, headers with lower-case names, body)."""
    content = b"" if body is None else json.dumps(body).encode()
    environ: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SCRIPT_NAME": "",
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "8080",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(content)),
        "wsgi.input": io.BytesIO(content),
        "wsgi.errors": io.StringIO(),
        "wsgi.url_scheme": "http",
        **headers,
    }
    if host is not None:
        environ["HTTP_HOST"] = host
    seen: list[Any] = []

    def start_response(
        status: str, fields: list[tuple[str, str]], exc_info: object = None
    ) -> Callable[[bytes], object]:
        seen[:] = [int(status.split()[0]), {name.lower(): value for name, value in fields}]
        return lambda data: None

    answer = b"".join(app(environ, start_response))
    return seen[0], seen[1], answer


def echo(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Stands for the dashboard: says that the request got through."""
    start_response("200 OK", [("Content-Type", "text/html"), ("Access-Control-Allow-Origin", "*")])
    return [b"through"]


@pytest.fixture
def study() -> optuna.Study:
    study = optuna.create_study(study_name="one", storage=optuna.storages.InMemoryStorage())
    study.optimize(lambda trial: trial.suggest_float("alpha_0", 0, 1), n_trials=2)
    return study


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "[::1]", "box.example:8080", "box.example."]
)
def test_known_hosts_are_answered(host: str) -> None:
    assert call(Guard(echo, hosts=["Box.example"]), "GET", "/", host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *(None, "", "evil.example", "localhost.evil.example", "localhost:80@evil.example", "evil.example:8080"),
        *("localhost:x", "[::2]", "127.0.0.1, evil.example", " localhost", "localhost/", "[localhost"),
    ],
)
def test_other_hosts_are_refused(host: str | None) -> None:
    status, headers, body = call(Guard(echo), "GET", "/", host=host)
    assert status == 403
    assert headers["content-type"] == "application/json"
    assert "host" in json.loads(body)["reason"]


@settings(deadline=None)
@given(st.text(alphabet="localhost127.0:[]@ ./evi", max_size=20))
def test_no_other_spelling_of_a_host_gets_through(host: str) -> None:
    name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    expected = name.rstrip(".") in {"localhost", "127.0.0.1", "[::1]"}
    assert (call(Guard(echo), "GET", "/", host=host)[0] == 200) <= expected


@pytest.mark.parametrize("host", ["", "a b", "box.example:8080", "http://box.example", "box/example", "a@b"])
def test_hosts_that_are_not_host_names_are_input_errors(host: str) -> None:
    with pytest.raises(InputError, match="host:"):
        Guard(echo, hosts=[host])


def test_an_ip_address_may_be_allowed() -> None:
    assert call(Guard(echo, hosts=["fe80::1"]), "GET", "/", host="[fe80::1]:8080")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post", "PROPFIND"])
def test_by_default_only_reading_passes(method: str) -> None:
    status, _, body = call(Guard(echo), method, "/api/studies")
    assert status == 403
    assert json.loads(body) == {"reason": "this dashboard is read-only"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", "/api/studies/1/rename"), ("POST", "/api/studies/1/rename/"), ("DELETE", "/api/studies/1")),
        *(("DELETE", "/api/studies/1/"), ("DELETE", "/api/studies/-1"), ("POST", "/incompatible-rdb-schema")),
        *(("POST", "/incompatible-rdb-schema/"), ("POST", "/api/llm/trial_filter_query"), ("DELETE", "/api/studies")),
        *(("PATCH", "/api/studies/1/note"), ("PUT", "/api/studies/1/note/../rename"), ("POST", "/api/studies\n")),
    ],
)
@pytest.mark.parametrize("allow_write", [False, True])
def test_rename_delete_and_migration_never_pass(method: str, path: str, allow_write: bool) -> None:
    assert call(Guard(echo, allow_write=allow_write), method, path)[0] == 403


@pytest.mark.parametrize(
    "path", ["/api/stud\xffies/1/rename", "//api/studies/1", "/artifacts\xff/1/ab", "/dashboard//", "/ü"]
)
def test_paths_the_framework_would_read_differently_are_refused(path: str) -> None:
    assert call(Guard(echo, allow_write=True), "DELETE", path)[0] == 400
    assert call(Guard(echo), "GET", path)[0] == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:9", "http://localhost:8080.evil.example"]
)
def test_writes_from_other_sites_are_refused(origin: str) -> None:
    app = Guard(echo, allow_write=True)
    assert call(app, "PUT", "/api/studies/1/note", HTTP_ORIGIN=origin)[0] == 403
    assert call(app, "PUT", "/api/studies/1/note", HTTP_ORIGIN="http://localhost:8080")[0] == 200
    assert call(app, "PUT", "/api/studies/1/note")[0] == 200


def test_every_answer_is_hardened() -> None:
    _, headers, _ = call(Guard(echo), "GET", "/dashboard")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert "access-control-allow-origin" not in headers


def test_reading_the_real_dashboard_works(study: optuna.Study) -> None:
    app = application(study._storage)
    status, headers, body = call(app, "GET", "/dashboard")
    assert (status, b"<title>Optuna" in body) == (200, True)
    assert "script-src" in headers["content-security-policy"]
    status, _, body = call(app, "GET", "/api/studies")
    assert [item["study_name"] for item in json.loads(body)["study_summaries"]] == ["one"]
    assert call(app, "GET", f"/api/studies/{study._study_id}")[0] == 200
    # Without Accept-Encoding the bare dashboard fails on this one.
    assert call(app, "GET", "/static/bundle.js")[0] == 200


def test_read_only_leaves_the_study_as_it_is(study: optuna.Study) -> None:
    app, identity = application(study._storage), study._study_id
    assert call(app, "PUT", f"/api/studies/{identity}/note", body={"version": 1, "body": "x"})[0] == 403
    assert call(app, "POST", "/api/studies", body={"study_name": "two", "directions": ["minimize"]})[0] == 403
    assert call(app, "POST", f"/api/studies/{identity}/rename", body={"study_name": "two"})[0] == 403
    assert call(app, "DELETE", f"/api/studies/{identity}", body={})[0] == 403
    assert optuna.get_all_study_names(study._storage) == ["one"]


def test_writing_opens_notes_and_still_no_rename(study: optuna.Study) -> None:
    app, identity = application(study._storage, allow_write=True), study._study_id
    assert call(app, "PUT", f"/api/studies/{identity}/note", body={"version": 1, "body": "x"})[0] == 204
    assert call(app, "POST", f"/api/studies/{identity}/rename", body={"study_name": "two"})[0] == 403
    assert call(app, "DELETE", f"/api/studies/{identity}", body={})[0] == 403
    assert optuna.get_all_study_names(study._storage) == ["one"]


def test_every_write_route_of_the_dashboard_is_known(study: optuna.Study) -> None:
    """A new version of the dashboard must not bring a route that nobody has looked at."""
    import optuna_dashboard

    app: Any = optuna_dashboard.wsgi(study._storage)
    writes = {f"{route.method} {route.rule}" for route in app.routes if route.method != "GET"}
    study_route, artifact = "/api/studies/<study_id:int>", "/api/artifacts/<study_id:int>"
    assert writes == {
        *("POST /api/studies", f"POST {study_route}/rename", f"DELETE {study_route}", f"PUT {study_route}/note"),
        *(f"POST {study_route}/preference", f"PUT {study_route}/preference_feedback_component"),
        *(f"DELETE {study_route}/preference/<history_id>", f"POST {study_route}/preference/<history_id>"),
        *("POST /api/trials/<trial_id:int>/tell", "POST /api/trials/<trial_id:int>/user-attrs"),
        *(f"POST {study_route}/<trial_id:int>/skip", f"PUT {study_route}/<trial_id:int>/note"),
        *("POST /incompatible-rdb-schema", f"POST {artifact}", f"POST {artifact}/<trial_id:int>"),
        f"DELETE {artifact}/<trial_id:int>/<artifact_id:re:[0-9a-fA-F-]+>",
        f"DELETE {artifact}/<artifact_id:re:[0-9a-fA-F-]+>",
        *("POST /api/llm/trial_filter_query", "POST /api/llm/generate_plotly_graph_query"),
        "POST /api/llm/re_generate_plotly_graph_query",
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x.html", "application/octet-stream"), ("x.svg", "application/octet-stream"), ("x.png", "image/png")],
)
def test_artifacts_are_downloads_that_cannot_run(study: optuna.Study, tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    file = tmp_path / name
    file.write_text("<script>alert(1)</script>")
    store = FileSystemArtifactStore(folder)
    artifact = upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=study)
    app = application(study._storage, artifacts=folder)
    status, headers, body = call(app, "GET", f"/artifacts/{study._study_id}/{artifact}")
    assert (status, body) == (200, b"<script>alert(1)</script>")
    assert headers["content-type"] == kind
    assert headers["content-disposition"] == "attachment"
    assert headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers
    assert call(app, "HEAD", f"/artifacts/{study._study_id}/{artifact}")[1]["content-disposition"] == "attachment"


def test_a_missing_artifact_folder_is_an_input_error(study: optuna.Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="artifacts:"):
        application(study._storage, artifacts=tmp_path / "none")
