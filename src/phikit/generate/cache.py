"""The key/value cache of a batch of prompts, each continued by a group of samples.

Keys and values of a prompt are stored once and read by all its samples; what the samples add goes
into a suffix of their own. Both parts meet in one softmax, so sharing changes no mathematics. The
batch is a grid of P prompts by G samples; when samples end, `keep` drops whole rows or columns.

The suffix grows a block of steps at a time and attention reads all of it, unused steps masked:
batched products over a slice that is not contiguous copy it first, which cost a third of a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.models.decoder import DecoderConfig
from phikit.nn.attention import BlockSparse, CausalAttention

BLOCK_STEPS = 16
"""Steps by which the suffix grows."""


class GroupCache:
    """Per layer a prefix [P, K, S, H] shared by groups and a suffix [P * G, K, capacity, H]."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.prefix: list[tuple[Tensor, Tensor]] = []
        self.suffix: list[tuple[Tensor, Tensor]] = []
        self.lengths_P = torch.empty(0, dtype=torch.long)
        self.group = 0
        self.steps = 0
        self.bias = torch.empty(0)
        self._sparse_biases: dict[BlockSparse, Tensor] = {}

    def fork(self, lengths_P: Tensor, *, group: int) -> None:
        """After the prefill: open an empty suffix for `group` samples of each prompt."""
        self.lengths_P, self.group, self.steps = lengths_P, group, 0
        for keys, _ in self.prefix:
            prompts, kv_heads, _, width = keys.shape
            empty = keys.new_zeros(prompts * group, kv_heads, 0, width)
            self.suffix.append((empty, empty))

    def advance(self) -> None:
        """Make room for one more step and show it to the attention."""
        capacity = self.suffix[0][0].shape[2]
        if self.steps == capacity:
            room = (0, 0, 0, BLOCK_STEPS)
            self.suffix = [(F.pad(k, room), F.pad(v, room)) for k, v in self.suffix]
            capacity += BLOCK_STEPS
        self.steps += 1
        self.bias = self._mask(capacity)
        self._sparse_biases.clear()

    def sparse_bias(self, pattern: BlockSparse) -> Tensor:
        """`bias` and what a pattern hides from each head, [P, 1, K, N / K, S + capacity]."""
        longest, capacity = self.prefix[0][0].shape[2], self.suffix[0][0].shape[2]
        if longest + self.steps <= pattern.reach:
            return self.bias
        if pattern not in self._sparse_biases:
            device, lengths_P1 = self.lengths_P.device, self.lengths_P[:, None]
            prefix_PS = torch.arange(longest, device=device).expand(len(lengths_P1), -1)
            suffix_PS = lengths_P1 + torch.arange(capacity, device=device)
            visible = pattern.visible(
                lengths_P1 + self.steps - 1,
                torch.cat([prefix_PS, suffix_PS], dim=1),
                num_heads=self.config.num_heads,
            )
            by_head = visible[:, :, 0].unflatten(1, (self.config.num_kv_heads, -1))[:, None]
            self._sparse_biases[pattern] = self.bias.masked_fill(~by_head, float("-inf"))
        return self._sparse_biases[pattern]

    def keep(self, grid_PG: Tensor) -> None:
        """Keep cell (p, g) of the grid where `grid_PG` [P', G'] holds its row number p * G + g."""
        prompts = grid_PG[:, 0] // self.group
        rows = grid_PG.flatten()
        self.prefix = [(k[prompts], v[prompts]) for k, v in self.prefix]
        self.suffix = [(k[rows], v[rows]) for k, v in self.suffix]
        self.lengths_P, self.group = self.lengths_P[prompts], grid_PG.shape[1]

    def replace(self, prompt: int, rows: slice, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Put in keys and values of whole sequences, [rows, K, prompt + steps, H] per layer."""
        length = int(self.lengths_P[prompt])
        for prefix, suffix, new in zip(self.prefix, self.suffix, layers, strict=True):
            for shared, own, whole in zip(prefix, suffix, new, strict=True):
                shared[prompt, :, :length] = whole[0, :, :length]
                own[rows, :, : self.steps] = whole[:, :, length:]

    def _mask(self, capacity: int) -> Tensor:
        """Additive mask [P, 1, 1, 1, S + capacity]: padding, unused steps, keys out of window."""
        device, longest = self.lengths_P.device, self.prefix[0][0].shape[2]
        positions_S = torch.arange(longest, device=device)
        steps_S = torch.arange(capacity, device=device)
        hidden_PS = positions_S >= self.lengths_P[:, None]
        hidden_S = steps_S >= self.steps
        window = self.config.sliding_window
        if window is not None:
            hidden_PS = hidden_PS | (positions_S < (self.lengths_P + self.steps - window)[:, None])
            hidden_S = hidden_S | (steps_S < self.steps - window)
        hidden = torch.cat([hidden_PS, hidden_S.expand(len(hidden_PS), -1)], dim=1)
        bias = torch.zeros(hidden.shape, dtype=self.prefix[0][0].dtype, device=device)
        return bias.masked_fill_(hidden, float("-inf"))[:, None, None, None]


class Prefill(CausalAttention):
    """Causal attention over right-padded prompts that leaves their keys and values in a cache."""

    def __init__(self, cache: GroupCache) -> None:
        super().__init__(window=cache.config.sliding_window)
        self.cache = cache

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        layer: int,
        pattern: BlockSparse | None = None,
    ) -> Tensor:
        k, v = k_BTKH.transpose(1, 2).contiguous(), v_BTKH.transpose(1, 2).contiguous()
        self.cache.prefix.append((k, v))
        return super().__call__(q_BTNH, k_BTKH, v_BTKH, layer=layer, pattern=pattern)


class Decode:
    """One new token per sample attends to its prompt and to what the sample has added."""

    def __init__(self, cache: GroupCache) -> None:
        self.cache = cache

    def __call__(
        self,
        q_BTNH: Tensor,
        k_BTKH: Tensor,
        v_BTKH: Tensor,
        *,
        layer: int,
        pattern: BlockSparse | None = None,
    ) -> Tensor:
        cache = self.cache
        rows, _, heads, width = q_BTNH.shape
        kv_heads = k_BTKH.shape[2]
        prefix_k, prefix_v = cache.prefix[layer]
        suffix_k, suffix_v = cache.suffix[layer]
        suffix_k[:, :, cache.steps - 1] = k_BTKH[:, 0]
        suffix_v[:, :, cache.steps - 1] = v_BTKH[:, 0]
        prompts, _, length, _ = prefix_k.shape
        capacity = suffix_k.shape[2]

        grid = (prompts, cache.group, kv_heads, heads // kv_heads)
        q = q_BTNH.view(*grid, width) * width**-0.5
        q_shared = q.transpose(1, 2).reshape(prompts * kv_heads, -1, width)
        q_own = q.view(rows * kv_heads, -1, width)
        to_prefix = torch.bmm(q_shared, prefix_k.flatten(0, 1).transpose(1, 2))
        to_own = torch.bmm(q_own, suffix_k.flatten(0, 1).transpose(1, 2))
        by_prompt = (prompts, kv_heads, cache.group, grid[3])
        scores = torch.cat(
            [to_prefix.view(*by_prompt, length).transpose(1, 2), to_own.view(*grid, capacity)], -1
        )
        bias = cache.bias if pattern is None else cache.sparse_bias(pattern)
        weights = scores.add_(bias).softmax(-1)
        on_prefix, on_own = weights.split([length, capacity], dim=-1)
        on_prefix = on_prefix.transpose(1, 2).reshape(prompts * kv_heads, -1, length)
        from_prefix = torch.bmm(on_prefix, prefix_v.flatten(0, 1)).view(*by_prompt, width)
        on_own = on_own.reshape(rows * kv_heads, -1, capacity)
        from_own = torch.bmm(on_own, suffix_v.flatten(0, 1)).view(*grid, width)
        return from_own.add_(from_prefix.transpose(1, 2)).view(rows, 1, heads, width)
