"""Phi-4-multimodal: the dense decoder of Phi-4-mini, two encoders, and a Mixture-of-LoRAs.

How it perceives is `models.modality`: placeholders whose embeddings are overwritten, and for every
row the adapter and the projectors that its contents call for. There is no learnt router, one batch
may mix all kinds of rows, and text rows are the base model bit for bit. (Microsoft's code decides
for the batch as a whole, the one in transformers leaves the adapter to its caller.)

Parameters are named as in `Phi4MultimodalForCausalLM` of transformers, with the two encoders moved
to the top; the adapters lie in folders of their own. `phikit.weights.multimodal` reads Microsoft's
older layout under these names.

Source: Phi-4-Mini technical report (arXiv 2503.01743), section 2.2.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import NonNegativeInt, model_validator

from phikit.base.errors import ConfigError
from phikit.base.media import SPEECH, VISION
from phikit.base.media import Media as Media
from phikit.models import dense
from phikit.models.dense import DenseConfig, DenseModel
from phikit.models.hf import check_keys
from phikit.models.modality import LoraShape, Modality
from phikit.models.senses import Hearing, Sight, SpeechModality, VisionModality
from phikit.nn.lora import add_adapters
from phikit.nn.speech import FRAMES_PER_TOKEN, SpeechConfig
from phikit.nn.vision import VisionConfig

LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class MultimodalConfig(DenseConfig):
    """A dense decoder, two encoders and the adapters that go with them."""

    vision: VisionConfig = VisionConfig()
    speech: SpeechConfig = SpeechConfig()
    vision_lora: LoraShape | None = None
    """None in a model that has not learnt to see yet; its images run on the base."""
    speech_lora: LoraShape | None = None
    image_token: NonNegativeInt = 200_010
    """Placeholder of an image's positions."""
    audio_token: NonNegativeInt = 200_011
    """Placeholder of a clip's positions."""

    @property
    def senses(self) -> tuple[str, ...]:
        return (VISION, SPEECH)

    @property
    def adapters(self) -> dict[str, LoraShape]:
        """The adapters that the model has, by name."""
        both = {VISION: self.vision_lora, SPEECH: self.speech_lora}
        return {name: shape for name, shape in both.items() if shape is not None}

    @model_validator(mode="after")
    def _has_its_tokens(self) -> Self:
        if max(self.image_token, self.audio_token) >= self.vocab_size:
            raise ValueError(
                f"image_token {self.image_token} and audio_token {self.audio_token} must lie "
                f"within vocab_size {self.vocab_size}"
            )
        if self.image_token == self.audio_token:
            raise ValueError(f"image_token and audio_token are both {self.image_token}")
        return self


class MultimodalModel(DenseModel):
    """A decoder that sees and hears: token ids [B, T] and media in, logits [B, T, V] out."""

    config: MultimodalConfig

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__(config)
        for name, shape in config.adapters.items():
            add_adapters(self, name=name, targets=LORA_TARGETS, rank=shape.rank, alpha=shape.alpha)
        vision = VisionModality(encoder=config.vision)
        speech = SpeechModality(encoder=config.speech)
        self.image_embed = Sight(config.vision, config.d_model)
        self.image_embed.known_by(vision, token=config.image_token)
        self.audio_embed = Hearing(config.speech, config.d_model)
        self.audio_embed.known_by(speech, token=config.audio_token)

    @property
    def senses(self) -> dict[str, Modality]:
        return {VISION: self.image_embed, SPEECH: self.audio_embed, **super().senses}

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Self:
        """As every decoder; adapters start as the identity, separators and gate biases at zero."""
        super().initialise(generator)
        for name, parameter in self.named_parameters():
            if name.endswith((".b_DR", ".glu.b1", ".glu.b2", "feature_extensor")):
                parameter.zero_()
        return self


# --- Hugging Face configuration -----------------------------------------------------------------

# fmt: off
KEYS = dense.KEYS | {
    "vision_config", "audio_config", "vision_lora", "speech_lora",
    "audio_processor", "embd_layer", "img_processor",
}
# fmt: on
"""Keys of `config.json`; the last line and the adapters are in Microsoft's layout only."""

_VISION_FIELDS = {
    "hidden_size": "d_model",
    "intermediate_size": "d_mlp",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "crop_size": "crop_size",
    "layer_norm_eps": "norm_eps",
}
_SPEECH_FIELDS = {
    "hidden_size": "d_model",
    "num_blocks": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "d_mlp",
    "input_size": "num_mels",
    "nemo_conv_channels": "subsampling_channels",
    "kernel_size": "kernel_size",
    "bias_max_distance": "bias_max_distance",
}
_ONLY_VISION = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
_ONLY_SPEECH = {
    "activation": "swish",
    "conv_activation": "swish",
    "conv_glu_type": "swish",
    "nemo_activation": "relu",
    "chunk_size": -1,
    "depthwise_multiplier": 1,
    "time_reduction": FRAMES_PER_TOKEN,
    "bias_symmetric": False,
    "downsample_rate": 1,
}
_SPARE = ("feature_layer", "left_chunk", "dropout_rate", "nemo_final_size")
"""Keys of `audio_config` without effect: the last block is used, and no chunk streams."""
_CHUNK_TOKENS = SpeechConfig().chunk_tokens


def to_hf_config(config: MultimodalConfig) -> dict[str, Any]:
    """The `config.json` under which `transformers` loads the same model.

    Raises ConfigError for a chunk length that no `config.json` can say.
    """
    vision, speech = config.vision, config.speech
    if speech.chunk_tokens != _CHUNK_TOKENS:
        raise ConfigError(
            f"speech.chunk_tokens is {speech.chunk_tokens}; checkpoints only know {_CHUNK_TOKENS}"
        )
    width = speech.d_model
    return dense.to_hf_config(config) | {
        "architectures": ["Phi4MultimodalForCausalLM"],
        "model_type": "phi4_multimodal",
        "vision_config": {
            "model_type": "phi4_multimodal_vision",
            **{theirs: getattr(vision, ours) for theirs, ours in _VISION_FIELDS.items()},
            **_ONLY_VISION,
            "image_size": vision.positions_per_side * vision.patch_size,
            "feature_layer": vision.feature_layer - vision.num_layers - 1,
            "image_token_id": config.image_token,
        },
        "audio_config": {
            "model_type": "phi4_multimodal_audio",
            **{theirs: getattr(speech, ours) for theirs, ours in _SPEECH_FIELDS.items()},
            **_ONLY_SPEECH,
            "ext_pw_out_channel": width,
            "depthwise_separable_out_channel": width,
            "audio_token_id": config.audio_token,
        },
    }


def from_hf_config(values: dict[str, Any]) -> MultimodalConfig:
    """Read a `config.json` of either layout; ConfigError for a feature we do not run.

    The adapters' sizes are under `vision_lora` and `speech_lora`, as in Microsoft's layout; for
    the other one `phikit.weights.multimodal` puts them there from the adapters' folders.
    """
    if values["model_type"] == "phi4mm":
        values = _native(values)
    text = dense.from_hf_config({**values, "model_type": "phi3"})
    vision, speech = values.get("vision_config") or {}, values.get("audio_config") or {}
    return MultimodalConfig(
        **dict(text),
        vision=_read_vision(vision),
        speech=_read_speech(speech),
        vision_lora=_read_lora(values.get("vision_lora")),
        speech_lora=_read_lora(values.get("speech_lora")),
        image_token=vision.get("image_token_id", 200_010),
        audio_token=speech.get("audio_token_id", 200_011),
    )


def _read_vision(values: Mapping[str, Any]) -> VisionConfig:
    _check_part("vision_config", values, _VISION_FIELDS, _ONLY_VISION)
    fields = {ours: values[theirs] for theirs, ours in _VISION_FIELDS.items() if theirs in values}
    config = VisionConfig(**fields, feature_layer=1)
    layer, image_size = values.get("feature_layer", -2), values.get("image_size", 448)
    return VisionConfig(
        **fields,
        feature_layer=layer if layer >= 0 else config.num_layers + 1 + layer,
        positions_per_side=image_size // config.patch_size,
    )


def _read_speech(values: Mapping[str, Any]) -> SpeechConfig:
    values = {"bias_max_distance": 1000} | dict(values)  # the default of transformers, not ours
    width = values.get("hidden_size", 1024)
    channels = {"ext_pw_out_channel": width, "depthwise_separable_out_channel": width}
    # An absent number of channels is transformers' default, which fits one width only.
    values = dict.fromkeys(channels, 1024) | values
    _check_part("audio_config", values, _SPEECH_FIELDS, _ONLY_SPEECH | channels)
    return SpeechConfig(
        **{ours: values[theirs] for theirs, ours in _SPEECH_FIELDS.items() if theirs in values}
    )


def _check_part(
    part: str, values: Mapping[str, Any], fields: Mapping[str, str], only: Mapping[str, Any]
) -> None:
    """Raise ConfigError for keys or values of a part of the config that we would not obey."""
    ids = ("image_size", "image_token_id", "audio_token_id")
    check_keys({"model_type": part, **values}, {*fields, *only, *ids, *_SPARE})
    _require(part, values, only)


def _require(part: str, values: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    for key, known in only.items():
        if values.get(key, known) != known:
            raise ConfigError(f"{part}.{key} is {values[key]!r}; only {known!r} is known here")


def _read_lora(values: Mapping[str, Any] | None) -> LoraShape | None:
    return None if values is None else LoraShape(rank=values["r"], alpha=values["lora_alpha"])


# fmt: off
_ONLY_REMOTE_IMAGE = {
    "embedding_cls": "tune_image", "hd_transform_order": "sub_glb",
    "image_token_compression_cls": "avg_pool_2d", "projection_cls": "mlp",
    "use_hd_transform": True, "with_learnable_separator": True,
}
_ONLY_REMOTE_AUDIO = {
    "embedding_cls": "audio", "compression_rate": FRAMES_PER_TOKEN, "downsample_rate": 1,
    "projection_cls": "mlp", "use_conv_downsample": False, "use_qformer": False,
}
_ONLY_REMOTE_ENCODER = {
    "batch_norm": False, "bias_in_glu": True, "causal": True, "cnn_layer_norm": True,
    "ext_pw_kernel_size": 1, "input_layer": "nemo_conv",
}
# fmt: on


def _native(values: Mapping[str, Any]) -> dict[str, Any]:
    """Microsoft's `config.json` in the terms of transformers.

    Its SigLIP tower is a constant of the code; a `vision_config` beside it may say another size.
    """
    embedders = values["embd_layer"]
    image, audio = embedders["image_embd_layer"], embedders["audio_embd_layer"]
    _require("embd_layer.image_embd_layer", image, _ONLY_REMOTE_IMAGE)
    _require("embd_layer.audio_embd_layer", audio, _ONLY_REMOTE_AUDIO)
    encoder = dict(values["audio_processor"]["config"])
    _require("audio_processor.config", encoder, _ONLY_REMOTE_ENCODER)
    for spare in ("activation_checkpointing", "encoder_embedding_config", *_ONLY_REMOTE_ENCODER):
        encoder.pop(spare, None)
    bias = encoder.pop("relative_attention_bias_args")
    _require("audio_processor.config.relative_attention_bias_args", bias, {"type": "t5"})
    encoder |= {
        "hidden_size": encoder.pop("attention_dim"),
        "num_attention_heads": encoder.pop("attention_heads"),
        "intermediate_size": encoder.pop("linear_units"),
        "nemo_conv_channels": encoder.pop("nemo_conv_settings")["conv_channels"],
        "bias_max_distance": bias["t5_bias_max_distance"],
        # Misspelt in every published file.
        "depthwise_separable_out_channel": encoder.pop("depthwise_seperable_out_channel"),
    }
    tower = {"crop_size": image["crop_size"], **(values.get("vision_config") or {})}
    return {**values, "vision_config": tower, "audio_config": encoder}


# --- Key map ------------------------------------------------------------------------------------


def checkpoint_parts(config: MultimodalConfig, key: str) -> list[tuple[str, int | None]]:
    """The checkpoint tensors that make up our parameter `key`; see `registry.Family.parts`.

    The tensors of adapters lie in folders beside the checkpoint: a folder's name and a slash come
    first in theirs.
    """
    stem, _, leaf = key.rpartition(".")
    linear, is_adapter, name = stem.rpartition(".adapters.")
    if is_adapter:
        return [(f"{adapter_folder(name)}/{linear}.lora_{leaf[0].upper()}.weight", None)]
    if key.startswith(("image_embed.", "audio_embed.")):
        return [(f"model.embed_tokens_extend.{key}", None)]
    return [(key, None)]


def adapter_folder(name: str) -> str:
    """Where an adapter lies beside the checkpoint."""
    return f"{name}-lora"


def is_beside(name: str) -> bool:
    """Whether a tensor lies in an adapter's folder, not in the checkpoint's own files."""
    return "/" in name
