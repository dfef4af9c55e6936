"""Stacked SwiGLU experts that compute whatever they are sent.

Tokens are sorted by expert and meet the stacked weights in one grouped product, however uneven the
groups are: no capacity, no padding, no token dropped (MegaBlocks, arXiv 2211.15841).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phikit.nn.linear import product
from phikit.nn.mlp import gated_silu

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertLinear(nn.Module):
    """One linear map per expert, `weight` [E, out, in], on rows that lie sorted by expert."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, out_features, in_features))

    def forward(self, x_A: Tensor, ends_E: Tensor) -> Tensor:
        """Rows [A, in] to [A, out]; expert e owns the rows from `ends_E[e - 1]` to `ends_E[e]`."""
        return expert_product(x_A, self.weight, ends_E)

    def of(self, expert: int, x: Tensor) -> Tensor:
        """One expert's product, [..., in] to [..., out]."""
        return product(x, self.weight[expert])


def expert_product(x_A: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its expert's transposed matrix, in the dtype of autocast if that is on."""
    device = x_A.device.type
    if torch.is_autocast_enabled(device):  # of which torch's grouped product knows nothing
        dtype = torch.get_autocast_dtype(device)
        x_A, weight_EOI = x_A.to(dtype), weight_EOI.to(dtype)
    multiply = grouped_product if can_group(weight_EOI) else looped_product
    return multiply(x_A, weight_EOI, ends_E)


def can_group(weight_EOI: Tensor) -> bool:
    """Whether torch's grouped product takes these weights.

    As of torch 2.13 it wants all rows to be whole multiples of 16 bytes, on every device, knows
    three dtypes, and runs on CPU and on CUDA from compute capability 8.0.
    """
    device = weight_EOI.device
    known = device.type == "cpu" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    aligned = all(size * weight_EOI.itemsize % 16 == 0 for size in weight_EOI.shape[1:])
    return known and aligned and weight_EOI.dtype in GROUPED_DTYPES


def grouped_product(x_A: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times its expert's transposed matrix, in one call; see `can_group`."""
    return _GroupedProduct.apply(x_A, weight_EOI, ends_E)  # pyright: ignore[reportReturnType]


class _GroupedProduct(torch.autograd.Function):
    """torch's own backward pass but for one matrix, see `_upright`."""

    @staticmethod
    def forward(ctx: Any, x_AI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_AI, weight_EOI, ends_E)
        return F.grouped_mm(x_AI, weight_EOI.mT, offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad_AO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_AI, weight_EOI, ends_E = ctx.saved_tensors
        grad_AO = grad_AO.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_AO, weight_EOI, offs=ends_E)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(_upright(grad_AO), x_AI, offs=ends_E)
        return grad_x, grad_weight, None


def _upright(x_AO: Tensor) -> Tensor:
    """The transposed matrix, [O, A], copied where that pays: on a CPU, products of 16-bit matrices
    take a transposed one at less than half the speed."""
    if x_AO.device.type != "cpu" or x_AO.itemsize != 2:
        return x_AO.T
    rows, width = x_AO.shape
    # Rows are whole multiples of 16 bytes. oneDNN reads up to 31 numbers past the end of a group
    # and multiplies them by 0: they must not be what memory happens to hold, which may be NaN.
    padded_OA = x_AO.new_empty(width, rows + -rows % 8 + 32)
    padded_OA[:, rows:] = 0
    return padded_OA[:, :rows].copy_(x_AO.T)


def looped_product(x_A: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The same expert by expert, for any device, shape and dtype.

    `unbind` gathers the gradient of all experts at once; indexing the stack would add up as many
    tensors of its whole size.
    """
    parts = x_A.tensor_split(ends_E[:-1].tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight_EOI.unbind(), strict=True)])


class _Spread(torch.autograd.Function):
    """Rows of tokens to rows of assignments, sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_A: Tensor, places_TC: Tensor) -> Tensor:
        ctx.save_for_backward(places_TC)
        return x_TD.index_select(0, tokens_A)

    @staticmethod
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None, None]:
        (places_TC,) = ctx.saved_tensors
        return _sum_of_choices(grad_AD, places_TC), None, None


class _Combine(torch.autograd.Function):
    """Rows of assignments to rows of tokens: the sum of a token's, each times its gate.

    `scale_TC`, where given, multiplies the gradient that enters the experts and nothing else.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_AD: Tensor,
        gates_TC: Tensor,
        scale_TC: Tensor | None,
        tokens_A: Tensor,
        places_TC: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(y_AD, gates_TC, scale_TC, tokens_A, places_TC)
        return _sum_of_choices(y_AD, places_TC, gates_TC)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        y_AD, gates_TC, scale_TC, tokens_A, places_TC = ctx.saved_tensors
        wide = torch.promote_types(grad_TD.dtype, gates_TC.dtype)
        grad_AD = grad_TD.index_select(0, tokens_A).to(wide)
        grad_gates_TC = None
        if ctx.needs_input_grad[1]:
            grad_gates_TC = (grad_AD * y_AD).sum(-1)[places_TC]
        factors_TC = gates_TC if scale_TC is None else gates_TC * scale_TC
        factors_A = torch.empty_like(factors_TC.flatten())
        factors_A[places_TC.flatten()] = factors_TC.flatten()
        return grad_AD.mul_(factors_A[:, None]).to(y_AD.dtype), grad_gates_TC, None, None, None


def _sum_of_choices(rows_AD: Tensor, places_TC: Tensor, gates_TC: Tensor | None = None) -> Tensor:
    """[T, D]: a token's rows, times its gates, added in the order of its choices and in float32 or
    wider. Nothing is scattered, so the result is deterministic."""
    wide = torch.promote_types(rows_AD.dtype, torch.float32)
    parts = [rows_AD.index_select(0, places_T).to(wide) for places_T in places_TC.unbind(1)]
    if gates_TC is not None:
        for part_TD, gate_T1 in zip(parts, gates_TC.split(1, 1), strict=True):
            part_TD.mul_(gate_T1)
    total_TD = parts[0]
    for part_TD in parts[1:]:
        total_TD.add_(part_TD)
    return total_TD.to(rows_AD.dtype)


class Experts(nn.Module):
    """SwiGLU experts, their matrices stacked: gate and up [E, 2F, D], gate rows first; down."""

    def __init__(self, num_experts: int, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.gate_up_proj = ExpertLinear(num_experts, d_model, 2 * d_mlp)
        self.down_proj = ExpertLinear(num_experts, d_mlp, d_model)

    def forward(
        self,
        x_TD: Tensor,
        ids_TC: Tensor,
        gates_TC: Tensor,
        expert_scale_TC: Tensor | None = None,
    ) -> Tensor:
        """The sum of the chosen experts' outputs, each times its gate, [T, D].

        `expert_scale_TC` multiplies the gradient that enters the experts, and nothing else.
        """
        if len(x_TD) == 1 and expert_scale_TC is None:
            return self._one_token(x_TD, ids_TC, gates_TC)
        order_A = ids_TC.flatten().argsort(stable=True)
        places_TC = torch.empty_like(order_A)
        places_TC[order_A] = torch.arange(len(order_A), device=order_A.device)
        places_TC = places_TC.view_as(ids_TC)
        tokens_A = order_A // ids_TC.shape[1]
        loads_E = torch.bincount(ids_TC.flatten(), minlength=self.down_proj.num_experts)
        ends_E = loads_E.cumsum(0).int()
        x_AD = _Spread.apply(x_TD, tokens_A, places_TC)
        y_AD = self.down_proj(gated_silu(self.gate_up_proj(x_AD, ends_E)), ends_E)
        return _Combine.apply(y_AD, gates_TC, expert_scale_TC, tokens_A, places_TC)

    def _one_token(self, x_1D: Tensor, ids_1C: Tensor, gates_1C: Tensor) -> Tensor:
        """Decoding: the chosen experts in turn, nothing to sort; [1, D]."""
        outputs = []
        for expert in ids_1C[0].tolist():
            mixed_1F = gated_silu(self.gate_up_proj.of(expert, x_1D))
            outputs.append(self.down_proj.of(expert, mixed_1F))
        y_CD = torch.cat(outputs)
        return gates_1C.to(y_CD.dtype) @ y_CD
