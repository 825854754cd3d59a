"""What a client of the service meets."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.formparsers import MultiPartParser

from alphasmith.search.processing.service import _bodies
from alphasmith.search.processing.service._batching import Batcher, BatchSettings
from alphasmith.search.processing.service._types import RequestLimits
from tests.support.services import Spelling, as_json, ask, classify, multipart, served


@pytest.fixture(scope="module")
def port() -> Any:
    with served(Spelling()) as port:
        yield port


def best(answer: Any) -> list[str]:
    """Best classes of an answer's results."""
    return [result["top"][0]["name"] for result in answer["results"]]


def test_texts_are_classified_in_their_order(port: int) -> None:
    status, headers, answer = classify(port, "four", "on", "three", query="?top=2")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer["run"] == "r-20260101-abcdef"
    assert answer["results"][0] == {
        "name": "0",
        "top": [
            {"index": 4, "name": "4 letters", "probability": 0.75},
            {"index": 3, "name": "3 letters", "probability": 0.25},
        ],
        "probabilities": None,
        "notes": [],
    }
    assert best(answer) == ["4 letters", "2 letters", "5 letters"]


def test_files_are_classified_under_their_names(port: int) -> None:
    status, _, answer = ask(port, "POST", "/v1/classify", *multipart([("a.txt", b"four"), ("", b"on")]))
    assert (status, best(answer)) == (200, ["4 letters", "2 letters"])
    assert [result["name"] for result in answer["results"]] == ["a.txt", "1"]


def test_the_whole_vector_is_told_where_it_is_asked_for(port: int) -> None:
    _, _, answer = classify(port, "four", query="?probabilities=true")
    assert answer["results"][0]["probabilities"] == [0, 0, 0, 0.25, 0.75, 0, 0, 0]


def test_one_bad_item_fails_alone(port: int) -> None:
    status, _, answer = classify(port, "four", "refused", "poison", "on")
    assert (status, [sorted(result) for result in answer["results"]]) == (
        200,
        [
            ["name", "notes", "probabilities", "top"],
            ["error", "name"],
            ["error", "name"],
            ["name", "notes", "probabilities", "top"],
        ],
    )
    assert answer["results"][1]["error"] == "item: 1 is refused; give another one"
    assert answer["results"][2]["error"] == "item: the model answers with NaN; give another one"


def test_a_request_of_nothing_but_bad_items_is_refused_with_the_same_body(port: int) -> None:
    status, _, answer = classify(port, "refused")
    assert (status, answer["results"]) == (422, [{"name": "0", "error": "item: 0 is refused; give another one"}])


def test_a_defect_fails_its_item_alone_and_tells_no_secret(port: int) -> None:
    status, _, answer = classify(port, "defect", "four")
    assert (status, best({"results": answer["results"][1:]})) == (200, ["4 letters"])
    assert "log of the service" in answer["results"][0]["error"]
    assert classify(port, "defect")[0] == 500


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (b"{}", {"Content-Type": "application/json"}, 422, "body: is no object with a list texts and"),
        (b'{"texts": []}', {"Content-Type": "application/json"}, 422, "texts: List should have at least 1 item"),
        (b'{"texts": [1]}', {"Content-Type": "application/json"}, 422, "texts.0: Input should be a valid string"),
        (
            b'{"texts": ["a"], "x": 1}',
            {"Content-Type": "application/json"},
            422,
            "body: is no object with a list texts and",
        ),
        (
            b'{"texts": ["\\ud800"]}',
            {"Content-Type": "application/json"},
            422,
            "body: is not JSON (unexpected end of hex",
        ),
        (b"[" * 100_000, {"Content-Type": "application/json"}, 422, "body: is not JSON (recursion limit"),
        (b'{"texts": [[]' + b",[]" * 500_000 + b"]}", {"Content-Type": "application/json"}, 422, "500001 items"),
        (b'{"texts": [[[[[]]]]]}', {"Content-Type": "application/json"}, 422, "texts.0: Input should be a valid"),
        (b"[" + b"1," * 500_000 + b"1]", {"Content-Type": "application/json"}, 422, "body: is no object"),
        (b"x", {"Content-Type": "text/plain"}, 415, "content-type: text/plain; give multipart/form-data or app"),
        (b"x", {}, 415, "content-type: is missing"),
        (b"x", {"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "content-encoding"),
        (b"x", {"Content-Type": "multipart/form-data"}, 400, "multipart: Missing boundary"),
        (*multipart([]), 422, "there is no item; send at least one file"),
        (*multipart([("a.txt", b"four")], part="other"), 422, "part 'other' is no file called 'file'"),
        (multipart([("a.txt", b"four")])[0][:-9], multipart([])[1], 400, "the last boundary is missing"),
    ],
)
def test_bodies_that_cannot_be_used(port: int, body: bytes, headers: dict[str, str], status: int, told: str) -> None:
    found, _, answer = ask(port, "POST", "/v1/classify", body, headers)
    assert (found, told in answer["reason"]) == (status, True), answer


@pytest.mark.parametrize("query", ["?top=0", "?top=9", "?top=x", "?probabilities=perhaps"])
def test_queries_that_cannot_be_used(port: int, query: str) -> None:
    status, _, answer = classify(port, "four", query=query)
    assert status == 422
    assert answer["reason"].startswith(f"query.{query[1:].partition('=')[0]}: ")


def test_a_model_of_images_takes_no_texts() -> None:
    with served(Spelling("image")) as port:
        status, _, answer = classify(port, "four")
        assert (status, answer) == (415, {"reason": "content-type: application/json; give multipart/form-data"})
        assert ask(port, "POST", "/v1/classify", *multipart([("a.png", b"four")]))[0] == 200
        _, _, schema = ask(port, path="/openapi.json")
        assert [*schema["paths"]["/v1/classify"]["post"]["requestBody"]["content"]] == ["multipart/form-data"]


def test_what_is_served_is_told_without_places_of_the_machine(port: int) -> None:
    status, _, facts = ask(port)
    assert (status, facts["classes"], facts["kind"]) == (200, [f"{n} letters" for n in range(8)], "text")
    assert facts["metrics"] == {"accuracy": {"float": 1.0, "quantized": 0.5}}
    assert facts["digests"] == {"float model": "0" * 64}
    assert "folder" not in facts


def test_pages_need_nothing_from_elsewhere(port: int) -> None:
    status, headers, page = ask(port, path="/docs")
    assert status == 200
    assert b"//" not in page.replace(b"<!DOCTYPE", b"").replace(b"// ", b""), "no address but of this server"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert ask(port, path="/static-offline-docs/swagger-ui-bundle.js")[0] == 200
    assert [*ask(port, path="/openapi.json")[2]["paths"]] == ["/v1/classify", "/v1/model", "/healthz", "/metrics"]


def test_health_and_counters() -> None:
    with served(Spelling()) as port:
        assert ask(port, path="/healthz")[::2] == (200, {"status": "ok"})
        classify(port, "four", "refused", "on")
        ask(port, path="/nowhere")
        status, headers, text = ask(port, path="/metrics")
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
        lines = text.decode().splitlines()
        for line in (
            'alphasmith_requests_total{route="/v1/classify",status="200"} 1.0',
            'alphasmith_requests_total{route="other",status="404"} 1.0',
            'alphasmith_items_total{outcome="classified"} 2.0',
            'alphasmith_items_total{outcome="refused"} 1.0',
            "alphasmith_forward_items_count 1.0",
            "alphasmith_forward_items_sum 2.0",
            "alphasmith_queue_items 0.0",
            "alphasmith_accepted_items 0.0",
            "alphasmith_held_bytes 0.0",
        ):
            assert line in lines
        assert any(line.startswith('alphasmith_model_info{name="Spelling"') for line in lines)


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/static-offline-docs/../server.py"])
def test_other_paths_are_refused_in_json(port: int, path: str) -> None:
    assert ask(port, path=path)[::2] == (404, {"reason": "Not Found"})


def test_other_methods_say_which_is_meant(port: int) -> None:
    status, headers, answer = ask(port, "GET", "/v1/classify")
    assert (status, headers["allow"], answer) == (405, "POST", {"reason": "Method Not Allowed"})


def test_a_large_body_is_refused_before_it_is_read() -> None:
    with served(Spelling(), requests=RequestLimits(bytes=1000)) as port:
        # Only the head is sent: the answer cannot have waited for the body.
        status, _, answer = ask(port, "POST", "/v1/classify", None, {**as_json()[1], "Content-Length": "1001"})
        assert (status, answer["reason"]) == (413, "the body has more than 1000 bytes; send less at once")
        body, headers = as_json("x" * 900)
        assert ask(port, "POST", "/v1/classify", body, headers)[0] == 200
        chunked = b"".join(b"64\r\n" + b"x" * 100 + b"\r\n" for _ in range(11)) + b"0\r\n\r\n"
        status, _, _ = ask(port, "POST", "/v1/classify", chunked, {**headers, "Transfer-Encoding": "chunked"})
        assert status == 413, "of unknown length: when it is over"
        assert classify(port, "four")[0] == 200


def test_json_is_bounded_more_narrowly(port: int) -> None:
    body, headers = as_json("x" * _bodies.MOST_JSON)
    status, _, answer = ask(port, "POST", "/v1/classify", body, headers)
    assert (status, answer["reason"]) == (413, "the body has more than 2097152 bytes; send less at once")
    assert ask(port, "POST", "/v1/classify", *multipart([("large.txt", body)]))[0] == 200


def test_too_many_items_are_refused() -> None:
    with served(Spelling(), requests=RequestLimits(items=3)) as port:
        assert classify(port, *"abc")[0] == 200
        status, _, answer = classify(port, *"abcd")
        assert (status, answer["reason"]) == (422, "4 items are more than 3; send them in several requests")
        files = [(f"{n}.txt", b"on") for n in range(4)]
        assert ask(port, "POST", "/v1/classify", *multipart(files[:3]))[0] == 200
        assert ask(port, "POST", "/v1/classify", *multipart(files))[0] == 400


def test_requests_share_a_forward_call() -> None:
    model = Spelling()
    model.gate = threading.Semaphore(0)
    with served(model) as port, ThreadPoolExecutor(9) as pool:
        first = pool.submit(classify, port, "first")
        assert model.entered.acquire(timeout=60)
        others = [pool.submit(classify, port, text) for text in ("a", "bb", "ccc", "poison", "dddd")]
        until_metric(port, "alphasmith_queue_items", 5)
        model.gate.release(100)
        assert first.result(60)[0] == 200
        statuses = [other.result(60)[0] for other in others]
        assert statuses == [200, 200, 200, 422, 200]
        assert [best(other.result(60)[2]) for other in others if other is not others[3]] == [
            [f"{n} letters"] for n in range(1, 5)
        ]
    assert [len(call) for call in model.calls[:2]] == [1, 5]


def until_metric(port: int, name: str, value: float) -> None:
    """Wait until a gauge has a value; the time limit of the test is the only one."""
    line = f"{name} {float(value)}".encode()
    while line not in ask(port, path="/metrics")[2].splitlines():
        threading.Event().wait(0.01)


def test_a_full_queue_tells_when_to_come_again() -> None:
    model = Spelling()
    model.gate = threading.Semaphore(0)
    batch = BatchSettings(places=3, most=2, wait=0)
    with served(model, batch=batch) as port, ThreadPoolExecutor(4) as pool:
        first = pool.submit(classify, port, "first")
        assert model.entered.acquire(timeout=60)
        second = pool.submit(classify, port, "a", "b")
        until_metric(port, "alphasmith_accepted_items", 3)
        status, headers, answer = classify(port, "late")
        assert (status, headers["retry-after"]) == (429, "1")
        assert answer == {"reason": "the queue is full; come again in 1 s"}
        assert ask(port, path="/healthz")[0] == 200, "a full queue is no illness"
        model.gate.release(100)
        assert (first.result(60)[0], second.result(60)[0]) == (200, 200)
        assert classify(port, "late")[0] == 200
        assert classify(port, *"abcd")[0] == 429, "more than there are places at all"


def test_bodies_together_are_bounded() -> None:
    model = Spelling()
    model.gate = threading.Semaphore(0)
    limits = RequestLimits(bytes=1000, held=1500)
    with served(model, requests=limits) as port, ThreadPoolExecutor(4) as pool:
        first = pool.submit(classify, port, "x" * 900)
        assert model.entered.acquire(timeout=60)
        status, headers, _ = classify(port, "x" * 900)
        assert (status, headers["retry-after"]) == (429, "1")
        assert classify_small(port, model) == 200
        assert first.result(60)[0] == 200
        until_metric(port, "alphasmith_held_bytes", 0)


def classify_small(port: int, model: Spelling) -> int:
    assert model.gate is not None
    model.gate.release(100)
    return classify(port, "on")[0]


def test_an_answer_has_a_time() -> None:
    model = Spelling()
    model.gate = threading.Semaphore(0)
    with served(model, requests=RequestLimits(answer=0.2)) as port:
        status, headers, answer = classify(port, "four", "on")
        assert (status, headers["retry-after"]) == (503, "1")
        assert answer["reason"].startswith("the answer took longer than 0.2 s")


def test_who_goes_away_costs_no_forward_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Spelling()
    given_back: list[list[bool]] = []
    places = Batcher.places

    @contextmanager
    def watched(batcher: Batcher[Any, Any], count: int) -> Iterator[Any]:
        futures: list[Future[Any]] = []

        def kept(item: Any) -> Future[Any]:
            futures.append(put(item))
            return futures[-1]

        with places(batcher, count) as put:
            try:
                yield kept
            finally:
                given_back.append([future.cancelled() for future in futures])

    monkeypatch.setattr(Batcher, "places", watched)
    model.gate = threading.Semaphore(0)
    with served(model, batch=BatchSettings(wait=0)) as port, ThreadPoolExecutor(2) as pool:
        first = pool.submit(classify, port, "first")
        assert model.entered.acquire(timeout=60)
        body, _ = as_json("gone")
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            until_metric(port, "alphasmith_accepted_items", 2)
        until_metric(port, "alphasmith_accepted_items", 1)
        model.gate.release(100)
        assert first.result(60)[0] == 200
        assert classify(port, "stays")[0] == 200
    assert model.calls == [["first"], ["stays"]]
    assert given_back == [[True], [False], [False]], "no call can take an item once its place is given back"


#: What is opened for writing, while there is a list to put it in: a hook of the interpreter cannot be taken out again.
WRITTEN: list[list[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and WRITTEN and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        WRITTEN[-1].append(str(arguments[0]))


@pytest.fixture
def written() -> Iterator[list[str]]:
    """Files that this process has opened for writing."""
    if not WRITTEN:
        sys.addaudithook(_watch)
    WRITTEN.append([])
    yield WRITTEN[-1]
    WRITTEN.pop()


LARGE = [("large.txt", b"x" * 5 * 2**20), ("small.txt", b"on")]


def test_media_are_never_written_to_a_disk(written: list[str]) -> None:
    with served(Spelling()) as port:
        status, _, answer = ask(port, "POST", "/v1/classify", *multipart(LARGE))
    assert (status, best(answer), written) == (200, ["7 letters", "2 letters"], [])


def test_a_file_of_starlette_would_be_seen(written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bodies._Parser, "spool_max_size", MultiPartParser.spool_max_size)
    with served(Spelling()) as port:
        assert ask(port, "POST", "/v1/classify", *multipart(LARGE))[0] == 200
    assert written != []


def test_many_clients_are_all_answered_again_and_again(port: int) -> None:
    body, headers = as_json("four", "on")

    def client(number: int) -> list[tuple[int, list[str]]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        found = []
        for _ in range(5):
            connection.request("POST", "/v1/classify", body, headers)
            response = connection.getresponse()
            found.append((response.status, best(json.loads(response.read()))))
        connection.close()
        return found

    with ThreadPoolExecutor(200) as pool:
        answers = [answer for found in pool.map(client, range(200)) for answer in found]
    assert len(answers) == 1000
    assert {(status, *names) for status, names in answers} == {(200, "4 letters", "2 letters")}
