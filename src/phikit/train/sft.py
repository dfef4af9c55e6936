"""Supervised fine-tuning: one conversation a row, loss on the replies alone.

Unlike packed mid-training every row ends with its reply, so the model learns where to stop
(Phi-4-Mini-Reasoning, arXiv 2504.21233, section 3).
"""

from collections.abc import Sequence

from pydantic import PositiveInt

from phikit.base.config import Config
from phikit.base.device import Rank
from phikit.base.errors import DataError
from phikit.base.types import IGNORE, Batch, Example
from phikit.data.loader import Loader, LoaderState
from phikit.data.pack import batch_rows
from phikit.models.decoder import Decoder
from phikit.train.lm import cross_entropy
from phikit.train.objective import LossOutput, StepData


class SFTConfig(Config):
    """Shape of the unpacked batches."""

    examples_per_step: PositiveInt
    micro_examples: PositiveInt
    """Examples of one forward pass; smaller needs less memory and changes no result."""


class SFTObjective:
    """Cross-entropy on the masked tokens of unpacked examples."""

    def __init__(
        self, examples: Sequence[Example], config: SFTConfig, *, seed: int, rank: Rank = Rank()
    ) -> None:
        unlearnt = [i for i, example in enumerate(examples) if not example.loss_mask[1:].any()]
        if unlearnt:
            raise DataError(
                f"{len(unlearnt)} of {len(examples)} examples have no reply to learn, "
                f"the first is number {unlearnt[0]}",
                fix="every conversation needs an assistant message",
            )
        self.config, self.examples = config, examples
        self.loader = Loader(len(examples), seed=seed, rank=rank)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that make one pass over the data."""
        return len(self.examples) / self.config.examples_per_step

    def step_data(self, step: int) -> StepData:
        config = self.config
        state = LoaderState(step * config.examples_per_step)
        chosen, _ = self.loader.take(state, config.examples_per_step)
        by_length = sorted((self.examples[i] for i in chosen), key=len)
        batches = [
            batch_rows([[example] for example in by_length[k : k + config.micro_examples]])
            for k in range(0, len(by_length), config.micro_examples)
        ]
        return StepData(batches, {})

    def weight(self, batch: Batch) -> float:
        return float((batch.targets_BT != IGNORE).sum())

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        return cross_entropy(model, batch)
