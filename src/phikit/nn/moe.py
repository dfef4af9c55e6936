"""Mixture of experts: a router sends each token to a few SwiGLU experts; no token is ever dropped.

Router and experts are apart. A router turns tokens into a `Routing` and is the only part in which
methods differ; experts compute whatever they are sent. There is no capacity: tokens are sorted by
expert and meet the stacked weights in one grouped product, however uneven the groups are.

`SparseMixerRouter` is the one of GRIN-MoE and Phi-3.5-MoE. What is unusual in it:
- Experts are picked one after another. At every step only those whose score is close enough to the
  best one left are candidates, and the gate is a softmax over the candidates alone. Mostly the best
  expert is the only candidate, so its gate is exactly 1 and sends no gradient to the router.
- Gates are not normalised over the picked experts: with two of them they sum to nearly 2.

Two more shape suffixes: C choices of a token, A assignments (T x C rows, sorted by expert).

Sources: GRIN (arXiv 2409.12136), equation 2, in the form of the released code, which divides by
max(|s|, max s) where the paper has |s| + |max s|. Dropless computation: MegaBlocks (2211.15841).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phikit.nn.linear import product
from phikit.nn.mlp import gated_silu

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Routing(NamedTuple):
    """Where every token goes."""

    gates_TC: Tensor
    """What each chosen expert's output is multiplied by."""
    ids_TC: Tensor
    """Numbers of the chosen experts, all different within a token."""
    scores_TE: Tensor
    """The router's logits, from which balance losses and statistics follow."""

    def load_E(self) -> Tensor:
        """Number of assignments each expert received; they sum to T x C."""
        return torch.bincount(self.ids_TC.flatten(), minlength=self.scores_TE.shape[-1])


def sparse_mixer(
    scores_TE: Tensor, *, num_choices: int, jitter_eps: float
) -> tuple[Tensor, Tensor]:
    """Gates and ids [T, C] of SparseMixer without its sampling, as the models are run.

    At each step an expert with score s is a candidate if (m - s) / max(|s|, m) <= 2 `jitter_eps`,
    m being the best score not yet taken.
    """
    left_TE, gates, ids = scores_TE, [], []
    for _ in range(num_choices):
        best_T1, chosen_T1 = left_TE.detach().max(-1, keepdim=True)
        far_TE = _is_far(scores_TE.detach(), best_T1, jitter_eps)
        shares_TE = left_TE.masked_fill(far_TE, float("-inf")).softmax(-1)
        gates.append(shares_TE.gather(-1, chosen_T1))
        ids.append(chosen_T1)
        left_TE = left_TE.scatter(-1, chosen_T1, float("-inf"))
    return torch.cat(gates, -1), torch.cat(ids, -1)


def _is_far(scores_TE: Tensor, best_T1: Tensor, jitter_eps: float) -> Tensor:
    """Which experts are no candidates; all scores 0 gives 0 / 0, and NaN is not far."""
    return (best_T1 - scores_TE) / scores_TE.abs().clamp(min=best_T1) > 2 * jitter_eps


class SparseMixerRouter(nn.Module):
    """Linear scores, then `sparse_mixer`; the same in training and in evaluation."""

    def __init__(
        self, d_model: int, num_experts: int, *, num_choices: int, jitter_eps: float
    ) -> None:
        super().__init__()
        assert 0 < num_choices <= num_experts
        self.gate = nn.Linear(d_model, num_experts, bias=False)
        self.num_choices = num_choices
        self.jitter_eps = jitter_eps

    def forward(self, x_TD: Tensor) -> Routing:
        scores_TE = self.gate(x_TD)
        gates_TC, ids_TC = sparse_mixer(
            scores_TE, num_choices=self.num_choices, jitter_eps=self.jitter_eps
        )
        return Routing(gates_TC, ids_TC, scores_TE)


class ExpertLinear(nn.Module):
    """One linear map per expert, `weight` [E, out, in], on rows that lie sorted by expert."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, out_features, in_features))

    def forward(self, x_A: Tensor, ends_E: Tensor) -> Tensor:
        """Rows [A, in] to [A, out]; expert e owns the rows from `ends_E[e - 1]` to `ends_E[e]`."""
        product = grouped_product if can_group(self.weight) else looped_product
        return product(x_A, self.weight, ends_E)

    def of(self, expert: int, x: Tensor) -> Tensor:
        """One expert's product, [..., in] to [..., out]."""
        return product(x, self.weight[expert])


def can_group(weight_EOI: Tensor) -> bool:
    """Whether torch's grouped product takes these weights.

    As of torch 2.13 it wants all rows to be whole multiples of 16 bytes, on every device, knows
    three dtypes, runs on CPU and on CUDA from compute capability 8.0, and ignores autocast.
    """
    device = weight_EOI.device
    known = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    aligned = all(size * weight_EOI.itemsize % 16 == 0 for size in weight_EOI.shape[1:])
    typed = weight_EOI.dtype in GROUPED_DTYPES
    return known and aligned and typed and not torch.is_autocast_enabled(device.type)


def grouped_product(x_A: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its expert's transposed matrix, in one call; see `can_group`."""
    return F.grouped_mm(x_A, weight_EOI.transpose(1, 2), offs=ends_E)


def looped_product(x_A: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The same expert by expert, for any device, shape and dtype."""
    parts = x_A.tensor_split(ends_E[:-1].tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight_EOI.unbind(), strict=True)])


class Experts(nn.Module):
    """SwiGLU experts, their matrices stacked: gate and up [E, 2F, D], gate rows first; down."""

    def __init__(self, num_experts: int, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.gate_up_proj = ExpertLinear(num_experts, d_model, 2 * d_mlp)
        self.down_proj = ExpertLinear(num_experts, d_mlp, d_model)

    def forward(self, x_TD: Tensor, ids_TC: Tensor, gates_TC: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, each times its gate, [T, D]."""
        if len(x_TD) == 1:
            return self._one_token(x_TD, ids_TC, gates_TC)
        num_experts, num_choices = self.down_proj.num_experts, ids_TC.shape[1]
        ids_A, order_A = ids_TC.flatten().sort(stable=True)
        ends_E = torch.bincount(ids_A, minlength=num_experts).cumsum(0).int()
        mixed_AF = gated_silu(self.gate_up_proj(x_TD[order_A // num_choices], ends_E))
        y_AD = self.down_proj(mixed_AF, ends_E)
        # Back into the order of the tokens, and only then a sum: the result is deterministic.
        y_TCD = y_AD[order_A.argsort()].unflatten(0, ids_TC.shape)
        return (y_TCD * gates_TC[..., None]).sum(1)

    def _one_token(self, x_1D: Tensor, ids_1C: Tensor, gates_1C: Tensor) -> Tensor:
        """Decoding: the chosen experts in turn, nothing to sort."""
        outputs = []
        for expert in ids_1C[0].tolist():
            mixed_1F = gated_silu(self.gate_up_proj.of(expert, x_1D))
            outputs.append(self.down_proj.of(expert, mixed_1F))
        return gates_1C @ torch.cat(outputs)


class MoE(nn.Module):
    """A router and its experts in the place of a feed-forward block, [B, T, D] to [B, T, D]."""

    def __init__(self, router: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        routing: Routing = self.router(x_TD)
        return self.experts(x_TD, routing.ids_TC, routing.gates_TC).view_as(x_BTD)
