"""The adapters with their real tools, where the environments are there: ``python -m benchmarks.tools`` makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alphasmith.objectives.media.batch import Batch
from benchmarks.tools.catalogue import TOOLS, Tool
from benchmarks.tools.environments import environments_folder, is_made
from benchmarks.tools.exchange import ask, read_reply, write_request
from tests.support.run_cases import saved_llama, tiny_llama


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.folder_name)
def test_an_adapter_smooths_and_the_float_model_stays(tmp_path: Path, tool: Tool) -> None:
    folder = environments_folder() / tool.environment
    if not is_made(tool.requirements, folder):
        pytest.skip(f"no environment of these requirements in {folder}")
    generator = torch.Generator().manual_seed(0)
    batches = [Batch(kwargs={"input_ids": torch.randint(20, (2, 12), generator=generator)}) for _ in range(8)]
    write_request(tmp_path / "request", saved_llama(tmp_path / "model"), batches, tool, 1)
    ask(folder / "bin" / "python", tool, tmp_path / "request", tmp_path / "reply", 500)
    model = tiny_llama().eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    reply = read_reply(tmp_path / "reply", {name: linear.in_features for name, linear in linears.items()})
    assert reply.change < 1e-9
    with torch.no_grad():
        torch.testing.assert_close(reply.before, model(**batches[0].kwargs).logits, rtol=1e-4, atol=1e-4)
    q, k = (reply.scales[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    assert q.max() > q.min(), "channels differ"
    if tool.environment == "llm_compressor":
        assert torch.allclose(q, k, rtol=1e-4), "folded into the norm that both read"
