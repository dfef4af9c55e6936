"""What the parity tests of several families do to a model of ours and to one of transformers."""

from typing import Any

import torch
from torch import Tensor

from phikit.models.decoder import Decoder
from phikit.models.registry import checkpoint_parts


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(3))


def backward(ours: Decoder, theirs: Any) -> None:
    """Fill the gradients of both with those of one weighted sum of log-probabilities."""
    tokens = random_tokens(2, 40)
    weights = torch.randn(2, 40, 300, generator=torch.Generator().manual_seed(4))
    for model, logits in ((ours, ours(tokens)), (theirs, theirs(tokens).logits)):
        model.zero_grad()
        (logits.log_softmax(-1) * weights).sum().backward()


def assert_same_gradients(ours: Decoder, theirs: Any) -> None:
    """Every tensor of the checkpoint within 1e-4 of the other side, relative to its norm."""
    backward(ours, theirs)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = set()
    for key, parameter in ours.named_parameters():
        parts = checkpoint_parts(ours.config, key)
        assert parameter.grad is not None
        sizes = [rows or len(parameter) for _, rows in parts]
        for (name, _), gradient in zip(parts, parameter.grad.split(sizes), strict=True):
            distance = (gradient - expected[name]).norm() / expected[name].norm()
            assert distance <= 1e-4, (name, float(distance))
            compared.add(name)
    assert compared == set(expected)
