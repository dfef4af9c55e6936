"""Direct preference optimisation (Rafailov et al., 2023) on pairs of rollouts.

Phi-4-Mini-Reasoning's third step prefers correct rollouts to wrong ones of the same question. Here
the pairs are chosen closest in length, so that the preference says nothing about length, and a
small likelihood term on the chosen reply keeps its probability from sinking together with the
rejected one's (measured in `docs/log.md`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from phikit.base.config import Config
from phikit.base.device import Rank
from phikit.base.types import IGNORE, Batch, Example
from phikit.data.loader import Loader, LoaderState
from phikit.data.pack import batch_rows
from phikit.models.decoder import Decoder
from phikit.nn.attention import CausalAttention
from phikit.nn.losses import token_log_probs
from phikit.train.objective import LossOutput, StepData


class DPOConfig(Config):
    """Constants of the loss and shape of the batches. The paper gives no beta."""

    beta: float = 0.1
    nll_weight: float = 0.2
    """Weight of the chosen reply's mean negative log-likelihood; 0 is plain DPO."""
    pairs_per_step: PositiveInt
    micro_pairs: PositiveInt


class Pair(NamedTuple):
    """Two replies to one question, the better first, and their reference log-probabilities."""

    chosen: Example
    rejected: Example
    reference_chosen: float
    reference_rejected: float


class Rollout(NamedTuple):
    """One sampled reply to a question, as a training example."""

    example: Example
    is_correct: bool
    is_finished: bool


def match_rollouts(
    groups: Sequence[Sequence[Rollout]], *, max_pairs: int
) -> list[tuple[Example, Example]]:
    """(chosen, rejected) per question: at most `max_pairs`, closest in length, no rollout twice.

    A rejected rollout must have stopped by itself: otherwise the lesson would be about stopping.
    """
    pairs = []
    for group in groups:
        right = [r.example for r in group if r.is_correct]
        wrong = [r.example for r in group if not r.is_correct and r.is_finished]
        candidates = sorted(
            (abs(len(a) - len(b)), i, j) for i, a in enumerate(right) for j, b in enumerate(wrong)
        )
        used_right: set[int] = set()
        used_wrong: set[int] = set()
        for _, i, j in candidates:
            if len(used_right) == max_pairs:
                break
            if i not in used_right and j not in used_wrong:
                used_right.add(i)
                used_wrong.add(j)
                pairs.append((right[i], wrong[j]))
    return pairs


def sequence_log_probs(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-probability [B] of each row's targets, in nats, and their number [B]."""
    hidden_BTD = model.hidden(
        batch.tokens_BT,
        positions_BT=batch.positions_BT,
        attend=CausalAttention(batch.documents_BT, window=model.config.sliding_window),
    )
    learnt = batch.targets_BT != IGNORE
    log_probs_N = token_log_probs(
        hidden_BTD[learnt],
        model.lm_head.weight,
        batch.targets_BT[learnt],
        bias_V=model.logit_bias,
    )
    rows = learnt.nonzero()[:, 0]
    sums = log_probs_N.new_zeros(len(learnt)).index_add(0, rows, log_probs_N)
    return sums, learnt.sum(1)


def add_reference(
    model: Decoder, pairs: Sequence[tuple[Example, Example]], *, micro_pairs: int
) -> list[Pair]:
    """Pairs with the log-probabilities that `model`, the fixed reference, gives them."""
    result = []
    for k in range(0, len(pairs), micro_pairs):
        chunk = pairs[k : k + micro_pairs]
        rows = [[chosen] for chosen, _ in chunk] + [[rejected] for _, rejected in chunk]
        with torch.no_grad():
            sums = sequence_log_probs(model, batch_rows(rows))[0].tolist()
        references = zip(sums[: len(chunk)], sums[len(chunk) :], strict=True)
        result += [Pair(*pair, *sums) for pair, sums in zip(chunk, references, strict=True)]
    return result


class DPOObjective:
    """-log sigmoid(beta * difference of log-ratios) + nll_weight * NLL of the chosen reply."""

    def __init__(
        self, pairs: Sequence[Pair], config: DPOConfig, *, seed: int, rank: Rank = Rank()
    ) -> None:
        self.pairs, self.config = pairs, config
        self.loader = Loader(len(pairs), seed=seed, rank=rank)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps that make one pass over the data."""
        return len(self.pairs) / self.config.pairs_per_step

    def step_data(self, step: int) -> StepData:
        config = self.config
        state = LoaderState(step * config.pairs_per_step)
        indices, _ = self.loader.take(state, config.pairs_per_step)
        chosen = sorted((self.pairs[i] for i in indices), key=lambda pair: len(pair.chosen))
        batches = [
            _batch(chosen[k : k + config.micro_pairs])
            for k in range(0, len(chosen), config.micro_pairs)
        ]
        return StepData(batches, {})

    def weight(self, batch: Batch) -> float:
        return len(batch.tokens_BT) / 2

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        sums, counts = sequence_log_probs(model, batch)
        shift = sums - batch.extras["reference"]
        chosen, rejected = shift.chunk(2)
        margin = self.config.beta * (chosen - rejected)
        nll = (-sums / counts.clamp(min=1)).chunk(2)[0]
        total = (-F.logsigmoid(margin) + self.config.nll_weight * nll).sum()
        metrics = {
            "preference": -F.logsigmoid(margin.detach()).sum(),
            "preference_accuracy": (margin > 0).float().sum(),
            "margin": margin.detach().sum(),
            "chosen_shift": chosen.detach().sum(),
            "rejected_shift": rejected.detach().sum(),
        }
        return LossOutput(total, metrics)


def _batch(pairs: Sequence[Pair]) -> Batch:
    batch = batch_rows([[p.chosen] for p in pairs] + [[p.rejected] for p in pairs])
    reference = [p.reference_chosen for p in pairs] + [p.reference_rejected for p in pairs]
    return batch._replace(extras={"reference": torch.tensor(reference)})
