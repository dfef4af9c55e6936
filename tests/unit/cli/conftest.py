from pathlib import Path

import pytest
import torch

from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.models.dense import DenseConfig, DenseModel
from phikit.weights.load import Loaded


@pytest.fixture
def loaded(nano_tokenizer: Tokenizer) -> Loaded:
    """A model of random weights with a context of 160 tokens."""
    config = DenseConfig(
        vocab_size=nano_tokenizer.size,
        d_model=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        d_mlp=32,
        max_context=160,
    )
    model = DenseModel(config).initialise(torch.Generator().manual_seed(0))
    return Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"), Path("here"))
