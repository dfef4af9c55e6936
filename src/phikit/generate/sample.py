"""Drawing tokens: counter-based random numbers and a fast inverse-CDF sampler.

Every number is a pure function of (seed, sample, step), so a sample does not depend on its
neighbours in the batch, and resuming needs no generator state. `torch.multinomial` over a large
vocabulary costs ten times the softmax on CPU; the inverse CDF over blocks costs about as much as
the softmax (`benchmarks/sampler.py`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
"""Entries per block of the two-level inverse CDF."""


class Sampling(NamedTuple):
    """Per-row sampling parameters, each [R]. Temperature 0 is greedy."""

    temperature: Tensor
    top_k: Tensor
    """0 keeps all."""
    top_p: Tensor
    """1 keeps all."""
    streams: Tensor
    """int64 identity of each row's random stream."""

    def rows(self, index: Tensor) -> "Sampling":
        return Sampling(*(part[index] for part in self))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014) on int64, with logical shifts."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def stream_ids(seeds: Tensor, samples: Tensor) -> Tensor:
    """The identity of stream (seed, sample), int64 [R]."""
    return _mix(_mix(seeds) + samples)


def uniform(streams: Tensor, step: int) -> Tensor:
    """The `step`-th number in [0, 1) of each stream, float64 [R]."""
    counter = (step + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
    bits = _mix(streams + (counter - (1 << 64) if counter >> 63 else counter))
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def sample(logits_RV: Tensor, sampling: Sampling, *, step: int) -> tuple[Tensor, Tensor]:
    """Draw one id per row; returns ids [R] and their log-probabilities [R] (float32, nats)."""
    logits_RV = logits_RV.float()
    is_greedy = sampling.temperature == 0
    scaled = logits_RV / torch.where(is_greedy, 1.0, sampling.temperature)[:, None]
    log_norm = scaled.logsumexp(-1, keepdim=True)
    if bool(is_greedy.all()):
        ids = scaled.argmax(-1)
    else:
        weights = torch.exp(_truncate(scaled, sampling) - log_norm)
        drawn = inverse_cdf(weights, uniform(sampling.streams, step))
        ids = torch.where(is_greedy, scaled.argmax(-1), drawn)
    return ids, (scaled.gather(-1, ids[:, None]) - log_norm)[:, 0]


def _truncate(scaled_RV: Tensor, sampling: Sampling) -> Tensor:
    """Set entries outside top-k and top-p to -inf; the most likely entry always stays.

    Top-p takes its share of what top-k has left, as transformers and vLLM do.
    """
    cut_k, cut_p = bool((sampling.top_k > 0).any()), bool((sampling.top_p < 1).any())
    if not (cut_k or cut_p):
        return scaled_RV
    ordered = scaled_RV.sort(-1, descending=True).values
    rank = torch.arange(scaled_RV.shape[-1], device=scaled_RV.device)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if cut_k:
        keep &= (rank < sampling.top_k[:, None]) | (sampling.top_k == 0)[:, None]
    if cut_p:
        probs = ordered.masked_fill(~keep, float("-inf")).softmax(-1)
        keep &= (probs.cumsum(-1) - probs < sampling.top_p[:, None]) | (rank == 0)
    floor = ordered.masked_fill(~keep, float("inf")).min(-1, keepdim=True).values
    return scaled_RV.masked_fill(scaled_RV < floor, float("-inf"))


def inverse_cdf(weights_RV: Tensor, u_R: Tensor) -> Tensor:
    """The id at which the running sum of weights, any scale, first exceeds u times the total."""
    rows, vocabulary = weights_RV.shape
    padding = -vocabulary % BLOCK
    if padding:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, padding))
    blocks = weights_RV.view(rows, -1, BLOCK)
    running = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = (u_R * running[:, -1])[:, None]
    block = torch.searchsorted(running, target, right=True).clamp_(max=running.shape[1] - 1)
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=block.device), block[:, 0]]
    running = inside.cumsum(-1, dtype=torch.float64)
    offset = torch.searchsorted(running, target - before, right=True).clamp_(max=BLOCK - 1)
    last = (inside > 0).long().mul_(torch.arange(BLOCK, device=block.device)).amax(-1)
    return block[:, 0] * BLOCK + torch.minimum(offset[:, 0], last)
