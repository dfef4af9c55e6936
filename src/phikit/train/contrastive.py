"""Pictures and texts drawn together where they belong together, and apart where they do not.

The sigmoid loss of SigLIP (Zhai et al., 2023, arXiv 2303.15343, equation 1): every pair of an item
and a text is a yes-or-no question of its own, so nothing is normalised over the batch, and the
matrix of pairs may be taken in pieces. Both towers are one decoder: an item's embedding is the
hidden state behind its placeholders, a text's the one behind its last token. So an encoder trained
here starts a media stage as it is (`recipes.media.copy_encoders`).

Unlike the original a batch may hold a text twice: equal texts are positives of each other, since
captions such as "seven" repeat.

Shape suffix beside the common ones: P pairs of a batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phikit.base.config import Config
from phikit.base.device import Rank
from phikit.base.errors import ConfigError, DataError
from phikit.base.types import Batch, Example
from phikit.data.loader import Loader, LoaderState
from phikit.data.pack import batch_rows
from phikit.models.decoder import Decoder
from phikit.train.objective import LossOutput, StepData


class ContrastiveConfig(Config):
    """Shape of the batches, and the start of what is learnt about similarity."""

    pairs_per_step: PositiveInt
    """All of them meet each other, so they are one micro-batch."""
    chunk_pairs: PositiveInt = 1024
    """Columns of the matrix of pairs that are in memory at once."""
    scale: float = 10.0
    bias: float = -10.0
    """Both are learnt; so they start in SigLIP, where most pairs are no match."""


class Pair(NamedTuple):
    """An item as the placeholders that stand for it, and a text that says what it shows."""

    item: Example
    text: Example


def pair_of(example: Example, *, placeholders: Sequence[int]) -> Pair:
    """What an example shows and what it replies; the question between them is left out."""
    is_item = np.isin(example.tokens, placeholders)
    end = example.tokens[-1:]
    item = np.concatenate([example.tokens[is_item], end])
    text = example.tokens[example.loss_mask]
    return Pair(
        Example(item, np.zeros(len(item), np.bool_), example.media),
        Example(text, np.zeros(len(text), np.bool_)),
    )


class Similarity(nn.Module):
    """From two embeddings to the logit that they belong together."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(config.scale)]))
        self.bias = nn.Parameter(torch.tensor([config.bias]))

    def forward(self, a_PD: Tensor, b_PD: Tensor) -> Tensor:
        return self.log_scale.exp() * (a_PD @ b_PD.T) + self.bias


class ContrastiveObjective:
    """The sigmoid loss over all pairs of a step.

    Gives the model a `Similarity`, as the module `similarity`, before its optimiser is made.

    Raises:
        DataError: there are fewer pairs than a step takes.
        ConfigError: several ranks are to share a step, whose pairs must all meet.
    """

    def __init__(
        self,
        model: Decoder,
        pairs: Sequence[Pair],
        config: ContrastiveConfig,
        *,
        seed: int,
        rank: Rank = Rank(),
    ) -> None:
        if rank.size > 1:
            raise ConfigError("the contrastive objective runs in one process", fix="use one rank")
        if len(pairs) < config.pairs_per_step:
            raise DataError(
                f"{len(pairs)} pairs, and a step takes {config.pairs_per_step}",
                fix="give more pairs, or lower pairs_per_step",
            )
        self.pairs, self.config = pairs, config
        self.loader = Loader(len(pairs), seed=seed)
        model.similarity = Similarity(config).to(model.device)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that make one pass over the data."""
        return len(self.pairs) / self.config.pairs_per_step

    def step_data(self, step: int) -> StepData:
        count = self.config.pairs_per_step
        chosen, _ = self.loader.take(LoaderState(step * count), count)
        return StepData([pair_batch([self.pairs[i] for i in chosen])], {})

    def weight(self, batch: Batch) -> float:
        return len(batch.tokens_BT) / 2

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        similarity = model.similarity
        assert isinstance(similarity, Similarity), "made for another model"
        items_PD, texts_PD = embed(model, batch).float().chunk(2)
        labels_P = batch.extras["labels"]
        chunk = self.config.chunk_pairs
        total = sigmoid_loss(items_PD, texts_PD, labels_P, similarity, chunk=chunk)
        recall = recall_at(items_PD.detach(), texts_PD.detach(), labels_P, k=1, chunk=chunk)
        return LossOutput(total, {"recall": torch.tensor(recall * len(labels_P))})


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """A batch of all items, then all texts; equal texts have one label."""
    rows = [pair.item for pair in pairs] + [pair.text for pair in pairs]
    batch = batch_rows([[row] for row in rows])
    known: dict[bytes, int] = {}
    labels = [known.setdefault(pair.text.tokens.tobytes(), len(known)) for pair in pairs]
    extras = {
        "labels": torch.tensor(labels),
        "lasts": torch.tensor([len(row) - 1 for row in rows]),
    }
    return batch._replace(extras=extras)


def embed(model: Decoder, batch: Batch) -> Tensor:
    """Unit vectors [B, D]: the hidden state at the end of each row of a `pair_batch`."""
    hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, media=batch.media)
    rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
    return F.normalize(hidden_BTD[rows, batch.extras["lasts"].to(rows.device)], dim=-1)


def sigmoid_loss(
    a_PD: Tensor, b_PD: Tensor, labels_P: Tensor, similarity: nn.Module, *, chunk: int
) -> Tensor:
    """-log sigmoid(z logit) over all pairs, z being 1 for equal labels and -1 for others.

    Columns are taken `chunk` at a time and computed again for the gradient, so memory grows with
    P x chunk.
    """

    def part(b_CD: Tensor, labels_C: Tensor) -> Tensor:
        sign = torch.where(labels_P[:, None] == labels_C, 1.0, -1.0).to(a_PD.device)
        return -F.logsigmoid(sign * similarity(a_PD, b_CD)).sum()

    parts = zip(b_PD.split(chunk), labels_P.split(chunk), strict=True)
    losses = [checkpoint(part, *each, use_reentrant=False) for each in parts]
    return torch.stack(losses).sum()  # pyright: ignore[reportArgumentType]


def recall_at(a_PD: Tensor, b_PD: Tensor, labels_P: Tensor, *, k: int, chunk: int = 1024) -> float:
    """Share of rows of `a` with an equal label among the `k` most similar rows of `b`.

    Ties count in the order of `b`; recall from texts to items is the same with both swapped. Rows
    of `a` are taken `chunk` at a time, so memory grows with P x chunk.
    """
    nearest = min(k, len(b_PD))
    found = torch.cat([(a_CD @ b_PD.T).topk(nearest, dim=1).indices for a_CD in a_PD.split(chunk)])
    labels_P = labels_P.to(found.device)
    return float((labels_P[found] == labels_P[:, None]).any(1).float().mean())
