"""The service of a real integer model: the examples of the documentation, and what sharing a call changes."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from alphasmith.objectives.media import NamedBytes
from alphasmith.objectives.media.items import MediaItem
from alphasmith.search import Classifier, RunConfig, run
from alphasmith.search.processing.classifier import Classified
from alphasmith.search.processing.service._batching import BatchSettings
from tests.support.services import ask, multipart, served

PAGE = Path(__file__).resolve().parents[4] / "docs/serving.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a quick run of the image demo."""
    place = tmp_path_factory.mktemp("demo")
    config = {
        "model": {"demo": "image"},
        "storage": f"sqlite:///{place}/runs.db",
        "out": str(place / "out"),
        "search": {"trials": 4, "rows": 64, "single_alphas": 3},
    }
    return run(RunConfig.build(config)).folder


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return Classifier.opened(folder)


def digits(count: int) -> list[bytes]:
    """Pictures of digits, as files."""
    files = []
    for image in load_digits().images[:count]:
        written = io.BytesIO()
        Image.fromarray((image / 16 * 255).astype(np.uint8)).convert("RGB").save(written, "PNG")
        files.append(written.getvalue())
    return files


class Held:
    """A classifier whose calls wait until they are let."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self.description, self.classes, self.decode = classifier.description, classifier.classes, classifier.decode
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.calls: list[int] = []

    def classify(self, items: Sequence[MediaItem], *, top: int | None = None) -> Sequence[Classified]:
        """The answers of the classifier, when it is let."""
        self.calls.append(len(items))
        self.entered.release()
        assert self.gate.acquire(timeout=120)
        return self._classifier.classify(items, top=top)


def vector(port: int, file: bytes) -> list[float]:
    status, _, answer = ask(port, "POST", "/v1/classify?probabilities=true", *multipart([("digit.png", file)]))
    assert status == 200
    found: list[float] = answer["results"][0]["probabilities"]
    return found


def test_what_an_item_is_classified_with_changes_no_probability(classifier: Classifier) -> None:
    files = digits(17)
    alone = [classifier.classify([classifier.decode(NamedBytes("digit.png", file))])[0].probabilities for file in files]
    model = Held(classifier)
    with served(model, batch=BatchSettings(wait=0)) as port, ThreadPoolExecutor(20) as pool:
        first = pool.submit(vector, port, files[0])
        assert model.entered.acquire(timeout=60)
        others = [pool.submit(vector, port, file) for file in files[1:]]
        while b"alphasmith_queue_items 16.0" not in ask(port, path="/metrics")[2].splitlines():
            threading.Event().wait(0.01)
        model.gate.release(100)
        together = [future.result(60) for future in (first, *others)]
    assert model.calls == [1, 16]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.sum(together, axis=1), 1, rtol=0, atol=1e-6)


def test_hostile_files_are_refused_beside_good_ones(classifier: Classifier) -> None:
    good = digits(1)[0]
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")  # 48 kB that unfold to 400 million pixels
    files = [
        ("good.png", good),
        ("cut.png", good[:60]),
        ("bomb.png", bomb.getvalue()),
        ("text.png", b"text"),
        ("empty.png", b""),
    ]
    with served(classifier) as port:
        status, _, answer = ask(port, "POST", "/v1/classify", *multipart(files))
        assert status == 200
        assert [result["name"] for result in answer["results"] if "error" not in result] == ["good.png"]
        for result in answer["results"][1:]:
            assert re.fullmatch(r"item: .+; .+", result["error"])
        assert "pixels" in answer["results"][2]["error"]


@pytest.fixture
def example(folder: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of a service as the command line starts it, and a folder with the picture that the page names."""
    (tmp_path / "digit.png").write_bytes(digits(1)[0])
    command = [sys.executable, "-m", "alphasmith.search.cli", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        try:
            (port,) = re.findall(r"its page is http://127\.0\.0\.1:(\d+)/docs, Ctrl-C stops it$", line)
            yield int(port), tmp_path
        finally:
            running.terminate()
    assert running.returncode == 0


def shown(language: str, port: int) -> str:
    """The example of the page in a language, sent to another port."""
    section = PAGE.read_text(encoding="utf-8").partition("## Clients\n")[2].partition("\n## ")[0]
    code: str
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8090/" in code
    return code.replace("http://127.0.0.1:8090/", f"http://127.0.0.1:{port}/")


def test_the_examples_of_the_documentation_run(example: tuple[int, Path]) -> None:
    port, place = example
    python = subprocess.run(
        [sys.executable, "-c", shown("python", port)], cwd=place, check=False, capture_output=True, text=True
    )
    assert re.fullmatch(r"digit\.png LABEL_0 0\.\d+\n", python.stdout), python.stderr
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed; the example in Python ran")
    curl = subprocess.run(["sh", "-c", shown("sh", port)], cwd=place, check=False, capture_output=True, text=True)
    assert '"name":"LABEL_0"' in curl.stdout, curl.stderr
