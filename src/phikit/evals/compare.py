"""A changed model beside the one it was made from: how far its predictions moved.

Distances on held-out text, and accuracy on problems, all with their spread. The divergence
KL(original || changed) says how much worse the changed model predicts what the original would
write; it needs no right answers, and sees far smaller changes than accuracy does. Errors are over
rows of text, since tokens of one row are not independent.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phikit.data.problem import Problem
from phikit.evals.scorer import math_scorer
from phikit.evals.stats import Estimate, PairedDifference, mean_stderr, paired_difference
from phikit.evals.task import EvalResult, Task, evaluate
from phikit.generate.engine import Engine
from phikit.models.decoder import Decoder
from phikit.solve.plain import SamplingConfig, plain
from phikit.weights.load import Loaded


class TextComparison(NamedTuple):
    """Two models on the same text; `loss` is the mean of -log p(next token), in nats."""

    tokens: int
    divergence: Estimate
    """KL(original || changed) of the next token, in nats."""
    agreement: Estimate
    """Share of tokens after which both find the same next one likeliest."""
    original_loss: Estimate
    changed_loss: Estimate
    loss_change: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the perplexities too."""
        return {
            "tokens": self.tokens,
            **{name: value._asdict() for name, value in self._asdict().items() if name != "tokens"},
            "original_perplexity": math.exp(self.original_loss.mean),
            "changed_perplexity": math.exp(self.changed_loss.mean),
        }


@torch.inference_mode()
def compare_text(
    original: Decoder,
    changed: Decoder,
    rows: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> TextComparison:
    """Both models on rows of token ids, of two or more each; progress counts the tokens of rows."""
    per_row: list[list[list[float]]] = []
    for row in rows:
        tokens_1T = torch.tensor([row], device=original.device)
        theirs_TV, ours_TV = (_log_probs(model, tokens_1T) for model in (original, changed))
        next_T1 = tokens_1T[0, 1:, None]
        values = (
            (theirs_TV.exp() * (theirs_TV - ours_TV)).sum(-1),
            (theirs_TV.argmax(-1) == ours_TV.argmax(-1)).float(),
            before_T := -theirs_TV.gather(-1, next_T1)[:, 0],
            after_T := -ours_TV.gather(-1, next_T1)[:, 0],
            after_T - before_T,
        )
        per_row.append([value_T.tolist() for value_T in values])
        if on_progress is not None:
            on_progress(len(row))
    estimates = [mean_stderr(outcomes) for outcomes in zip(*per_row, strict=True)]
    return TextComparison(sum(len(row) - 1 for row in rows), *estimates)


def _log_probs(model: Decoder, tokens_1T: Tensor) -> Tensor:
    """Log-probabilities of each next token but the first, float32 [T - 1, V]."""
    return model(tokens_1T)[0, :-1].float().log_softmax(-1)


class TaskComparison(NamedTuple):
    """Two models on the same problems, one greedy reply each."""

    original: EvalResult
    changed: EvalResult
    difference: PairedDifference

    def to_dict(self) -> dict[str, Any]:
        return {
            "original": self.original.summary(),
            "changed": self.changed.summary(),
            "difference": self.difference._asdict(),
        }


def compare_task(
    original: Loaded,
    changed: Loaded,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    on_progress: Callable[[int], None] | None = None,
) -> TaskComparison:
    """Accuracy of both; progress counts replies, two for each problem."""
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    results = []
    for loaded in (original, changed):
        solver = plain(
            Engine(loaded.model),
            loaded.renderer,
            sampling,
            on_progress=lambda _, finished: on_progress(finished) if on_progress else None,
        )
        results.append(evaluate(Task("procedural", problems, solver, math_scorer(lenient=True))))
    before, after = results
    return TaskComparison(before, after, paired_difference(before.scores(), after.scores()))
