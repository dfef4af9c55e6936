"""Reinforcement learning with verifiable rewards: group-relative policy gradients.

GRPO (Shao et al., 2024) with the three fixes of Phi-4-Mini-Reasoning (arXiv 2504.21233, section 3):
prompts are selected whose replies are of like length (`select_prompts`), every group contributes as
many negatives as positives, and the sampling temperature anneals. The paper publishes neither the
thresholds nor the final algorithm, so each constant is a field. Two deviations have fields too: a
weight below 1 on negatives, which lets a small model bear a high learning rate, and a floor under
the temperature (both measured in `docs/log.md`).

The log-probabilities the engine sampled with anchor the clipped ratio (Schulman et al., 2017), with
DAPO's higher upper bound; on the single update per rollout the ratio is 1 up to rounding, and the
gradient is that of REINFORCE with a baseline.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt

from phikit.base.config import Config
from phikit.base.device import Rank
from phikit.base.errors import DataError
from phikit.base.types import IGNORE, Batch, Example
from phikit.chat.message import Message
from phikit.chat.render import Renderer
from phikit.data.loader import Loader, LoaderState
from phikit.data.pack import batch_rows
from phikit.data.problem import Problem
from phikit.evals.scorer import Scorer
from phikit.generate.engine import Engine
from phikit.models.decoder import Decoder
from phikit.nn.attention import CausalAttention
from phikit.nn.losses import token_log_probs_and_entropy
from phikit.solve.plain import SamplingConfig, plain
from phikit.solve.solver import Reply
from phikit.train.objective import LossOutput, StepData


class PromptSelection(Config):
    """Which problems are worth reinforcement: judged by sampling rounds before the first step."""

    candidates: PositiveInt
    """Problems sampled."""
    samples: PositiveInt = 4
    """Replies to each."""
    max_length_cv: float | None = 0.5
    """Bound on standard deviation / mean of the reply lengths; the paper's value is unpublished."""
    min_accuracy: float = 0.0
    max_accuracy: float = 1.0


class GRPOConfig(Config):
    """Rollouts, selection inside a group, and the loss."""

    prompts_per_step: PositiveInt
    group_size: PositiveInt
    max_new_tokens: PositiveInt
    micro_rows: PositiveInt
    temperature: float = 1.0
    final_temperature: float = 0.6
    """Reached by linear descent after `anneal` of the steps, as in the paper."""
    anneal: float = 0.5
    advantage: Literal["balanced", "group_mean", "group_std"] = "balanced"
    """balanced: +1 and -1 for equal numbers of positives and negatives (the paper); group_mean:
    reward minus the group's mean (Dr. GRPO); group_std: that over the standard deviation (GRPO)."""
    negative_weight: float = 1.0
    """Factor on negative advantages."""
    max_group_accuracy: float | None = None
    """Groups with a larger share of correct replies are dropped; 0.5 in the paper."""
    max_length_cv: float | None = None
    """Groups whose reply lengths spread more (standard deviation / mean) are dropped as they come:
    prompt selection for problems that are made fresh and seen once."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    selection: PromptSelection | None = None

    def temperature_at(self, step: int, steps: int) -> float:
        """Linear from `temperature` to `final_temperature` over the first `anneal` of the steps."""
        progress = min(1.0, step / max(1.0, self.anneal * steps))
        return self.temperature + (self.final_temperature - self.temperature) * progress


class Rated(NamedTuple):
    """A problem with its replies and their rewards."""

    problem: Problem
    replies: list[Reply]
    rewards: list[float]


Reward = Callable[[Sequence[tuple[Problem, Reply]]], list[float]]


def reward_from(scorer: Scorer) -> Reward:
    """+1 for a correct reply, -1 for any other, as in the paper."""
    return lambda pairs: [2 * score.value - 1 for score in scorer(pairs)]


def rate(
    problems: Sequence[Problem], replies: Sequence[list[Reply]], reward: Reward
) -> list[Rated]:
    """Attach rewards to replies."""
    pairs = [(p, r) for p, group in zip(problems, replies, strict=True) for r in group]
    rewards = iter(reward(pairs))
    return [
        Rated(problem, group, [next(rewards) for _ in group])
        for problem, group in zip(problems, replies, strict=True)
    ]


def select_prompts(groups: Sequence[Rated], selection: PromptSelection) -> list[Problem]:
    """Problems whose replies are of like length and neither hopeless nor solved.

    Raises DataError when none is left.
    """
    kept = []
    for group in groups:
        accuracy = sum(reward > 0 for reward in group.rewards) / len(group.rewards)
        is_even = are_even(group.replies, selection.max_length_cv)
        if is_even and selection.min_accuracy <= accuracy <= selection.max_accuracy:
            kept.append(group.problem)
    if not kept:
        raise DataError(
            f"prompt selection kept none of {len(groups)} problems",
            fix="raise selection.max_length_cv or widen the accuracy bounds",
        )
    return kept


def are_even(replies: Sequence[Reply], max_length_cv: float | None) -> bool:
    """Whether the reply lengths spread little enough; None accepts any spread."""
    if max_length_cv is None:
        return True
    lengths = [len(reply.tokens) for reply in replies]
    return statistics.pstdev(lengths) <= max_length_cv * statistics.fmean(lengths)


def advantages(
    rewards: Sequence[float], config: GRPOConfig, random: np.random.Generator
) -> list[float]:
    """One advantage per reply of a group; 0 leaves the reply out of the update."""
    values = np.array(rewards, np.float64)
    positive = values > 0
    solved = config.max_group_accuracy is not None and positive.mean() > config.max_group_accuracy
    if solved or values.std() == 0:
        return [0.0] * len(values)
    if config.advantage == "balanced":
        share = min(positive.sum(), (~positive).sum())
        chosen = np.zeros(len(values))
        for side, sign in ((positive, 1.0), (~positive, -1.0)):
            members = np.flatnonzero(side)
            chosen[random.permutation(members)[:share]] = sign
        result = chosen
    else:
        result = values - values.mean()
        if config.advantage == "group_std":
            result = result / values.std()
    return [float(a) if a > 0 else float(a * config.negative_weight) for a in result]


class GRPOObjective:
    """Samples groups with the current model, rewards them, and weighs their log-probabilities."""

    def __init__(
        self,
        model: Decoder,
        renderer: Renderer,
        problems: Sequence[Problem],
        reward: Reward,
        config: GRPOConfig,
        *,
        steps: int,
        seed: int,
        rank: Rank = Rank(),
    ) -> None:
        self.engine, self.renderer = Engine(model), renderer
        self.problems, self.reward, self.config = problems, reward, config
        self.steps, self.seed, self.rank = steps, seed, rank
        self.loader = Loader(len(problems), seed=seed, rank=rank)

    def step_data(self, step: int) -> StepData:
        config = self.config
        state = LoaderState(step * config.prompts_per_step)
        indices, _ = self.loader.take(state, config.prompts_per_step)
        problems = [self.problems[i] for i in indices]
        temperature = config.temperature_at(step, self.steps)
        sampling = SamplingConfig(
            temperature=temperature,
            max_new_tokens=config.max_new_tokens,
            num_samples=config.group_size,
            seed=self.seed * 1_000_003 + step,
        )
        groups = rate(problems, plain(self.engine, self.renderer, sampling)(problems), self.reward)
        rows = []
        for index, group in zip(indices, groups, strict=True):
            if not are_even(group.replies, config.max_length_cv):
                continue
            random = np.random.default_rng([self.seed, step, index])
            weights = advantages(group.rewards, config, random)
            rows += [
                (group.problem, reply, weight)
                for reply, weight in zip(group.replies, weights, strict=True)
                if weight and reply.tokens
            ]
        rows.sort(key=lambda row: len(row[0].question) + len(row[1].tokens))
        batches = [
            self._batch(rows[k : k + config.micro_rows], temperature)
            for k in range(0, len(rows), config.micro_rows)
        ]
        return StepData(batches, _rollout_metrics(groups, len(rows), temperature))

    def _batch(self, rows: list[tuple[Problem, Reply, float]], temperature: float) -> Batch:
        examples, old = [], []
        for problem, reply, _ in rows:
            prompt = self.renderer.prompt([Message(role="user", content=problem.question)])
            tokens = np.array([*prompt, *reply.tokens], np.int32)
            mask = np.arange(len(tokens)) >= len(prompt)
            examples.append([Example(tokens=tokens, loss_mask=mask)])
            old += reply.log_probs
        weights = [[row[2]] * len(row[1].tokens) for row in rows]
        extras = {
            "advantage_N": torch.tensor([a for row in weights for a in row]),
            "old_log_probs_N": torch.tensor(old),
            "temperature": torch.tensor(temperature),
        }
        return batch_rows(examples)._replace(extras=extras)

    def weight(self, batch: Batch) -> float:
        return float((batch.targets_BT != IGNORE).sum())

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        return policy_gradient(
            model, batch, clip_low=self.config.clip_low, clip_high=self.config.clip_high
        )


def policy_gradient(
    model: Decoder, batch: Batch, *, clip_low: float, clip_high: float
) -> LossOutput:
    """Clipped surrogate summed over the sampled tokens of the batch.

    `extras` hold, for the N targets in row order: advantages, the sampler's log-probabilities, and
    the temperature it divided the logits by.
    """
    extras = batch.extras
    learnt = batch.targets_BT != IGNORE
    hidden_BTD = model.hidden(
        batch.tokens_BT,
        positions_BT=batch.positions_BT,
        attend=CausalAttention(window=model.config.sliding_window),
    )
    log_probs_N, entropy_N = token_log_probs_and_entropy(
        hidden_BTD[learnt],
        model.lm_head.weight,
        batch.targets_BT[learnt],
        bias_V=model.logit_bias,
        temperature=float(extras["temperature"]),
    )
    log_ratio = log_probs_N - extras["old_log_probs_N"]
    ratio, advantage = log_ratio.exp(), extras["advantage_N"]
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, bounded * advantage)
    metrics = {
        "entropy": entropy_N.sum(),
        "sampler_kl": (log_ratio.detach().expm1() - log_ratio.detach()).sum(),
        "clipped": (ratio != bounded).float().sum(),
    }
    return LossOutput(-surrogate.sum(), metrics)


def _rollout_metrics(groups: list[Rated], kept: int, temperature: float) -> dict[str, float]:
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [len(reply.tokens) for group in groups for reply in group.replies]
    mixed = sum(len(set(group.rewards)) > 1 for group in groups)
    return {
        "reward": statistics.fmean(rewards),
        "solved": sum(reward > 0 for reward in rewards) / len(rewards),
        "length": statistics.fmean(lengths),
        "mixed_groups": mixed / len(groups),
        "kept_rollouts": kept,
        "generated_tokens": sum(lengths),
        "temperature": temperature,
    }
