"""The paged cache: keys and values of all sequences, in blocks that any of them may hold.

Per layer two tensors [blocks, BLOCK_TOKENS, K, H]; a token's place in them, its slot, is block *
BLOCK_TOKENS + offset. They take memory as they are written to, not when they are made. An int8
cache keeps one float32 scale per token and head beside them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phikit.generate.blocks import BLOCK_TOKENS
from phikit.models.decoder import DecoderConfig
from phikit.nn import kernels


def block_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one block costs over all layers; `dtype` int8 has scales beside."""
    per_head = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    return 2 * config.num_layers * config.num_kv_heads * BLOCK_TOKENS * per_head


class LayerCache(NamedTuple):
    """Keys and values of one layer; scales [blocks, BLOCK_TOKENS, K] if they are int8."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    def store(self, k_SKH: Tensor, v_SKH: Tensor, slots_S: Tensor) -> None:
        """Put the keys and values of some tokens into their slots."""
        if kernels.ready(k_SKH, v_SKH):
            kernels.store(
                k_SKH,
                v_SKH,
                self.keys,
                self.values,
                slots_S,
                key_scales=self.key_scales,
                value_scales=self.value_scales,
            )
            return
        for new, kept, scales in (
            (k_SKH, self.keys, self.key_scales),
            (v_SKH, self.values, self.value_scales),
        ):
            if scales is not None:
                new, scale_SK = to_int8(new)
                scales.flatten(0, 1)[slots_S] = scale_SK
            kept.flatten(0, 1)[slots_S] = new

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values at slots of any shape, [..., K, H] each."""
        pair = []
        for kept, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            read = kept.flatten(0, 1)[slots]
            if scales is not None:
                read = read * scales.flatten(0, 1)[slots][..., None]
            pair.append(read.to(dtype))
        return pair[0], pair[1]

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Copy one block to others."""
        for part in self:
            if part is not None:
                part[list(targets)] = part[source].clone()


def to_int8(x_SKH: Tensor) -> tuple[Tensor, Tensor]:
    """`q * scale` nearest to `x`, one scale per token and head: int8 [S, K, H], float32 [S, K]."""
    scale_SK = x_SKH.float().abs().amax(-1) / 127
    safe = torch.where(scale_SK > 0, scale_SK, 1.0)
    return (x_SKH.float() / safe[..., None]).round_().to(torch.int8), scale_SK


class PagedCache:
    """The blocks of all layers."""

    def __init__(
        self, config: DecoderConfig, *, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (blocks, BLOCK_TOKENS, config.num_kv_heads)

        def layer() -> LayerCache:
            keys, values = (
                torch.empty(*shape, config.head_dim, dtype=dtype, device=device) for _ in "kv"
            )
            if dtype != torch.int8:
                return LayerCache(keys, values, None, None)
            key_scales, value_scales = (torch.empty(shape, device=device) for _ in "kv")
            return LayerCache(keys, values, key_scales, value_scales)

        self.layers = [layer() for _ in range(config.num_layers)]

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """Copy one block to others, in all layers."""
        for layer in self.layers:
            layer.copy(source, targets)
