"""Models as people have them: half precision with batches alike, compiled, parallel, with parametrizations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from alphasmith.objectives.errors import InputError
from alphasmith.objectives.media.batch import Batch
from alphasmith.objectives.model.loading import parameters_digest
from alphasmith.search import load_quantized, load_smoothed, run
from alphasmith.search.checkpoints.verification import undo
from tests.support.run_cases import CLASSES, WIDTH, Mlp, answer, launch, seeded, settings, vectors

FAST = {"search": {"trials": 4, "noise_model": False, "refine": False}}


class Gated(nn.Module):
    """An Mlp beside a table that is looked up: a floating input and an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = seeded(Mlp)
        self.table = nn.Embedding(4, 5)

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        """(B, L, WIDTH), (B, L) -> (B, L, CLASSES)."""
        return torch.as_tensor(self.mlp(x) + self.table(which))


@pytest.mark.parametrize(
    ("kind", "form"), [(torch.bfloat16, "tuple"), (torch.float16, "batch"), (torch.float64, "tuple")]
)
def test_batches_follow_the_model_and_so_do_those_of_its_metric(kind: torch.dtype, form: str, tmp_path: Path) -> None:
    model = Gated().eval().to(kind)
    pairs = [(x.to(kind), torch.randint(4, x.shape[:2])) for x in vectors()]
    with torch.no_grad():
        model(*pairs[0])  # runs for its owner

    def size(found: nn.Module) -> float:
        return float(found(*pairs[0]).detach().float().abs().mean())

    batches = pairs if form == "tuple" else [Batch(args=pair) for pair in pairs]
    result = launch(tmp_path, model, batches, FAST, metric=size)
    assert result.manifest.output.metrics[0].float_model == pytest.approx(size(model), rel=0.02)
    assert next(model.parameters()).dtype == kind
    x, which = pairs[0]
    with torch.no_grad():
        expected = model(x, which).float()
        found = load_smoothed(result.folder, model).float()(x.float(), which)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_compiled_parallel_model_runs_as_what_is_inside(tmp_path: Path) -> None:
    compiled = torch.compile(seeded(Mlp), backend="eager")
    assert isinstance(compiled, nn.Module)
    given = nn.DataParallel(compiled)
    digest = parameters_digest(given)
    result = launch(tmp_path, given, vectors(), FAST)
    assert parameters_digest(given) == digest
    assert any("DataParallel" in note and "OptimizedModule" in note for note in result.manifest.notes)
    x = vectors(seed=3)[0]
    expected = answer(seeded(Mlp), x)
    for model in (given, seeded(Mlp)):
        torch.testing.assert_close(answer(load_smoothed(result.folder, model), x), expected, rtol=1e-4, atol=1e-5)
        assert answer(load_quantized(result.folder, model), x).shape == expected.shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="TorchScript"):
        launch(tmp_path, torch.jit.script(seeded(Mlp)), vectors(), FAST)
    assert not (tmp_path / "out").exists()


class Normed(nn.Module):
    """An Mlp of which every weight is computed from others."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.mlp = seeded(Mlp)
        for name in ("fc1", "fc2", "head"):
            norm(self.mlp.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, CLASSES)."""
        return torch.as_tensor(self.mlp(x))


#: How weights are computed, and whether the folded ones can be written under the user's names.
NORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "weight norm": (parametrizations.weight_norm, True),
    "old weight norm": (nn.utils.weight_norm, True),
    "spectral norm": (parametrizations.spectral_norm, False),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_are_baked_in_and_found_again(kind: str, tmp_path: Path) -> None:
    norm, apart = NORMS[kind]
    model = Normed(norm).eval()
    digest, names = parameters_digest(model), set(model.state_dict())
    x = vectors(seed=3)[0]
    expected = answer(model, x)
    result = launch(tmp_path, model, vectors(), FAST)
    assert parameters_digest(model) == digest
    (note,) = [note for note in result.manifest.notes if "baked" in note]
    assert "mlp.fc1.weight" in note
    assert {site.mode for site in result.manifest.sites} == {"fold"}
    saved = load_file(result.folder / "smoothed" / "model.safetensors")
    assert (set(saved) == names) == apart
    assert ("mlp.fc1.weight" in saved) != apart
    torch.testing.assert_close(answer(load_smoothed(result.folder, model), x), expected, rtol=1e-4, atol=1e-5)
    assert answer(load_quantized(result.folder, model), x).shape == expected.shape
    assert torch.equal(answer(model, x), expected)
    undo(result.folder, tmp_path / "undone")
    undone = load_file(tmp_path / "undone" / "model.safetensors")
    assert set(undone) == set(saved)
    changed = 0
    for name in set(undone) & names:
        changed += not torch.equal(undone[name], saved[name])
        if not name.endswith(("_v", "original1")):  # directions may have any length
            torch.testing.assert_close(undone[name], model.state_dict()[name], rtol=1e-5, atol=1e-5)
    assert changed


class Translator(nn.Module):
    """An encoder and a decoder of torch's own layers, which look at each other."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 24, 0.0, batch_first=True, norm_first=norm_first)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 2, 24, 0.0, batch_first=True, norm_first=norm_first)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, CLASSES)."""
        return torch.as_tensor(self.head(self.decoder(x, self.encoder(x))))


def test_packed_attention_is_quantized_and_keeps_the_users_names(tmp_path: Path) -> None:
    model = seeded(Translator)
    digest = parameters_digest(model)
    result = launch(tmp_path, model, vectors(), FAST)
    assert parameters_digest(model) == digest
    names = {name for site in result.manifest.sites for name in site.operators}
    for layer in ("encoder.self_attn", "decoder.self_attn", "decoder.multihead_attn"):
        assert {f"{layer}.{leaf}_proj" for leaf in ("q", "k", "v", "out")} <= names
    assert not result.manifest.skipped
    assert sum("proj" in site.name for site in result.manifest.sites if site.mode == "fold") >= 5
    saved = load_file(result.folder / "smoothed" / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert result.manifest.output.kept == "ours"
    packed = "encoder.self_attn.in_proj_weight"
    assert not torch.equal(saved[packed], model.state_dict()[packed])
    x = vectors(seed=3)[0]
    expected = answer(model, x)
    torch.testing.assert_close(answer(load_smoothed(result.folder, model), x), expected, rtol=1e-3, atol=1e-4)
    first, second = (load_quantized(result.folder, model) for _ in range(2))
    assert torch.equal(answer(first, x), answer(second, x))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in first.modules())
    assert 1e-6 < float((answer(first, x) - expected).norm() / expected.norm()) < 0.3
    undo(result.folder, tmp_path / "undone")
    undone = load_file(tmp_path / "undone" / "model.safetensors")
    for name, original in model.state_dict().items():
        torch.testing.assert_close(undone[name], original, rtol=1e-5, atol=1e-5)


class Inquisitive(Translator):
    """A model that reads the packed projections itself."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, WIDTH) -> (B, L, CLASSES)."""
        packed = self.encoder.self_attn.in_proj_weight
        return super().forward(x) + torch.as_tensor(packed).mean()


def test_attention_whose_weights_the_model_reads_is_left_with_a_note(tmp_path: Path) -> None:
    model = seeded(Inquisitive)
    result = launch(tmp_path, model, vectors(), FAST)
    assert any("attention" in note for note in result.manifest.notes)
    assert not any("q_proj" in name for site in result.manifest.sites for name in site.operators)
    x = vectors(seed=3)[0]
    torch.testing.assert_close(answer(load_smoothed(result.folder, model), x), answer(model, x), rtol=1e-3, atol=1e-4)
    assert torch.isfinite(answer(load_quantized(result.folder, model), x)).all()


class Upscaler(nn.Module):
    """A convolution and two transposed ones, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.slopes = nn.PReLU(6)
        self.last = nn.ConvTranspose2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, 2 H, 2 W)."""
        return torch.as_tensor(self.last(self.slopes(self.up(torch.relu(self.first(x))))))


def test_transposed_convolutions_are_smoothed_and_quantized(tmp_path: Path) -> None:
    model = seeded(Upscaler)
    with torch.no_grad():
        model.get_parameter("first.weight")[:2] *= 60
        model.get_parameter("up.weight")[:2] /= 60
    result = launch(tmp_path, model, vectors(48, 3, 6, 6), FAST)
    assert {site.name: site.mode for site in result.manifest.sites} == {
        "first": "explicit",
        "up": "fold",
        "last": "fold",
    }
    assert not result.manifest.skipped
    assert result.manifest.output.naive is not None
    assert result.manifest.output.ours is not None
    assert result.manifest.output.ours < result.manifest.output.naive
    x = vectors(48, 3, 6, 6, seed=3)[0]
    expected = answer(model, x)
    torch.testing.assert_close(answer(load_smoothed(result.folder, model), x), expected, rtol=1e-4, atol=1e-5)
    found = answer(load_quantized(result.folder, model), x)
    assert 1e-6 < float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_checkpoint_with_weight_norm_keeps_the_names_that_its_configuration_builds(
    handed_over: bool, tmp_path: Path
) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm="layer",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(config).eval()
    values: dict[str, Any] = dict(FAST)
    if not handed_over:
        model.save_pretrained(tmp_path / "model")
        values["model"] = {"path": tmp_path / "model"}
    result = run(settings(tmp_path, values), model=model if handed_over else None, batches=vectors(48, 400))
    weight = "wav2vec2.encoder.pos_conv_embed.conv.weight"
    assert any("baked" in note and weight in note for note in result.manifest.notes)
    assert weight in {entry.name for entry in result.manifest.weights if entry.status == "quantized"}
    x = vectors(8, 400, seed=3)[0]
    expected = answer(model, x)
    theirs, info = Wav2Vec2ForCTC.from_pretrained(result.folder / "smoothed", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for found in (load_smoothed(result.folder), theirs.eval()):
        torch.testing.assert_close(answer(found, x), expected, rtol=1e-3, atol=1e-5)
    quantized = answer(load_quantized(result.folder), x)
    assert 0 < float((quantized - expected).norm() / expected.norm()) < 0.2
    undo(result.folder, tmp_path / "undone")
    undone = Wav2Vec2ForCTC.from_pretrained(tmp_path / "undone").eval()
    torch.testing.assert_close(answer(undone, x), expected, rtol=1e-3, atol=1e-5)
