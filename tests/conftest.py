"""Shared fixtures, and the markers that skip with a stated reason."""

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

from phikit.chat.audio import AudioClip
from phikit.chat.image import ImageCrops
from phikit.chat.render import NANO_SPECIALS
from phikit.chat.tokenizer import Tokenizer, train_tokenizer
from phikit.models.dense import DenseConfig, DenseModel
from phikit.models.multimodal import MultimodalConfig, MultimodalModel

PROSE = (
    "What is 12 + 7? The answer is 19, because 12 and 7 make 19.\n",
    "Anna has three apples and buys four more. How many apples does she have?\n\n",
    "system\nYou are a helpful assistant.\nuser\nHello there, how are you today?\n",
    "assistant\nFirst add the numbers, then divide the total by the number of children.\n",
)

# One worker is one core: a second thread per worker only makes two workers wait for each other.
torch.set_num_threads(1)
os.environ["PHIKIT_HISTORY"] = "off"  # no test writes into the history of who runs it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a test forks

# The same inputs on every machine, and no time limit for one input: a shared machine may stall.
hypothesis.settings.register_profile("phikit", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("phikit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--run-network", action="store_true", help="also run tests marked network")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons: dict[str, str] = {}
    if not config.getoption("--run-slow"):
        reasons["slow"] = "slow: takes more than half a minute; run with --run-slow"
    if not config.getoption("--run-network"):
        reasons["network"] = "network: talks to a server; run with --run-network"
    if not torch.cuda.is_available():
        reasons["gpu"] = "gpu: this machine has no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def nano_tokenizer() -> Tokenizer:
    """A small byte-level tokenizer with the special tokens of the nano models."""
    return train_tokenizer(PROSE, size=300, specials=NANO_SPECIALS)


@pytest.fixture(scope="session")
def chatml_tokenizer() -> Tokenizer:
    """A small tokenizer with the special tokens that ChatML needs, and none for thinking."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return train_tokenizer(PROSE, size=300, specials=specials)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., DenseModel]:
    """Makes a small random float32 model: `tiny_model(seed=1, sliding_window=6)`.

    Its weights are large enough for its next tokens to differ clearly in probability.
    """
    size = {"vocab_size": 300, "d_model": 48, "num_layers": 2, "d_mlp": 64, "max_context": 128}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "partial_rotary": 0.75}

    def make(seed: int = 0, **changes: Any) -> DenseModel:
        config = DenseConfig.resolve({**size, **heads, "init_std": 0.12, **changes})
        return DenseModel(config).initialise(torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def tiny_multimodal() -> Callable[..., MultimodalModel]:
    """Makes a small random Phi-4-multimodal in float32: `tiny_multimodal(vision_lora=None)`.

    Its ids 310 and 311 are placeholders. Every number of it is drawn, adapters included, so that
    all of them matter.
    """
    size = {"vocab_size": 320, "d_model": 64, "num_layers": 2, "d_mlp": 48, "max_context": 256}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "partial_rotary": 0.75}
    vision = {"d_model": 32, "d_mlp": 40, "num_layers": 3, "num_heads": 2, "feature_layer": 2}
    crops = {"patch_size": 7, "crop_size": 28, "positions_per_side": 4}
    speech = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_mlp": 24}
    sound = {"subsampling_channels": 8, "bias_max_distance": 5}
    own = {
        "vision": {**vision, **crops},
        "speech": {**speech, **sound},
        "vision_lora": {"rank": 4, "alpha": 8.0},
        "speech_lora": {"rank": 6, "alpha": 12.0},
        "image_token": 310,
        "audio_token": 311,
    }

    def make(seed: int = 0, **changes: Any) -> MultimodalModel:
        config = MultimodalConfig.resolve({**size, **heads, **own, "init_std": 0.1, **changes})
        generator = torch.Generator().manual_seed(seed)
        model = MultimodalModel(config).initialise(generator)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                # The Conformer's many norms leave the gradient of smaller weights to rounding.
                std = 0.25 if name.startswith("audio_embed.encoder") else 0.1
                tensor += std * torch.randn(tensor.shape, generator=generator)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_image() -> Callable[..., ImageCrops]:
    """Makes an image of noise for `tiny_multimodal`: `tiny_image(2, 3, hidden=(1, 2))`.

    The arguments are rows and columns of crops, and rows and columns of patches that show only
    padding.
    """

    def make(rows: int, columns: int, *, hidden: tuple[int, int] = (0, 0), seed: int = 0):
        noise = np.random.default_rng(seed).standard_normal((1 + rows * columns, 3, 28, 28))
        visible = np.ones((4 * rows, 4 * columns), dtype=np.bool_)
        visible[4 * rows - hidden[0] :] = False
        visible[:, 4 * columns - hidden[1] :] = False
        crops = visible.reshape(rows, 4, columns, 4).transpose(0, 2, 1, 3).reshape(-1, 4, 4)
        mask = np.concatenate([np.ones((1, 4, 4), dtype=np.bool_), crops])
        return ImageCrops(noise.astype(np.float32), mask, rows, columns)

    return make


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[..., AudioClip]:
    """Makes a clip of so many frames of noise: `tiny_clip(60)`."""

    def make(frames: int, *, seed: int = 0) -> AudioClip:
        noise = np.random.default_rng(seed).standard_normal((frames, 80)).astype(np.float32)
        return AudioClip(noise, num_tokens=-(-frames // 8))

    return make
