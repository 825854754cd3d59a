"""Models in: folders, factories and modules; every way a checkpoint can be wrong, by name."""

from __future__ import annotations

import json
import socket
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alphasmith.objectives.errors import InputError, NonFiniteError
from alphasmith.objectives.model.factory import load_batches, load_metric
from alphasmith.objectives.model.loading import load_model, load_skeleton, parameters_digest, wrap_module


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny saved LLaMA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(**kwargs: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_model(**kwargs)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return caught.value


# -------------------------------------------------------------------------------------------------- Hugging Face folders


def test_a_folder_is_loaded_without_network(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_args: Any) -> None:
        raise AssertionError("a network connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    loaded = load_model(path=llama)
    assert (loaded.kind, loaded.folder, loaded.processors) == ("hf", llama, frozenset())
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not loaded.model.training
    assert loaded.config.model_type == "llama"
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config.use_cache is False
    weights = load_file(llama / "model.safetensors")
    assert loaded.parameter_count == sum(w.numel() for w in weights.values())
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert loaded.digest == load_model(path=llama).digest == parameters_digest(loaded.model)
    assert capfd.readouterr().err == ""  # no bars and reports of libraries


def test_shards(llama: Path) -> None:
    whole = load_model(path=llama)
    whole.model.save_pretrained(llama.parent / "shards", max_shard_size="4KB")  # type: ignore[operator]
    assert (llama.parent / "shards" / "model.safetensors.index.json").is_file()
    assert load_model(path=llama.parent / "shards").digest == whole.digest
    next((llama.parent / "shards").glob("*.safetensors")).unlink()
    assert "lacks shards model-0000" in refused(path=llama.parent / "shards").problem
    (llama.parent / "shards" / "model.safetensors.index.json").write_text("{}")
    assert "shard index" in refused(path=llama.parent / "shards").problem


def test_a_skeleton_takes_the_weights(llama: Path) -> None:
    state = torch.get_rng_state()
    skeleton = load_skeleton(llama)
    assert torch.equal(torch.get_rng_state(), state)
    loaded = load_model(path=llama)
    assert parameters_digest(skeleton) != loaded.digest
    skeleton.load_state_dict(loaded.model.state_dict())
    assert parameters_digest(skeleton) == loaded.digest
    edit_config(llama, architectures=None)
    assert type(load_skeleton(llama)).__name__ == "LlamaModel"
    edit_config(llama, num_attention_heads="many")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_skeleton(llama)
    assert "cannot be loaded" in refused(path=llama).problem


def test_experts_run_one_by_one(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    assert load_model(path=tmp_path / "moe").config._experts_implementation == "eager"


def test_folders_that_are_none(tmp_path: Path) -> None:
    assert "is missing" in refused().problem
    assert "does not exist" in refused(path=tmp_path / "no").problem
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refused(path=tmp_path / "file").problem
    assert "no config.json" in refused(path=tmp_path).problem
    for content, problem in (("{", "JSON"), ("[]", "JSON object"), ("{}", "no model_type")):
        (tmp_path / "config.json").write_text(content)
        assert problem in refused(path=tmp_path).problem


def test_checkpoints_without_safetensors(llama: Path) -> None:
    weights = llama / "model.safetensors"
    content = weights.read_bytes()
    weights.rename(llama / "other.safetensors")
    assert "other.safetensors but no model.safetensors" in refused(path=llama).problem
    (llama / "other.safetensors").unlink()
    assert "has no safetensors" in refused(path=llama).problem
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pickle-only" in refused(path=llama).problem
    weights.write_bytes(content[: len(content) // 2])
    assert "model.safetensors is damaged" in refused(path=llama).problem


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class MineConfig(PretrainedConfig):
    model_type = "mine"

class MineModel(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 2)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""


def test_remote_code_needs_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds its module cache
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "mine.py").write_text(REMOTE)
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModel": "mine.MineModel"}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "mine", "architectures": ["MineModel"], "auto_map": auto_map})
    )
    layer = nn.Linear(2, 2)
    save_file({f"layer.{k}": v for k, v in layer.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    error = refused(path=folder)
    assert error.field == "model.trust_remote_code"
    assert "auto_map" in error.problem
    assert not (tmp_path / "modules").exists()
    loaded = load_model(path=folder, trust_remote_code=True)
    x = torch.ones(1, 2)
    assert torch.equal(loaded.model(x), layer(x))


def test_configurations_that_do_not_fit(llama: Path) -> None:
    edit_config(llama, architectures=["NoSuchForCausalLM"])
    assert "no architecture NoSuchForCausalLM" in refused(path=llama).problem
    edit_config(llama, architectures=["LlamaForSequenceClassification"])
    error = refused(path=llama)
    assert "lacks score.weight" in error.problem
    assert "architectures" in error.remedy
    edit_config(llama, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq"})
    assert "already quantized" in refused(path=llama).problem
    edit_config(llama, quantization_config=None, intermediate_size=12)
    assert "cannot be loaded" in refused(path=llama).problem


def test_weights_that_are_missing_extra_or_not_finite(llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(llama, lambda w: w.update(stray=torch.zeros(3)))
    assert load_model(path=llama).unexpected == ("stray",)
    edit_weights(llama, lambda w: w[name][0, 0].fill_(float("nan")))
    assert f"NaN or infinity in {name}" in refused(path=llama).problem
    edit_weights(llama, lambda w: w.pop(name))
    assert f"lacks {name}" in refused(path=llama).problem


# -------------------------------------------------------------------------------------------------------------- modules


def test_a_module_is_copied_and_left_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).half().train()
    before = parameters_digest(module)
    module.config = {"sampling_rate": 8}  # type: ignore[assignment]
    loaded = wrap_module(module)
    assert module.training
    assert parameters_digest(module) == before
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.config == {"sampling_rate": 8}
    with torch.no_grad():
        loaded.model[0].weight.zero_()  # type: ignore[index]
    assert parameters_digest(module) == before


def test_modules_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="has no parameters"):
        wrap_module(nn.ReLU())
    with pytest.raises(InputError, match=r"give an nn\.Module"):
        wrap_module("model")  # type: ignore[arg-type]
    norm = nn.BatchNorm1d(2)
    torch.as_tensor(norm.running_var)[0] = float("inf")
    with pytest.raises(InputError, match="running_var"):
        wrap_module(norm)
    masked = nn.Linear(2, 2)
    masked.register_buffer("causal_mask", torch.tensor([0.0, float("-inf")]))
    assert wrap_module(masked).parameter_count == 6
    masked.register_buffer("causal_mask", torch.tensor([0.0, float("nan")]))
    with pytest.raises(InputError, match="causal_mask"):
        wrap_module(masked)


def test_digest_sees_names_values_and_types() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert parameters_digest(a) == parameters_digest(b)
    assert parameters_digest(nn.Sequential(a)) != parameters_digest(a)
    assert parameters_digest(b.double()) != parameters_digest(a)
    with torch.no_grad():
        a.weight[0, 0] += 1e-6
    assert parameters_digest(a) != parameters_digest(b.float())


# ------------------------------------------------------------------------------------------------------------- factories

MODULE = """
import torch
from torch import nn

def plain(): return nn.Linear(2, 3).train()
def configured(path): return nn.Linear(2, 3), {"path": path}
def scripted(): return torch.jit.script(nn.Sequential(nn.Linear(2, 3)))
def compiled(): return torch.compile(nn.Sequential(nn.Linear(2, 3)), backend="eager")
def nothing(): return 3
def failing(path): raise ValueError("two\\nlines")
def batches(path):
    for i in range(4):
        yield (torch.full((2, 2), float(i)),)
def score(path, model): return {"accuracy": torch.tensor(0.5), "path": len(path)}
def lone(model): return float(sum(p.sum() for p in model.parameters()))
def infinite(model): return float("inf")
def words(model): return "good"
def empty(model): return {}
value = 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's module ``user_code_under_test``, forgotten after the test."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "user_code_under_test.py").write_text(textwrap.dedent(MODULE))
    (folder / "broken_code_under_test.py").write_text("def f(:\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "user_code_under_test", raising=False)
    return folder


def test_factories(code: Path) -> None:
    path = list(sys.path)
    plain = load_model(factory="user_code_under_test:plain", factory_path=code)
    assert (plain.kind, plain.folder, plain.config, plain.parameter_count) == ("factory", None, None, 9)
    assert not plain.model.training
    compiled = load_model(factory="user_code_under_test:compiled", factory_path=code)
    assert list(compiled.model.state_dict()) == ["0.weight", "0.bias"]
    assert "OptimizedModule" in compiled.notes[0]
    configured = load_model(factory="user_code_under_test:configured", factory_path=code, path=code)
    assert (configured.folder, configured.config) == (code, {"path": str(code)})
    assert sys.path == path
    sys.modules.pop("user_code_under_test")


def test_batches_and_metrics_of_the_user(code: Path) -> None:
    batches = load_batches("user_code_under_test:batches", path=code, factory_path=code, limit=5)
    assert [b.size for b in batches] == [2, 2, 1]
    model = nn.Linear(2, 3)
    score = load_metric("user_code_under_test:score", path=code, factory_path=code)
    assert score(model) == {"accuracy": 0.5, "path": float(len(str(code)))}
    lone = load_metric("user_code_under_test:lone", factory_path=code)
    assert list(lone(model)) == ["metric"]
    with pytest.raises(NonFiniteError, match="inf"):
        load_metric("user_code_under_test:infinite", factory_path=code)(model)
    for name, problem in (("words", "returned str"), ("empty", "returned nothing"), ("failing", "TypeError|two lines")):
        with pytest.raises(InputError, match=problem):
            load_metric(f"user_code_under_test:{name}", factory_path=code)(model)
    with pytest.raises(InputError, match="list of batches"):
        load_batches("user_code_under_test:nothing", factory_path=code)
    sys.modules.pop("user_code_under_test")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("user_code_under_test", "not module:function"),
        ("no_such_module_anywhere:f", "cannot be imported"),
        ("broken_code_under_test:f", "cannot be imported"),
        ("user_code_under_test:no_such", "no function"),
        ("user_code_under_test:value", "no function"),
        ("user_code_under_test:nothing", "returned int"),
        ("user_code_under_test:scripted", "TorchScript"),
        ("json:loads", "comes from"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_factories_that_cannot_be_used(code: Path, spec: str, problem: str) -> None:
    assert problem in refused(factory=spec, factory_path=code).problem
    sys.modules.pop("user_code_under_test", None)


def test_a_failing_factory_and_missing_paths(code: Path) -> None:
    error = refused(factory="user_code_under_test:failing", factory_path=code, path=code)
    assert "ValueError: two lines" in error.problem
    assert "not a folder" in refused(factory="a:b", factory_path=code / "no").problem
    assert "does not exist" in refused(factory="user_code_under_test:plain", path=code / "no").problem
    sys.modules.pop("user_code_under_test", None)
