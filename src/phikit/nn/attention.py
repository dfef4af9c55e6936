"""Grouped-query attention (Ainslie et al., 2023), apart from where keys and values come from.

A model computes q, k, v and calls an `Attend`. Training, prefill, decoding with shared prefixes and
later paged caches are different `Attend`s; the model never knows which. `CausalAttention` is the
one for training: it writes the softmax out at short lengths, because on CPU the backward pass of
`scaled_dot_product_attention` is slower there (measured in `benchmarks/train.py --attention`), and
leaves long sequences to the fused kernel, whose memory does not grow with the square of T.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EXPLICIT_MAX_TOKENS = 512
"""Sequences up to this length use the written-out softmax on CPU."""


class Attend(Protocol):
    """How one layer's queries meet keys and values."""

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layer: int) -> Tensor:
        """Return the attended values, [B, T, N, H]."""
        ...


class CausalAttention:
    """Causal attention within each document of a row.

    `documents_BT` numbers the documents packed into a row (padding is -1 and attends only to
    itself); None means that every row is one document. The mask is built once and used by all
    layers.
    """

    def __init__(self, documents_BT: Tensor | None = None, *, window: int | None = None) -> None:
        self.documents_BT = documents_BT
        self.window = window
        self._bias: Tensor | None = None

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, *, layer: int) -> Tensor:
        tokens = q_BTNH.shape[1]
        if q_BTNH.device.type == "cpu" and tokens <= EXPLICIT_MAX_TOKENS:
            if self._bias is None:
                allowed_BTS = self.allowed(tokens, q_BTNH.device)
                heads, kv_heads = q_BTNH.shape[2], k_BTKH.shape[2]
                self._bias = stacked_bias(
                    allowed_BTS, kv_heads=kv_heads, group=heads // kv_heads, dtype=q_BTNH.dtype
                )
            return explicit_attention(q_BTNH, k_BTKH, v_BTKH, bias=self._bias)
        plain = self.documents_BT is None and self.window is None
        mask = None if plain else self.allowed(tokens, q_BTNH.device)[:, None]
        return F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BTKH.transpose(1, 2),
            v_BTKH.transpose(1, 2),
            attn_mask=mask,
            is_causal=plain,
            enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
        ).transpose(1, 2)

    def allowed(self, tokens: int, device: torch.device) -> Tensor:
        """Boolean [B or 1, T, T]: may query t see key s?"""
        index = torch.arange(tokens, device=device)
        distance = index[:, None] - index[None, :]
        mask = (distance >= 0)[None]
        if self.window is not None:
            mask = mask & (distance < self.window)
        if self.documents_BT is not None:
            mask = mask & (self.documents_BT[:, :, None] == self.documents_BT[:, None, :])
        return mask


def stacked_bias(allowed_BTS: Tensor, *, kv_heads: int, group: int, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed and -inf elsewhere, laid out for `explicit_attention`.

    [B * K, G * T, S] from [B, T, S]; one mask for all rows ([1, T, S]) stays one.
    """
    bias_BTS = torch.zeros(allowed_BTS.shape, dtype=dtype, device=allowed_BTS.device)
    bias_BTS = bias_BTS.masked_fill_(~allowed_BTS, float("-inf"))
    rows, tokens, keys = bias_BTS.shape
    copies = kv_heads if rows > 1 else 1
    stacked = bias_BTS[:, None, None].expand(rows, copies, group, tokens, keys)
    return stacked.reshape(rows * copies, group * tokens, keys)


def explicit_attention(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, *, bias: Tensor) -> Tensor:
    """Softmax attention written out; `bias` comes from `stacked_bias`.

    The G query heads that share a key/value head are stacked along the query axis, so keys and
    values are never repeated.
    """
    batch, tokens, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    group = heads // kv_heads
    q = q_BTNH.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    q = q.reshape(batch * kv_heads, group * tokens, width)
    k = k_BSKH.permute(0, 2, 3, 1).reshape(batch * kv_heads, width, -1)
    v = v_BSKH.transpose(1, 2).reshape(batch * kv_heads, -1, width)
    weights = torch.baddbmm(bias, q, k, alpha=width**-0.5).softmax(-1)
    return torch.bmm(weights, v).view(batch, heads, tokens, width).transpose(1, 2)
