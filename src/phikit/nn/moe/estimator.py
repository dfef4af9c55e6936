"""SparseMixer: experts picked one after another, by chance in training, and the choice's gradient.

At each step an expert with score s is a candidate if (m - s) / max(|s|, m) <= 2 `jitter_eps`, m
being the best score not yet taken. This is the form of the released code; equation 2 of the paper
divides by |s| + |m|. With p the softmax over the candidates alone, evaluation takes the best one,
training draws D from p, and in both the gate is a multiple of p_D. Two things are unusual:

- Mostly the best expert is the only candidate. Its gate is then exactly 1, nothing was drawn, and
  the router gets no gradient from this choice: at 0.01 that is so in 95 % of them.
- Gates are not normalised over the picked experts: with two of them they sum to nearly 2.

**The gradient.** Let f be the rest of the network and the loss, h = p_D E_D the gated output, and
g(t) = f'(t h) h. The gain of the choice, f(h) - f(0), is the integral of g over [0, 1]. The rules
below estimate it by running the network on c h, with c drawn anew for every token and choice: the
gradient that arrives at the gate, times dp_D/dz, is the estimate.

    euler      c = 1                            exact if f is linear
    midpoint   c = 1/2                          exact if f is quadratic
    heun3      c = 1 (probability 1/4) or 1/3   exact if f is cubic (Radau's two points)
    v2         heun3, but c = 1 whenever the argmax was drawn: as GRIN was trained
    v2star     as v2 with probability 5/8, gradient x 2, softmax of z / 2: equation 6 of GRIN
    v1         midpoint, but c = 1 for the argmax, gradient x 2 (SparseMixer, without its omega)

What is proved and what is not: c = 1 for the argmax (the `delta` rule) makes the whole estimator
first-order, since the argmax is what is mostly drawn. `v2` leaves out the path through the gate,
d f(p E) / dp, which its authors found after training (appendix A.2); `v2star` has it. With two
choices no rule credits the first draw for what it leaves to the second. `euler` is the gradient of
the gate itself and knows nothing of the draw. docs/moe.md has the figures.

Sources: GRIN (arXiv 2409.12136), equations 2 to 8 and algorithms 1 and 2; SparseMixer (2310.00811);
the router of Phi-3.5-MoE in transformers, whose 0.3333 is 1/3 here.
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Estimator(NamedTuple):
    """How much of the output runs, and what multiplies the gradient of the gate."""

    part: float
    """c where it is not 1."""
    full: float
    """Probability of c = 1."""
    delta: bool
    """Whether c = 1 whenever the best candidate was drawn."""
    weight: float = 1.0
    """Factor on the gradient that arrives at the gate."""
    temperature: float = 1.0
    """What the scores are divided by before the softmax."""


EstimatorName = Literal["v2", "v2star", "v1", "heun3", "midpoint", "euler"]
ESTIMATORS: dict[EstimatorName, Estimator] = {
    "v2": Estimator(1 / 3, 1 / 4, delta=True),
    "v2star": Estimator(1 / 3, 5 / 8, delta=True, weight=2, temperature=2),
    "v1": Estimator(1 / 2, 0, delta=True, weight=2),
    "heun3": Estimator(1 / 3, 1 / 4, delta=False),
    "midpoint": Estimator(1 / 2, 0, delta=False),
    "euler": Estimator(1, 1, delta=False),
}


class Draws(Protocol):
    """Where chance comes from; every call is fresh."""

    def exponential(self, like: Tensor) -> Tensor:
        """Of rate 1, in the shape and dtype of `like`."""
        ...

    def uniform(self, like: Tensor) -> Tensor:
        """On [0, 1), in the shape and dtype of `like`."""
        ...


class RandomDraws:
    """Draws from a generator on the device of the tensors."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def exponential(self, like: Tensor) -> Tensor:
        # `exponential_` takes four times as long. A uniform number of float32 is a multiple of
        # 2**-24, and 0 one of them.
        return self.uniform(like).clamp_(min=2.0**-25).log_().neg_()

    def uniform(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(generator=self._generator)


class Picked(NamedTuple):
    """What `sparse_mixer` chose."""

    gates_TC: Tensor
    ids_TC: Tensor
    shares: tuple[Tensor, ...]
    """For each choice the softmax over its candidates, [T, E]."""
    expert_scale_TC: Tensor | None
    """What the gradient that enters the experts is multiplied by; None is 1."""


class _Gate(torch.autograd.Function):
    """`share * part` forward, `gradient * weight` backward: not each other's derivative."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, part: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return share * part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.weight, None, None


def sparse_mixer(
    scores_TE: Tensor,
    *,
    num_choices: int,
    jitter_eps: float | None,
    estimator: Estimator = ESTIMATORS["v2"],
    expert_grad: Literal["code", "paper"] = "code",
    draws: Draws | None = None,
) -> Picked:
    """Choose experts; without `draws` the best ones, gated by their whole share.

    Args:
        scores_TE: the router's logits.
        num_choices: experts of a token.
        jitter_eps: see above; None makes all experts candidates.
        estimator: of the gradient of what was drawn; its temperature counts without draws too.
        expert_grad: whether the experts' gradient is multiplied by the gate (`code`, as released
            and as the chain rule has it) or by `weight` p_D, whatever part ran (`paper`).
        draws: chance.
    """
    known_TE = left_TE = scores_TE.detach()
    gates: list[Tensor] = []
    ids: list[Tensor] = []
    shares: list[Tensor] = []
    parts: list[Tensor] = []
    for _ in range(num_choices):
        best_T1, chosen_T1 = left_TE.max(-1, keepdim=True)
        logits_TE = left_TE
        if jitter_eps is not None:
            far_TE = _is_far(known_TE, best_T1, jitter_eps)
            logits_TE = left_TE.masked_fill(far_TE, float("-inf"))
        # Adds 0 or -inf: masking in the graph would mask gradients that are 0 anyhow.
        masked_TE = scores_TE + (logits_TE - known_TE)
        if estimator.temperature != 1:
            masked_TE = masked_TE / estimator.temperature
        shares_TE = masked_TE.softmax(-1)
        if draws is None:
            gates.append(shares_TE.gather(-1, chosen_T1))
        else:
            best_T1 = chosen_T1
            logits_TE = masked_TE.detach()
            race_TE = logits_TE - draws.exponential(logits_TE).log()
            chosen_T1 = race_TE.argmax(-1, keepdim=True)
            is_full_T1 = draws.uniform(race_TE[:, :1]) > 1 - estimator.full
            if estimator.delta:
                is_full_T1 |= chosen_T1 == best_T1
            share_T1 = shares_TE.gather(-1, chosen_T1)
            part_T1 = torch.where(is_full_T1, torch.ones_like(share_T1), estimator.part)
            gates.append(_Gate.apply(share_T1, part_T1, estimator.weight))
            parts.append(part_T1)
        ids.append(chosen_T1)
        shares.append(shares_TE)
        left_TE = left_TE.scatter(-1, chosen_T1, float("-inf"))
    scale_TC = estimator.weight / torch.cat(parts, -1) if parts and expert_grad == "paper" else None
    return Picked(torch.cat(gates, -1), torch.cat(ids, -1), tuple(shares), scale_TC)


def _is_far(scores_TE: Tensor, best_T1: Tensor, jitter_eps: float) -> Tensor:
    """Which experts are no candidates; all scores 0 gives 0 / 0, and NaN is not far."""
    return (best_T1 - scores_TE) / scores_TE.abs().clamp(min=best_T1) > 2 * jitter_eps
