"""Models of images, speech and both with text."""

from __future__ import annotations

import torch

from alphasmith.objectives.media.batch import Batch
from tests.support.architecture_records import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    VOCABULARY,
    Architecture,
    Folded,
    Kept,
    attention,
    images,
    pretrained,
)

_WHISPER_ENCODER = "model.encoder.layers.{n}"
_WHISPERDECODER = "model.decoder.layers.{n}"
_RESNET = "resnet.encoder.stages"


def _speech(generator: torch.Generator, samples: int) -> Batch:
    mel = torch.randn(samples, 8, 20, generator=generator, dtype=torch.float64)
    ids = torch.randint(4, VOCABULARY, (samples, 5), generator=generator)
    return Batch(kwargs={"input_features": mel, "decoder_input_ids": ids, "use_cache": False})


def _waveforms(generator: torch.Generator, samples: int) -> Batch:
    return Batch(kwargs={"input_values": torch.randn(samples, 100, generator=generator, dtype=torch.float64)})


MEDIA: tuple[Architecture, ...] = (
    Architecture(
        name="vit",
        factory=pretrained(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            image_size=12,
            patch_size=4,
            num_labels=3,
        ),
        batch=images(12),
        folded=(
            *attention("vit.layers.{n}.attention", "vit.layers.{n}.layernorm_before", kv_heads=HEADS),
            Folded(operators=("vit.layers.{n}.mlp.fc1",), producers=("vit.layers.{n}.layernorm_after",), repeat=LAYERS),
        ),
        kept=(
            Kept(operators=("vit.embeddings.patch_embeddings.projection",)),
            Kept(operators=("vit.layers.{n}.mlp.fc2",), repeat=LAYERS),
        ),
    ),
    Architecture(
        name="swin",
        factory=pretrained(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=3,
            num_labels=3,
        ),
        batch=images(32),
        folded=(
            *(
                Folded(operators=operators, producers=(producer,), repeat=2)
                for stage in range(2)
                for block in (f"swin.encoder.layers.{stage}.blocks.{{n}}",)
                for operators, producer in (
                    (tuple(f"{block}.attention.{x}_proj" for x in "qkv"), f"{block}.layernorm_before"),
                    ((f"{block}.attention.o_proj",), f"{block}.attention.v_proj"),
                    ((f"{block}.mlp.fc1",), f"{block}.layernorm_after"),
                )
            ),
            Folded(
                operators=("swin.encoder.layers.0.downsample.reduction",),
                producers=("swin.encoder.layers.0.downsample.norm",),
            ),
            Folded(operators=("classifier",), producers=("swin.layernorm",)),
        ),
        kept=(
            Kept(operators=("swin.embeddings.patch_embeddings.projection",)),
            Kept(operators=("swin.encoder.layers.0.blocks.{n}.mlp.fc2",), repeat=2),
        ),
    ),
    Architecture(
        name="detr",
        factory=pretrained(
            "DetrForObjectDetection",
            "DetrConfig",
            use_timm_backbone=False,
            backbone_config={
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 2],
                "layer_type": "basic",
                "out_features": ["stage2"],
            },
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            num_queries=5,
            num_labels=3,
        ),
        batch=images(32),
        folded=(
            *(
                Folded(operators=(f"{layer}.{operator}",), producers=(f"{layer}.{producer}",), repeat=LAYERS)
                for layer, operator, producer in (
                    ("model.encoder.layers.{n}", "self_attn.o_proj", "self_attn.v_proj"),
                    ("model.encoder.layers.{n}", "mlp.fc2", "mlp.fc1"),
                    ("model.decoder.layers.{n}", "self_attn.o_proj", "self_attn.v_proj"),
                    ("model.decoder.layers.{n}", "encoder_attn.o_proj", "encoder_attn.v_proj"),
                    ("model.decoder.layers.{n}", "mlp.fc2", "mlp.fc1"),
                )
            ),
            Folded(operators=("bbox_predictor.layers.1",), producers=("bbox_predictor.layers.0",)),
            Folded(operators=("bbox_predictor.layers.2",), producers=("bbox_predictor.layers.1",)),
        ),
        kept=(
            Kept(operators=("model.backbone.model.embedder.embedder.convolution",)),
            Kept(operators=("model.input_projection",)),
            Kept(
                operators=("model.encoder.layers.{n}.self_attn.q_proj", "model.encoder.layers.{n}.self_attn.k_proj"),
                repeat=LAYERS,
            ),
            Kept(operators=("model.encoder.layers.{n}.self_attn.v_proj",), repeat=LAYERS),
            Kept(operators=("model.encoder.layers.{n}.mlp.fc1",), repeat=LAYERS),
            Kept(operators=("model.decoder.layers.{n}.encoder_attn.q_proj",), repeat=LAYERS),
            Kept(operators=tuple(f"model.decoder.layers.{n}.encoder_attn.v_proj" for n in range(LAYERS))),
            Kept(operators=("class_labels_classifier", "bbox_predictor.layers.0")),
        ),
    ),
    Architecture(
        name="whisper",
        factory=pretrained(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            max_source_positions=10,
            max_target_positions=16,
            decoder_start_token_id=3,
        ),
        batch=_speech,
        folded=(
            *(
                rule
                for side in (_WHISPER_ENCODER, _WHISPERDECODER)
                for rule in (
                    *attention(f"{side}.self_attn", f"{side}.self_attn_layer_norm", kv_heads=HEADS, output="out_proj"),
                    Folded(operators=(f"{side}.fc1",), producers=(f"{side}.final_layer_norm",), repeat=LAYERS),
                )
            ),
            Folded(
                operators=(f"{_WHISPERDECODER}.encoder_attn.q_proj",),
                producers=(f"{_WHISPERDECODER}.encoder_attn_layer_norm",),
                repeat=LAYERS,
            ),
            Folded(
                operators=(f"{_WHISPERDECODER}.encoder_attn.out_proj",),
                producers=(f"{_WHISPERDECODER}.encoder_attn.v_proj",),
                repeat=LAYERS,
            ),
        ),
        kept=(
            Kept(operators=("model.encoder.conv1",)),
            Kept(operators=("model.encoder.conv2",)),
            Kept(operators=(f"{_WHISPER_ENCODER}.fc2",), repeat=LAYERS),
            Kept(
                operators=tuple(
                    f"model.decoder.layers.{n}.encoder_attn.{x}_proj" for n in range(LAYERS) for x in ("k", "v")
                )
            ),
        ),
        skipped=("proj_out",),
    ),
    Architecture(
        name="resnet",
        factory=pretrained(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[12, 16, 24],
            depths=[1, 1, 2],
            layer_type="bottleneck",
            num_labels=3,
        ),
        batch=images(32),
        folded=(
            Folded(
                operators=tuple(f"{_RESNET}.0.layers.0.{x}.convolution" for x in ("layer.0", "shortcut")),
                producers=("resnet.embedder.embedder.normalization",),
            ),
            *(
                Folded(
                    operators=(f"{_RESNET}.{{n}}.layers.0.layer.{place}.convolution",),
                    producers=(f"{_RESNET}.{{n}}.layers.0.layer.{place - 1}.normalization",),
                    repeat=3,
                )
                for place in (1, 2)
            ),
            *(
                Folded(
                    operators=tuple(f"{_RESNET}.{n + 1}.layers.0.{x}.convolution" for x in ("layer.0", "shortcut")),
                    producers=tuple(f"{_RESNET}.{n}.layers.0.{x}.normalization" for x in ("layer.2", "shortcut")),
                )
                for n in range(2)
            ),
        ),
        kept=(
            Kept(operators=("resnet.embedder.embedder.convolution",)),
            Kept(operators=(f"{_RESNET}.2.layers.1.layer.0.convolution",)),
            Kept(operators=("classifier.1",)),
        ),
    ),
    Architecture(
        name="convnext",
        factory=pretrained(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 12],
            depths=[1, 2],
            num_stages=2,
            num_labels=3,
        ),
        batch=images(16),
        folded=(
            Folded(
                operators=("convnext.encoder.stages.1.layers.{n}.pwconv1",),
                producers=("convnext.encoder.stages.1.layers.{n}.layernorm",),
                repeat=2,
            ),
        ),
        kept=(
            Kept(operators=("convnext.encoder.stages.1.layers.{n}.dwconv",), repeat=2),
            Kept(operators=("convnext.encoder.stages.1.layers.{n}.pwconv2",), repeat=2),
        ),
    ),
    Architecture(
        name="wav2vec2",
        factory=pretrained(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            conv_dim=(8, 8),
            conv_kernel=(4, 3),
            conv_stride=(3, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        batch=_waveforms,
        folded=(
            Folded(
                operators=("wav2vec2.encoder.layers.{n}.attention.out_proj",),
                producers=("wav2vec2.encoder.layers.{n}.attention.v_proj",),
                repeat=LAYERS,
            ),
            Folded(
                operators=("wav2vec2.feature_projection.projection",),
                producers=("wav2vec2.feature_projection.layer_norm",),
            ),
        ),
    ),
)
