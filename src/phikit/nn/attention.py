"""Grouped-query attention (Ainslie et al., 2023), apart from where keys and values come from.

A model computes q, k, v and calls an `Attend`. Training, prefill, decoding with shared prefixes and
later paged caches are different `Attend`s; the model never knows which. `CausalAttention` is the
one for training: it writes the softmax out at short lengths, because on CPU the backward pass of
`scaled_dot_product_attention` is slower there (measured in `benchmarks/train.py --attention`), and
leaves long sequences to the fused kernel, whose memory does not grow with the square of T.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.nn.linear import Linear
from phikit.nn.rope import RopeTables, split_rotate

EXPLICIT_MAX_TOKENS = 512
"""Sequences up to this length use the written-out softmax on CPU."""
SPARSE_QUERIES = 256
"""Queries attended at a time under a `BlockSparse` pattern, whose mask is one for each head."""


class BlockSparse(Config):
    """Which blocks of keys each head sees: the nearest ones, and every so many of the rest.

    A query sees `local_blocks` blocks, its own the last. Of those before, head h sees the blocks j
    with (j + h * step + 1) divisible by `vertical_stride`; step is the stride over the number of
    heads, at least 1. So every head sees other blocks.

    Source: Phi-3 (arXiv 2404.14219, section 2); `get_sparse_attn_mask` in vLLM at commit 00e3ddc,
    `vllm/attention/ops/blocksparse_attention/utils.py`.
    """

    block: PositiveInt
    """Tokens in a block."""
    local_blocks: PositiveInt
    vertical_stride: PositiveInt
    same_for_all_heads: bool = False
    """All heads see the blocks of head 0."""

    @property
    def reach(self) -> int:
        """Sequences of up to this many tokens lose nothing."""
        return self.block * self.local_blocks

    def visible(self, queries_BT: Tensor, keys_BS: Tensor, *, num_heads: int) -> Tensor:
        """Boolean [B, N, T, S] for positions of queries and keys; causality is not part of it."""
        query_blocks = queries_BT[:, None, :, None] // self.block
        key_blocks = keys_BS[:, None, None, :] // self.block
        step = 0 if self.same_for_all_heads else max(1, self.vertical_stride // num_heads)
        offsets = torch.arange(num_heads, device=keys_BS.device)[:, None, None] * step + 1
        is_vertical = (key_blocks + offsets) % self.vertical_stride == 0
        return (query_blocks - key_blocks < self.local_blocks) | is_vertical


class Attend(Protocol):
    """How one layer's queries meet keys and values."""

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        layer: int,
        pattern: BlockSparse | None = None,
    ) -> Tensor:
        """Return the attended values, [B, T, N, H]; `pattern` hides some keys from some heads."""
        ...


class AttentionShape(NamedTuple):
    """Sizes of one attention layer."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


class SelfAttention(nn.Module):
    """Rotary grouped-query attention with one fused matrix: rows are queries, keys, then values."""

    def __init__(self, shape: AttentionShape, layer: int, *, bias: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.head_dim = shape.head_dim
        self.qkv_proj = Linear(shape.d_model, sum(self.heads) * shape.head_dim, bias=bias)
        self.o_proj = Linear(shape.num_heads * shape.head_dim, shape.d_model, bias=bias)

    def forward(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        heads, kv_heads, _ = self.heads
        q_BTNH, k_BTKH, v_BTKH = split_rotate(
            self.qkv_proj(x_BTD), rope, heads=heads, kv_heads=kv_heads
        )
        return self.o_proj(attend(q_BTNH, k_BTKH, v_BTKH, layer=self.layer).flatten(2))


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

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        layer: int,
        pattern: BlockSparse | None = None,
    ) -> Tensor:
        tokens = q_BTNH.shape[1]
        if pattern is not None and tokens > pattern.reach:
            return self._sparse(q_BTNH, k_BTKH, v_BTKH, pattern)
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

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Position of each token within its document, [B or 1, T]."""
        index_BT = torch.arange(tokens, device=device)[None]
        if self.documents_BT is None:
            return index_BT
        is_first = self.documents_BT.diff(dim=1, prepend=self.documents_BT[:, :1] - 1) != 0
        return index_BT - (index_BT * is_first).cummax(dim=1).values

    def _sparse(
        self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, pattern: BlockSparse
    ) -> Tensor:
        """The fused kernel, some queries at a time, each part with the keys up to its last one."""
        _, tokens, heads, _ = q_BTNH.shape
        allowed_BTS = self.allowed(tokens, q_BTNH.device)
        positions_BT = self.positions(tokens, q_BTNH.device)
        parts = []
        for start in range(0, tokens, SPARSE_QUERIES):
            end = min(start + SPARSE_QUERIES, tokens)
            visible = pattern.visible(
                positions_BT[:, start:end], positions_BT[:, :end], num_heads=heads
            )
            part = F.scaled_dot_product_attention(
                q_BTNH[:, start:end].transpose(1, 2),
                k_BTKH[:, :end].transpose(1, 2),
                v_BTKH[:, :end].transpose(1, 2),
                attn_mask=allowed_BTS[:, None, start:end, :end] & visible,
                enable_gqa=heads != k_BTKH.shape[2],
            )
            parts.append(part.transpose(1, 2))
        return torch.cat(parts, dim=1)


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


def whole_attention(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of an encoder: every query may see all that the mask leaves, [B, N, T, H].

    On CPU it computes bfloat16 in float32: at the sizes of a small encoder the
    backward pass of torch's kernel takes seven times as long in bfloat16 as all matrix products.
    """
    dtype = q_BNTH.dtype
    if dtype == torch.bfloat16 and q_BNTH.device.type == "cpu":
        q_BNTH, k_BNSH, v_BNSH = q_BNTH.float(), k_BNSH.float(), v_BNSH.float()
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
    mixed = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask)
    return mixed.to(dtype)
