"""Phi-4-multimodal: the published config and its sizes, configs in and out, what is refused."""

import re
from collections.abc import Callable

import pytest
import torch
from tests.phi4mm import published

from phikit.base.errors import ConfigError
from phikit.models.multimodal import (
    MultimodalConfig,
    MultimodalModel,
    from_hf_config,
    to_hf_config,
)
from phikit.models.registry import config_from_hf
from phikit.nn.speech import SpeechConfig
from phikit.nn.vision import VisionConfig

LONGROPE = {
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
    "long_factor": [1.0, 1.4, 2.2, 3.1, 4.5, 7.9],
    "original_context": 32,
}


def test_published_config_and_counts():
    """3.836 B of text, vision 441.6 M, speech 441.2 + 25.2 M, LoRAs 369.1 M and 461.4 M."""
    config = config_from_hf(published())
    assert isinstance(config, MultimodalConfig)
    assert config.vision == VisionConfig() and config.speech == SpeechConfig()  # their defaults
    sizes: dict[str, int] = {}
    with torch.device("meta"):
        for name, parameter in MultimodalModel(config).named_parameters():
            found = re.match(r".*(adapters\.\w+)|audio_embed\.encoder|\w+", name)
            assert found is not None
            part = found[1] or found[0]
            sizes[part] = sizes.get(part, 0) + parameter.numel()
    assert sizes.pop("model") == 3_836_021_760
    assert {part: round(size / 1e6, 1) for part, size in sizes.items()} == {
        "adapters.vision": 369.1,
        "adapters.speech": 461.4,
        "image_embed": 441.6,
        "audio_embed.encoder": 441.2,
        "audio_embed": 25.2,
    }


def test_config_round_trip(tiny_multimodal: Callable[..., MultimodalModel]):
    config = tiny_multimodal(longrope=LONGROPE).config
    values = to_hf_config(config)
    values["vision_lora"], values["speech_lora"] = (
        {"r": shape.rank, "lora_alpha": shape.alpha} for shape in config.adapters.values()
    )
    assert from_hf_config(values) == config


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision_config", "hidden_act", "relu", "vision_config.hidden_act is 'relu'"),
        ("audio_config", "chunk_size", 18, "audio_config.chunk_size is 18; only -1"),
        ("audio_config", "ext_pw_out_channel", 7, "ext_pw_out_channel is 7; only 32"),
        ("audio_config", "num_block", 7, "num_block = 7; nearest is num_blocks"),
    ],
)
def test_what_we_would_not_obey_is_refused(tiny_multimodal, part, key, value, message):
    values = to_hf_config(tiny_multimodal().config)
    values[part][key] = value
    with pytest.raises(ConfigError, match=message):
        from_hf_config(values)
