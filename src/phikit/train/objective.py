"""What an objective is: where a step's batches come from, and the loss of one."""

from typing import NamedTuple, Protocol

from torch import Tensor

from phikit.base.types import Batch
from phikit.models.decoder import Decoder


class StepData(NamedTuple):
    """What one optimiser step trains on."""

    batches: list[Batch]
    """Micro-batches of this rank; may be empty when nothing was worth training on."""
    metrics: dict[str, float]
    """Facts about how they came about (rewards, lengths), for the log."""


class LossOutput(NamedTuple):
    """Sums over a batch; the loop divides by the weight of the whole step."""

    total: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """One training objective. All randomness is a function of the step, never of hidden state."""

    def step_data(self, step: int) -> StepData:
        """The micro-batches of optimiser step `step`."""
        ...

    def weight(self, batch: Batch) -> float:
        """The batch's share of the normaliser: its supervised tokens, or its pairs."""
        ...

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """The loss summed over the batch, not yet normalised."""
        ...
