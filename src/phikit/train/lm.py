"""Next-token prediction on packed rows: pre-training and mid-training."""

from collections.abc import Sequence

from pydantic import PositiveInt

from phikit.base.config import Config
from phikit.base.device import Rank
from phikit.base.types import IGNORE, Batch, Example
from phikit.data.loader import Loader, LoaderState
from phikit.data.pack import batch_rows, pack, split_long
from phikit.models.decoder import Decoder
from phikit.nn.attention import CausalAttention
from phikit.nn.losses import linear_cross_entropy
from phikit.train.objective import LossOutput, StepData


class LMConfig(Config):
    """Shape of the packed batches."""

    row_tokens: PositiveInt
    """Length of a packed row."""
    rows_per_step: PositiveInt
    micro_rows: PositiveInt
    """Rows of one forward pass; smaller needs less memory and changes no result."""


class LMObjective:
    """Cross-entropy on every token of packed documents."""

    def __init__(
        self, examples: Sequence[Example], config: LMConfig, *, seed: int, rank: Rank = Rank()
    ) -> None:
        self.config = config
        self.rows = pack(split_long(examples, config.row_tokens), length=config.row_tokens)
        self.loader = Loader(len(self.rows), seed=seed, rank=rank)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that make one pass over the data."""
        return len(self.rows) / self.config.rows_per_step

    def step_data(self, step: int) -> StepData:
        config = self.config
        state = LoaderState(step * config.rows_per_step)
        rows, _ = self.loader.take(state, config.rows_per_step)
        batches = [
            batch_rows(
                [self.rows[i] for i in rows[k : k + config.micro_rows]], length=config.row_tokens
            )
            for k in range(0, len(rows), config.micro_rows)
        ]
        return StepData(batches, {})

    def weight(self, batch: Batch) -> float:
        return float((batch.targets_BT != IGNORE).sum())

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        return cross_entropy(model, batch)


def cross_entropy(model: Decoder, batch: Batch) -> LossOutput:
    """Negative log-likelihood of the batch's targets in nats, summed."""
    hidden_BTD = model.hidden(
        batch.tokens_BT,
        positions_BT=batch.positions_BT,
        attend=CausalAttention(batch.documents_BT, window=model.config.sliding_window),
        media=batch.media,
    )
    learnt = batch.targets_BT != IGNORE
    nll_N = linear_cross_entropy(
        hidden_BTD[learnt],
        model.lm_head.weight,
        batch.targets_BT[learnt],
        bias_V=model.logit_bias,
    )
    return LossOutput(nll_N.sum(), {})
