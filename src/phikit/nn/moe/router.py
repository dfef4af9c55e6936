"""Routers: from tokens to the experts they are sent to, and by what each output is multiplied.

A router is linear scores, then a rule. Rules know nothing of training loops: chance comes as an
argument (`Draws`), without which they are deterministic. Scores are computed in float32, as a
rounding of bfloat16 changes who is sent where; only a released checkpoint in evaluation keeps its
own dtype, as its reference does.

| kind | chosen | gate | its router learns from |
|:--|:--|:--|:--|
| topk | k largest | softmax over all experts, as a rule over the k | gates of the chosen |
| sigmoid | k largest of sigmoid + bias | sigmoid over its sum | gates of the chosen |
| sparsemixer | drawn, see `estimator` | softmax over near candidates | gates, read as an ODE |
| sampled_gate | drawn the same way | the same | gates of the chosen |
| dense_st | k largest | as topk | every expert's output, all of which run |

Sources: Switch Transformer (2101.03961), GShard (2006.16668), DeepSeek-V3 (2412.19437) for sigmoid
with bias, GRIN (2409.12136), DenseMixer (Yao et al., 2025) for dense_st.
"""

from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.nn.moe.estimator import ESTIMATORS, Draws, Estimator, EstimatorName, sparse_mixer


class _RouterConfig(Config):
    input_jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training the router sees its input times a uniform factor of 1 +- this; experts do not."""


class TopKConfig(_RouterConfig):
    """Softmax, then the k largest."""

    kind: Literal["topk"] = "topk"
    normalise: bool = True
    """Whether a token's gates are divided by their sum; not possible with one choice, whose gate
    would always be 1."""


class SigmoidConfig(_RouterConfig):
    """Scores apart from each other, selected by score + bias, gated by the score."""

    kind: Literal["sigmoid"] = "sigmoid"
    normalise: bool = True
    """As in `TopKConfig`."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the gates."""


class _Near(_RouterConfig):
    jitter_eps: float | None = Field(default=0.01, ge=0)
    """How near to the best an expert's score must be to be a candidate; None makes all of them
    candidates. At 0.01, as released, a router that starts at random hardly learns; see `estimator`.
    """


class SparseMixerConfig(_Near):
    """The router of GRIN-MoE and Phi-3.5-MoE."""

    kind: Literal["sparsemixer"] = "sparsemixer"
    estimator: EstimatorName = "v2"
    delta: bool | None = None
    """Whether the full output runs whenever the best candidate is drawn; None: as the estimator
    has it."""
    expert_grad: Literal["code", "paper"] = "code"
    """By what the experts' gradients are multiplied; see `estimator.sparse_mixer`."""

    @property
    def rule(self) -> Estimator:
        rule = ESTIMATORS[self.estimator]
        return rule if self.delta is None else rule._replace(delta=self.delta)


class SampledGateConfig(_Near):
    """Draws as SparseMixer does and learns from the gate alone: the control arm.

    The gradient of the gate is Euler's estimate, so this is `sparsemixer` with `euler`; it has a
    name because every comparison needs it: what it gains over top-k is due to drawing.
    """

    kind: Literal["sampled_gate"] = "sampled_gate"


class DenseSTConfig(_RouterConfig):
    """Top-k whose router learns from all experts, straight through; all of them run in training."""

    kind: Literal["dense_st"] = "dense_st"
    normalise: bool = False
    """As in `TopKConfig`."""


RouterConfig = Annotated[
    TopKConfig | SigmoidConfig | SparseMixerConfig | SampledGateConfig | DenseSTConfig,
    Field(discriminator="kind"),
]


def softmax(scores_TE: Tensor) -> Tensor:
    """Over experts, computed along a first dimension: along a last one that fills no vector
    register torch takes ten times as long."""
    return scores_TE.mT.softmax(-2).mT


class RouterStats(NamedTuple):
    """What a router did; nothing is computed before it is asked for."""

    scores_TE: Tensor
    """The logits."""
    gates_TC: Tensor
    ids_TC: Tensor
    share: Callable[[Tensor], Tensor]
    """From logits to each token's distribution over all experts."""
    candidates: tuple[Tensor, ...] = ()
    """Where experts are drawn: for each choice, the distribution it was drawn from, [T, E]."""

    def load_E(self, counts_T: Tensor | None = None) -> Tensor:
        """Assignments each expert received, of tokens that count; they sum to C x tokens."""
        weights_A = None
        if counts_T is not None:
            weights_A = counts_T[:, None].expand(self.ids_TC.shape).flatten()
        num_experts = self.scores_TE.shape[-1]
        return torch.bincount(self.ids_TC.flatten(), weights=weights_A, minlength=num_experts)

    def is_single_T(self) -> Tensor:
        """Whether each choice of a token had one candidate: it teaches the router nothing."""
        counts = [(shares_TE > 0).sum(-1) for shares_TE in self.candidates]
        return torch.stack(counts).sum(0) == len(counts)  # each is at least 1

    def gate_sum_T(self) -> Tensor:
        return self.gates_TC.sum(-1)


class Routing(NamedTuple):
    """Where every token goes."""

    gates_TC: Tensor
    """What each chosen expert's output is multiplied by."""
    ids_TC: Tensor
    """Numbers of the chosen experts, all different within a token."""
    stats: RouterStats
    expert_scale_TC: Tensor | None = None
    """What the gradient that enters the experts is multiplied by besides; None is 1."""


class Gate(nn.Module):
    """The scores' matrix, [E, D]. No `nn.Linear`: it is neither quantised nor adapted."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, d_model))

    def forward(self, x_TD: Tensor, *, is_precise: bool) -> Tensor:
        if not is_precise:
            return F.linear(x_TD, self.weight)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))


class Router(nn.Module):
    """Linear scores, then `route`, in which kinds differ."""

    def __init__(
        self, d_model: int, num_experts: int, *, top_k: int, input_jitter: float = 0.0
    ) -> None:
        super().__init__()
        assert 0 < top_k <= num_experts
        self.gate = Gate(d_model, num_experts)
        self.top_k, self.input_jitter = top_k, input_jitter
        self.keeps_dtype = False
        """Whether evaluation computes the scores in the model's dtype, as a released model does."""

    def forward(
        self, x_TD: Tensor, *, draws: Draws | None = None, is_learning: bool = False
    ) -> Routing:
        """Route tokens as in evaluation, unless a session says that the router is learning."""
        if draws is not None and self.input_jitter:
            x_TD = x_TD * (1 + self.input_jitter * (2 * draws.uniform(x_TD) - 1))
        is_precise = is_learning or not self.keeps_dtype
        scores_TE = self.gate(x_TD, is_precise=is_precise)
        return self.route(scores_TE, draws=draws, is_learning=is_learning)

    def route(self, scores_TE: Tensor, *, draws: Draws | None, is_learning: bool) -> Routing:
        """Choose experts by their scores."""
        raise NotImplementedError

    def share(self, scores_TE: Tensor) -> Tensor:
        """Each token's distribution over all experts, for balance losses and entropy."""
        return softmax(scores_TE)


class TopKRouter(Router):
    """See `TopKConfig`."""

    def __init__(self, config: TopKConfig, d_model: int, num_experts: int, *, top_k: int) -> None:
        super().__init__(d_model, num_experts, top_k=top_k, input_jitter=config.input_jitter)
        self.normalise = config.normalise

    def route(self, scores_TE: Tensor, *, draws: Draws | None, is_learning: bool) -> Routing:
        gates_TC, ids_TC = self.share(scores_TE).topk(self.top_k)
        if self.normalise:
            gates_TC = gates_TC / gates_TC.sum(-1, keepdim=True)
        return Routing(gates_TC, ids_TC, RouterStats(scores_TE, gates_TC, ids_TC, self.share))


class SigmoidRouter(Router):
    """See `SigmoidConfig`; `bias` is moved by the loads, not by a gradient (`RouterSession`)."""

    bias: Tensor

    def __init__(
        self, config: SigmoidConfig, d_model: int, num_experts: int, *, top_k: int
    ) -> None:
        super().__init__(d_model, num_experts, top_k=top_k, input_jitter=config.input_jitter)
        self.normalise, self.scale = config.normalise, config.scale
        self.register_buffer("bias", torch.zeros(num_experts))

    def route(self, scores_TE: Tensor, *, draws: Draws | None, is_learning: bool) -> Routing:
        strengths_TE = scores_TE.sigmoid()
        ids_TC = (strengths_TE.detach() + self.bias).topk(self.top_k).indices
        gates_TC = strengths_TE.gather(-1, ids_TC)
        if self.normalise:
            gates_TC = gates_TC / _positive(gates_TC.sum(-1, keepdim=True))
        gates_TC = gates_TC * self.scale
        return Routing(gates_TC, ids_TC, RouterStats(scores_TE, gates_TC, ids_TC, self.share))

    def share(self, scores_TE: Tensor) -> Tensor:
        strengths_TE = scores_TE.sigmoid()
        return strengths_TE / _positive(strengths_TE.sum(-1, keepdim=True))


def _positive(sums: Tensor) -> Tensor:
    return sums.clamp(min=torch.finfo(sums.dtype).tiny)


class SparseMixerRouter(Router):
    """See `SparseMixerConfig` and `SampledGateConfig`."""

    def __init__(
        self,
        config: SparseMixerConfig | SampledGateConfig,
        d_model: int,
        num_experts: int,
        *,
        top_k: int,
    ) -> None:
        super().__init__(d_model, num_experts, top_k=top_k, input_jitter=config.input_jitter)
        self.jitter_eps = config.jitter_eps
        if isinstance(config, SampledGateConfig):
            config = SparseMixerConfig(jitter_eps=config.jitter_eps, estimator="euler")
        self.rule = config.rule
        self.expert_grad: Literal["code", "paper"] = config.expert_grad

    def route(self, scores_TE: Tensor, *, draws: Draws | None, is_learning: bool) -> Routing:
        gates_TC, ids_TC, shares, expert_scale_TC = sparse_mixer(
            scores_TE,
            num_choices=self.top_k,
            jitter_eps=self.jitter_eps,
            estimator=self.rule,
            expert_grad=self.expert_grad,
            draws=draws,
        )
        stats = RouterStats(scores_TE, gates_TC, ids_TC, self.share, shares)
        return Routing(gates_TC, ids_TC, stats, expert_scale_TC)

    def share(self, scores_TE: Tensor) -> Tensor:
        return softmax(scores_TE / self.rule.temperature)


class DenseSTRouter(Router):
    """See `DenseSTConfig`. In training a token is sent to all experts, most with a gate of 0."""

    def __init__(
        self, config: DenseSTConfig, d_model: int, num_experts: int, *, top_k: int
    ) -> None:
        super().__init__(d_model, num_experts, top_k=top_k, input_jitter=config.input_jitter)
        self.normalise = config.normalise

    def route(self, scores_TE: Tensor, *, draws: Draws | None, is_learning: bool) -> Routing:
        gates_TE = self.share(scores_TE)
        gates_TC, ids_TC = gates_TE.topk(self.top_k)
        if self.normalise:
            sums_T1 = gates_TC.sum(-1, keepdim=True)
            gates_TC, gates_TE = gates_TC / sums_T1, gates_TE / sums_T1
        stats = RouterStats(scores_TE, gates_TC, ids_TC, self.share)
        if not is_learning:
            return Routing(gates_TC, ids_TC, stats)
        is_chosen_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter(-1, ids_TC, True)
        gates_TE = torch.where(is_chosen_TE, gates_TE, gates_TE - gates_TE.detach())
        all_TE = torch.arange(gates_TE.shape[-1], device=gates_TE.device).expand(gates_TE.shape)
        return Routing(gates_TE, all_TE, stats)


def build_router(config: RouterConfig, d_model: int, num_experts: int, *, top_k: int) -> Router:
    """The router of a config."""
    match config:
        case TopKConfig():
            return TopKRouter(config, d_model, num_experts, top_k=top_k)
        case SigmoidConfig():
            return SigmoidRouter(config, d_model, num_experts, top_k=top_k)
        case SparseMixerConfig() | SampledGateConfig():
            return SparseMixerRouter(config, d_model, num_experts, top_k=top_k)
        case DenseSTConfig():
            return DenseSTRouter(config, d_model, num_experts, top_k=top_k)
