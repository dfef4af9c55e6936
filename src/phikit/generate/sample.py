"""Drawing tokens: counter-based random numbers, and a sampler that hardly ever sorts a vocabulary.

Every number is a pure function of (seed, sample, step), and every row is computed by operations
that do not mix rows, in an order of additions that does not depend on how many there are. So a
sample is the same bit for bit whatever else is in the batch, and resuming needs no generator state.

What is unusual: a row of logits is cut into blocks of 64. The greatest logit of each block finds
the likeliest ids, and the sum of each block finds the drawn one, without a look at the rest. What
top-k, top-p and min-p keep is told by one number, the least logit kept; ids equal to it stay.
For 64 rows of 49,152 `torch.multinomial` takes the time of 25 softmaxes and a sort that of 75; this
takes 2 to 3, with top-k or top-p 4 to 8 (`benchmarks/sampler.py`).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Entries per block of a row, the dimension J."""

CANDIDATES = 64
"""How many of the likeliest ids are searched at first for where top-p cuts."""

SORTED = 1 << 16
"""Entries sorted at a time, which should lie in the processor's cache."""


class Sampling(NamedTuple):
    """Per-row sampling parameters, each [R]. Temperature 0 is greedy."""

    temperature: Tensor
    top_k: Tensor
    """0 keeps all."""
    top_p: Tensor
    """1 keeps all."""
    min_p: Tensor
    """Keep ids at least this share as likely as the likeliest (Nguyen et al., 2024, "Turning Up
    the Heat"); 0 keeps all."""
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


def uniform(streams: Tensor, steps: Tensor) -> Tensor:
    """For each stream the number in [0, 1) of its step, float64 [R]."""
    bits = _mix(streams + (steps + 1) * (0x9E3779B97F4A7C15 - (1 << 64)))
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def sample(logits_RV: Tensor, sampling: Sampling, *, steps_R: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one id per row.

    Where several cuts are asked for, top-p takes its share of what top-k has left, and min-p
    compares with the likeliest of all, as in transformers.

    Args:
        logits_RV: at least one entry of each row is finite, none is NaN or +inf.
        steps_R: how many ids each row has drawn before, int64.

    Returns:
        ids [R], and their log-probabilities [R] under the temperature-scaled distribution before
        it is cut (float32, nats; greedy rows count as temperature 1).
    """
    is_greedy = sampling.temperature == 0
    sampling = sampling._replace(temperature=torch.where(is_greedy, 1.0, sampling.temperature))
    row = _Rows.of(logits_RV, sampling.temperature)
    log_norm_R = row.sums_RN.sum(-1).log()
    block = row.peaks_RN.argmax(-1)
    ids = block * BLOCK + _pick(row.logits_RNJ, block).argmax(-1)
    if not bool(is_greedy.all()):
        _cut(row, sampling, is_greedy)
        drawn = inverse_cdf(
            row.weights_RNJ, uniform(sampling.streams, steps_R), sums_RN=row.sums_RN
        )
        ids = torch.where(is_greedy, ids, drawn).clamp_(max=logits_RV.shape[-1] - 1)
    drawn_R = logits_RV.gather(-1, ids[:, None])[:, 0].float()
    return ids, (drawn_R - row.best_R) / sampling.temperature - log_norm_R.float()


def top_log_probs(logits_RV: Tensor, temperature_R: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k likeliest ids, and these ids: both [R, k], likeliest first.

    They are of the distribution that `sample` takes its log-probabilities from. Of equally likely
    ids the lowest comes first.
    """
    temperature_R = torch.where(temperature_R == 0, 1.0, temperature_R)
    row = _Rows.of(logits_RV, temperature_R)
    # One integer orders by logit and then by id: the bits of a float32 order its absolute value.
    bits = logits_RV.float().contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    ids = torch.arange(logits_RV.shape[-1] - 1, -1, -1, device=logits_RV.device)
    ids_Rk = ((ordered << 32) | ids).topk(k, dim=-1).indices
    shifted_Rk = logits_RV.gather(-1, ids_Rk).float() - row.best_R[:, None]
    log_norm_R = row.sums_RN.sum(-1).log().float()
    return shifted_Rk / temperature_R[:, None] - log_norm_R[:, None], ids_Rk


def penalise(logits_RV: Tensor, *, row: int, seen_ids: Tensor, penalty: float) -> None:
    """Make ids of a row less likely, in place: positive logits divided, negative multiplied.

    Source: CTRL (Keskar et al., 2019), section 4.1, as transformers applies it.
    """
    seen = logits_RV[row, seen_ids]
    logits_RV[row, seen_ids] = torch.where(seen > 0, seen / penalty, seen * penalty)


class _Rows(NamedTuple):
    """Rows of logits in blocks, and the distributions they stand for."""

    logits_RNJ: Tensor
    peaks_RN: Tensor
    """The greatest logit of each block."""
    best_R: Tensor
    weights_RNJ: Tensor
    """Probabilities, times a factor that makes the likeliest id's 1."""
    sums_RN: Tensor
    """Their sums, float64. The blocks are summed in float32: what that loses is less than what
    float32 logits have lost before."""

    @classmethod
    def of(cls, logits_RV: Tensor, temperature_R: Tensor) -> "_Rows":
        logits_RNJ = in_blocks(logits_RV.float(), fill=float("-inf"))
        peaks_RN = logits_RNJ.amax(-1)
        best_R = peaks_RN.amax(-1)
        weights_RNJ = logits_RNJ - best_R[:, None, None]
        if not bool((temperature_R == 1).all()):
            weights_RNJ /= temperature_R[:, None, None]
        weights_RNJ.exp_()
        return cls(logits_RNJ, peaks_RN, best_R, weights_RNJ, weights_RNJ.sum(-1).double())


def in_blocks(x_RV: Tensor, *, fill: float) -> Tensor:
    """The rows cut into blocks, [R, N, J]; the last block is filled up."""
    padding = -x_RV.shape[-1] % BLOCK
    if padding:
        x_RV = torch.nn.functional.pad(x_RV, (0, padding), value=fill)
    return x_RV.reshape(len(x_RV), -1, BLOCK)


def inverse_cdf(weights_RNJ: Tensor, u_R: Tensor, *, sums_RN: Tensor) -> Tensor:
    """The id at which the running sum of weights, any scale, first exceeds u times the total.

    Args:
        sums_RN: the sum of each block, float64; a block is left out if its sum is set to 0.
    """
    running_RN = sums_RN.cumsum(-1)
    target_R = u_R * running_RN[:, -1]
    block = _first_beyond(running_RN, target_R)
    before_R = torch.where(block > 0, _pick(running_RN, (block - 1).clamp_(min=0)), 0.0)
    inside_RJ = _pick(weights_RNJ, block).cumsum(-1, dtype=torch.float64)
    return block * BLOCK + _first_beyond(inside_RJ, target_R - before_R)


def _first_beyond(running_RN: Tensor, target_R: Tensor) -> Tensor:
    """Where a running sum first exceeds the target, or reaches its end: no place that adds 0."""
    end_R = running_RN[:, -1]
    target_R = torch.minimum(target_R, torch.nextafter(end_R, torch.zeros_like(end_R)))
    found = torch.searchsorted(running_RN, target_R[:, None], right=True)[:, 0]
    return found.clamp_(max=running_RN.shape[-1] - 1)


def _pick(x_RN: Tensor, place_R: Tensor) -> Tensor:
    """One entry, or one block, of each row."""
    return x_RN[torch.arange(len(x_RN), device=x_RN.device), place_R]


def _cut(row: _Rows, sampling: Sampling, is_greedy: Tensor) -> None:
    """Take away the weights of the ids that top-k, top-p and min-p do not keep, in place."""
    is_cut = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    rows = (is_cut & ~is_greedy).nonzero()[:, 0]
    if not len(rows):
        return
    floor_R = _floors(row, sampling, rows)
    number, block = (row.peaks_RN[rows] >= floor_R[:, None]).nonzero(as_tuple=True)
    places = rows[number] * row.peaks_RN.shape[1] + block
    is_kept = row.logits_RNJ.flatten(0, 1)[places] >= floor_R[number, None]
    weights = row.weights_RNJ.flatten(0, 1)[places] * is_kept
    row.weights_RNJ.flatten(0, 1)[places] = weights
    row.sums_RN[rows] = 0.0
    row.sums_RN.flatten()[places] = weights.sum(-1).double()


def _floors(row: _Rows, sampling: Sampling, rows: Tensor) -> Tensor:
    """The least logit that each of the rows keeps.

    Only where the likeliest ids do not reach top-p is the whole row sorted. Which way was taken
    does not change the result.
    """
    sampling = sampling.rows(rows)
    floor_R = row.best_R[rows] + sampling.temperature * sampling.min_p.log()
    narrowed = ((sampling.top_k > 0) | (sampling.top_p < 1)).nonzero()[:, 0]
    if not len(narrowed):
        return floor_R
    few, every = max(CANDIDATES, int(sampling.top_k.max())), row.weights_RNJ[0].numel()
    floor, is_sure = _nucleus(row, sampling.rows(narrowed), rows[narrowed], width=few)
    for index in (~is_sure).nonzero()[:, 0].split(max(1, SORTED // every)):
        part = narrowed[index]
        floor[index], _ = _nucleus(row, sampling.rows(part), rows[part], width=every)
    floor_R[narrowed] = torch.maximum(floor_R[narrowed], floor)
    return floor_R


def _nucleus(row: _Rows, sampling: Sampling, rows: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
    """The least logit that top-k and top-p keep, and whether it is sure to be among the `width`
    greatest, which are all that is looked at."""
    logits_RC = _greatest(row, rows, width)
    shifted_RC = logits_RC - row.best_R[rows, None]
    weights_RC = (shifted_RC / sampling.temperature[:, None]).exp().double()
    running_RC = weights_RC.cumsum(-1)
    width = logits_RC.shape[1]
    has_k = sampling.top_k > 0
    most_R = torch.where(has_k, sampling.top_k.clamp(max=width), width)
    whole_R = torch.where(has_k, _pick(running_RC, most_R - 1), row.sums_RN[rows].sum(-1))
    share_R = torch.where(sampling.top_p < 1, sampling.top_p.double(), float("inf")) * whole_R
    inside_R = ((running_RC - weights_RC) < share_R[:, None]).sum(-1).clamp_(min=1)
    floor_R = _pick(logits_RC, torch.minimum(inside_R, most_R) - 1)
    is_sure = has_k | (running_RC[:, -1] >= share_R)
    return floor_R, is_sure | (width == row.weights_RNJ[0].numel())


def _greatest(row: _Rows, rows: Tensor, width: int) -> Tensor:
    """The `width` greatest logits of the rows in falling order, or all if there are fewer.

    The n greatest lie in the n blocks with the greatest peaks. Where these are all blocks, NumPy's
    vectorised sort takes a twentieth of the time of torch's, and no longer than `topk`.
    """
    blocks = row.peaks_RN.shape[1]
    if width < blocks:
        fullest = row.peaks_RN[rows].topk(width, sorted=False).indices
        places = (rows[:, None] * blocks + fullest).flatten()
        found = row.logits_RNJ.flatten(0, 1).index_select(0, places).view(len(rows), -1)
        return found.topk(width).values
    logits_RV = row.logits_RNJ[rows].flatten(1)
    if logits_RV.is_cpu:
        return torch.from_numpy(np.sort(logits_RV.numpy())).flip(-1)[:, :width]
    return logits_RV.sort(-1, descending=True).values[:, :width]
