"""Supervised fine-tuning on rows with pictures and speech: the loss is on the replies alone.

Three things differ from `sft`. A step's rows are of similar length: clips differ tenfold, and a
long one would pad all of its neighbours. Clips are masked anew each time they are heard
(SpecAugment), as a function of seed, step and place in the step, so that a resumed run masks what
an unbroken one does. And rows of text make batches of their own: while the text model is frozen
they teach nothing, and the loop spares them the backward pass.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from phikit.base.device import Rank
from phikit.base.media import SPEECH, of_items
from phikit.base.types import Example
from phikit.data.media.augment import SpecAugmentConfig, spec_augment
from phikit.data.media.problem import length_buckets
from phikit.data.pack import batch_rows
from phikit.train.objective import StepData
from phikit.train.sft import SFTConfig, SFTObjective


class MediaSFTConfig(SFTConfig):
    """Shape of the batches, and how clips are masked."""

    bucket_steps: PositiveInt = 8
    """Rows of so many steps are sorted by length and cut into steps; 1 mixes all lengths."""
    spec_augment: SpecAugmentConfig | None = None
    """None hears every clip as it is."""


class MediaSFTObjective(SFTObjective):
    """Cross-entropy on the replies of examples with media, in steps of similar length."""

    def __init__(
        self,
        examples: Sequence[Example],
        config: MediaSFTConfig,
        *,
        seed: int,
        rank: Rank = Rank(),
    ) -> None:
        super().__init__(examples, config, seed=seed, rank=rank)
        self.media_config, self.seed, self.rank = config, seed, rank
        self._epoch, self._steps = -1, list[NDArray[np.int64]]()

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that make one pass over the data; the last may be smaller."""
        return -(-len(self.examples) // self.config.examples_per_step)

    def step_data(self, step: int) -> StepData:
        size = self.config.micro_examples
        rows = [
            self._augmented(self.examples[i], step, place)
            for place, i in enumerate(self._chosen(step))
            if place % self.rank.size == self.rank.index
        ]
        rows.sort(key=len)
        with_media = [row for row in rows if row.modalities]
        text = [row for row in rows if not row.modalities]
        # Rows of one adapter lie together, sight leading those of both: none is gathered for it.
        batches = [
            batch_rows([[row] for row in sorted(alike[k : k + size], key=lambda e: e.modalities)])
            for alike in (with_media, text)
            for k in range(0, len(alike), size)
        ]
        return StepData(batches, {})

    def _chosen(self, step: int) -> NDArray[np.int64]:
        """The rows of a step; every epoch has its own order, and its last step may be smaller."""
        size = self.config.examples_per_step
        epoch, index = divmod(step, int(self.steps_per_epoch))
        if epoch != self._epoch:
            self._epoch, self._steps = (
                epoch,
                length_buckets(
                    [len(example) for example in self.examples],
                    size=size,
                    window=self.media_config.bucket_steps,
                    seed=int(np.random.default_rng([self.seed, epoch]).integers(1 << 31)),
                ),
            )
        return self._steps[index]

    def _augmented(self, example: Example, step: int, place: int) -> Example:
        config, items = self.media_config.spec_augment, example.media and example.media.items
        if config is None or not items or SPEECH not in items:
            return example
        random = np.random.default_rng([self.seed, step, place])
        clips = tuple(spec_augment(clip, config, random=random) for clip in items[SPEECH])
        return replace(example, media=of_items({**items, SPEECH: clips}))
