"""Shared fixtures, and the markers that skip with a stated reason."""

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch

from phikit.chat.render import NANO_SPECIALS
from phikit.chat.tokenizer import Tokenizer, train_tokenizer
from phikit.models.dense import DenseConfig, DenseModel

PROSE = (
    "What is 12 + 7? The answer is 19, because 12 and 7 make 19.\n",
    "Anna has three apples and buys four more. How many apples does she have?\n\n",
    "system\nYou are a helpful assistant.\nuser\nHello there, how are you today?\n",
    "assistant\nFirst add the numbers, then divide the total by the number of children.\n",
)

# One worker is one core: a second thread per worker only makes two workers wait for each other.
torch.set_num_threads(1)
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
