"""The written-out softmax is the fused kernel, under every mask; and the masks themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.nn import attention
from phikit.nn.attention import CausalAttention, explicit_attention, stacked_bias

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1, -1], [0] * 10])


def qkv(kv_heads: int = 2, tokens: int = 10) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, heads, 8) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole rows", "packed"])
@pytest.mark.parametrize("window", [None, 3])
def test_written_out_is_fused(monkeypatch: pytest.MonkeyPatch, kv_heads, documents, window):
    inputs = qkv(kv_heads)
    results = []
    for longest in (512, 0):
        monkeypatch.setattr(attention, "EXPLICIT_MAX_TOKENS", longest)
        y = CausalAttention(documents, window=window)(*inputs, layer=0)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        results.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_against_the_formula():
    q, k, v = qkv(2)
    allowed = torch.ones(1, 10, 10, dtype=torch.bool)
    bias = stacked_bias(allowed, kv_heads=2, group=2, dtype=torch.float32)
    y = explicit_attention(q, k, v, bias=bias)
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    scores = torch.einsum("btnh,bsnh->bnts", q, k) / 8**0.5
    expected = torch.einsum("bnts,bsnh->btnh", F.softmax(scores, -1), v)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_masks():
    device = torch.device("cpu")
    plain = CausalAttention().allowed(4, device)
    assert plain.tolist() == [torch.ones(4, 4).tril().bool().tolist()]
    window = CausalAttention(window=2).allowed(4, device)[0]
    assert window.sum(1).tolist() == [1, 2, 2, 2]
    packed = CausalAttention(DOCUMENTS).allowed(10, device)[0]
    assert packed.sum(1).tolist() == [1, 2, 3, 1, 2, 1, 2, 3, 1, 2]


def test_the_future_is_never_seen():
    q, k, v = qkv(2)
    before = CausalAttention()(q, k, v, layer=0)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[:, 6:] += 1
    v2[:, 6:] += 1
    after = CausalAttention()(q, k2, v2, layer=0)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])
