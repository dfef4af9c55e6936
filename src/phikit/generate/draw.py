"""The next tokens of many sequences, drawn together from one call of the head."""

from typing import NamedTuple

import torch
from torch import Tensor

from phikit.generate.sample import Sampling, penalise, sample, stream_ids, top_log_probs
from phikit.generate.sequence import Sequence
from phikit.models.decoder import Decoder
from phikit.nn.linear import padded_rows

LOGITS = 1 << 25
"""Logits held at a time, in numbers."""


class Draw(NamedTuple):
    """A sequence that is due, and where its last hidden state is."""

    sequence: Sequence
    last: int
    """Row of the hidden state of its last token; those of its drafts follow."""
    drafts: list[int]
    allowed_V: Tensor | None = None
    """What the sequence's constraint lets it say, bool."""


class Drawn(NamedTuple):
    """A token that was drawn."""

    token: int
    log_prob: float
    top: list[tuple[int, float]]


def draw(model: Decoder, draws: list[Draw], hidden_SD: Tensor) -> list[list[Drawn]]:
    """For each draw one token, and one more after each of its drafts, as if that were right."""
    rows = [(d, place) for d in draws for place in range(len(d.drafts) + 1)]
    step = max(1, LOGITS // model.config.vocab_size)
    drawn = iter(
        [
            each
            for first in range(0, len(rows), step)
            for each in _draw_rows(model, rows[first : first + step], hidden_SD)
        ]
    )
    return [[next(drawn) for _ in range(len(d.drafts) + 1)] for d in draws]


def _draw_rows(model: Decoder, rows: list[tuple[Draw, int]], hidden_SD: Tensor) -> list[Drawn]:
    device = hidden_SD.device
    places = [d.last + place for d, place in rows]
    padding = padded_rows(len(places), device) - len(places)
    index = torch.tensor(places + places[:1] * padding, device=device)
    logits_RV = model.logits(hidden_SD[index])[: len(places)].float()
    for row, (each, place) in enumerate(rows):
        sequence = each.sequence
        penalty = sequence.request.repetition_penalty
        if penalty != 1.0:
            seen = {*sequence.tokens, *each.drafts[:place]}
            said = [id_ for id_ in seen if id_ < logits_RV.shape[1]]  # placeholders may lie beyond
            ids = torch.tensor(said, device=device)
            penalise(logits_RV, row=row, seen_ids=ids, penalty=penalty)
        if each.allowed_V is not None:
            logits_RV[row].masked_fill_(~each.allowed_V.to(device), float("-inf"))
    sampling, steps_R = _sampling(rows, device)
    ids_R, log_probs_R = sample(logits_RV, sampling, steps_R=steps_R)
    tops = _tops(rows, logits_RV, sampling.temperature)
    return [
        Drawn(token, log_prob, top)
        for token, log_prob, top in zip(ids_R.tolist(), log_probs_R.tolist(), tops, strict=True)
    ]


def _sampling(rows: list[tuple[Draw, int]], device: torch.device) -> tuple[Sampling, Tensor]:
    """Parameters of the rows, and how many tokens each has drawn before, int64 [R]."""
    requests = [d.sequence.request for d, _ in rows]
    column = lambda values, dtype: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
    sampling = Sampling(
        temperature=column([r.temperature for r in requests], torch.float32),
        top_k=column([r.top_k or 0 for r in requests], torch.long),
        top_p=column([1.0 if r.top_p is None else r.top_p for r in requests], torch.float32),
        min_p=column([r.min_p or 0.0 for r in requests], torch.float32),
        streams=stream_ids(
            column([r.seed for r in requests], torch.long),
            column([d.sequence.number for d, _ in rows], torch.long),
        ),
    )
    return sampling, column([d.sequence.said + place for d, place in rows], torch.long)


def _tops(
    rows: list[tuple[Draw, int]], logits_RV: Tensor, temperature_R: Tensor
) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of the rows whose requests ask for them."""
    tops: list[list[tuple[int, float]]] = [[] for _ in rows]
    counts = [d.sequence.request.top_log_probs for d, _ in rows]
    asking = [row for row, count in enumerate(counts) if count]
    if asking:
        index = torch.tensor(asking, device=logits_RV.device)
        most = max(counts)
        values, ids = top_log_probs(logits_RV[index], temperature_R[index], k=most)
        for row, row_ids, row_values in zip(asking, ids.tolist(), values.tolist(), strict=True):
            pairs = zip(row_ids, row_values, strict=True)
            tops[row] = list(pairs)[: counts[row]]
    return tops
