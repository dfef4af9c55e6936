"""Attention of one step: tokens of many sequences, each to the blocks of its own.

The tokens of a step are laid end to end, [S]. Keys and values of all of them are stored first; then
a token sees every key of its sequence up to its own. Short spans (decoding, drafts, the end of a
prompt) go through the kernel that reads blocks where they lie. Long ones are a matrix product's
work: their keys are gathered and torch's fused attention runs on them. Without kernels, short spans
gather too, some rows at a time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.generate.blocks import BLOCK_TOKENS
from phikit.generate.cache import LayerCache, PagedCache
from phikit.nn import kernels
from phikit.nn.attention import BlockSparse

SHORT = 24
"""Spans up to this many tokens are read from their blocks."""
GATHER_ELEMENTS = 1 << 24
"""Keys gathered at a time where there is no kernel, in numbers."""


class Stretch(NamedTuple):
    """A span as attention sees it: tokens [first, first + count) of the step."""

    first: int
    count: int
    start: int
    """Position of the first token in its sequence."""
    row: int
    """The sequence's row of the block tables."""


class PagedAttention:
    """An `Attend` for one step over a paged cache; rows beyond its tokens are padding.

    Args:
        cache: where keys and values go and come from.
        tables_RM: int32, row r lists the blocks of a sequence.
        stretches: the spans of the step, in order.
        positions_S: position of each token in its sequence.
        window: keys a query sees, itself included; None sees all.
    """

    def __init__(
        self,
        cache: PagedCache,
        tables_RM: Tensor,
        stretches: list[Stretch],
        *,
        positions_S: Tensor,
        window: int | None,
    ) -> None:
        device = positions_S.device
        counts = torch.tensor([stretch.count for stretch in stretches])
        rows = torch.tensor([stretch.row for stretch in stretches])
        self.cache, self.tables_RM, self.window = cache, tables_RM, window
        self.positions_S = positions_S
        self.rows_S = rows.repeat_interleave(counts).to(device)
        self.slots_S = self._slots(self.rows_S, positions_S)
        self.long = [stretch for stretch in stretches if stretch.count > SHORT]
        is_short_S = (counts <= SHORT).repeat_interleave(counts)
        self.short_S = is_short_S.nonzero()[:, 0].to(device) if self.long else None
        """Which tokens belong to short spans; None means all."""
        self.rows_32 = self._short(self.rows_S).int()
        self.lengths_32 = self._short(positions_S).int() + 1
        self.longest = int(positions_S.max()) + 1

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What differs between steps of equally many tokens that all read from their blocks; the
        tables change in place."""
        return self.slots_S, self.rows_32, self.lengths_32

    def reads_blocks(self, rows: int) -> bool:
        """Whether all of so many rows are tokens that read from their blocks."""
        return not self.long and len(self.positions_S) == rows

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        layer: int,
        pattern: BlockSparse | None = None,
    ) -> Tensor:
        count = len(self.positions_S)
        q_SNH, k_SKH, v_SKH = (x[:count, 0].contiguous() for x in (q_BTNH, k_BTKH, v_BTKH))
        held = self.cache.layers[layer]
        held.store(k_SKH, v_SKH, self.slots_S)
        if self.reads_blocks(len(q_BTNH)):
            return self._from_blocks(q_SNH, held, pattern)[:, None]
        out_BNH = torch.zeros_like(q_BTNH[:, 0])
        if self.short_S is None:
            out_BNH[:count] = self._from_blocks(q_SNH, held, pattern)
        elif len(self.short_S):
            out_BNH[self.short_S] = self._from_blocks(q_SNH[self.short_S], held, pattern)
        for stretch in self.long:
            part = slice(stretch.first, stretch.first + stretch.count)
            out_BNH[part] = self._gathered(q_SNH[part], held, stretch, pattern)
        return out_BNH[:, None]

    def _from_blocks(self, q_SNH: Tensor, held: LayerCache, pattern: BlockSparse | None) -> Tensor:
        """Tokens of short spans, one by one."""
        is_sparse = pattern is not None and self.longest > pattern.reach
        if kernels.ready(q_SNH) and not is_sparse:
            return kernels.paged_attention(
                q_SNH,
                held.keys,
                held.values,
                self.tables_RM,
                self.rows_32,
                self.lengths_32,
                window=self.window,
                key_scales=held.key_scales,
                value_scales=held.value_scales,
            )
        step = max(1, GATHER_ELEMENTS // (self.longest * held.keys[0, 0].numel()))
        parts = [
            self._rows_gathered(q_SNH, held, slice(first, first + step), pattern)
            for first in range(0, len(q_SNH), step)
        ]
        return torch.cat(parts)

    def _rows_gathered(
        self, q_SNH: Tensor, held: LayerCache, part: slice, pattern: BlockSparse | None
    ) -> Tensor:
        """Some tokens, each with the keys of its own sequence, padded to the longest."""
        positions_S = self._short(self.positions_S)[part]
        keys_L = torch.arange(int(positions_S.max()) + 1, device=q_SNH.device)
        # Beyond its own tokens a sequence's slots may hold anything; NaN survives any mask.
        seen_SL = torch.minimum(keys_L, positions_S[:, None])
        k, v = held.read(self._slots(self._short(self.rows_S)[part][:, None], seen_SL), q_SNH.dtype)
        mask = self._mask(positions_S[:, None], keys_L, q_SNH.shape[1], pattern)
        return _attention(q_SNH[part][:, None], k, v, mask)[:, 0]

    def _gathered(
        self, q_TNH: Tensor, held: LayerCache, stretch: Stretch, pattern: BlockSparse | None
    ) -> Tensor:
        """The tokens of one long span together."""
        end = stretch.start + stretch.count
        keys_L = torch.arange(end, device=q_TNH.device)
        rows = torch.full_like(keys_L, stretch.row)
        k, v = held.read(self._slots(rows, keys_L), q_TNH.dtype)
        is_sparse = pattern is not None and end > pattern.reach
        if stretch.start == 0 and self.window is None and not is_sparse:
            return _attention(q_TNH[None], k[None], v[None], None)[0]
        mask = self._mask(keys_L[None, stretch.start :], keys_L, q_TNH.shape[1], pattern)
        return _attention(q_TNH[None], k[None], v[None], mask)[0]

    def _mask(
        self, queries_BT: Tensor, keys_L: Tensor, heads: int, pattern: BlockSparse | None
    ) -> Tensor:
        """Boolean [B, 1 or N, T, L]: which keys a query sees."""
        distance = queries_BT[:, None, :, None] - keys_L
        mask = distance >= 0
        if self.window is not None:
            mask = mask & (distance < self.window)
        if pattern is not None:
            keys_BL = keys_L.expand(len(queries_BT), -1)
            mask = mask & pattern.visible(queries_BT, keys_BL, num_heads=heads)
        return mask

    def _slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        blocks = self.tables_RM[rows, positions // BLOCK_TOKENS].long()
        return blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS

    def _short(self, values_S: Tensor) -> Tensor:
        return values_S if self.short_S is None else values_S[self.short_S]


def _attention(q_BTNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, mask: Tensor | None) -> Tensor:
    """Fused attention, [B, T, N, H]; no mask is a causal one of T = L."""
    return F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BLKH.transpose(1, 2),
        v_BLKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BTNH.shape[2] != k_BLKH.shape[2],
    ).transpose(1, 2)
