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
    return F.grouped_mm(x_A, weight_EOI.transpose(1, 2), offs=ends_E)


def looped_product(x_A: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The same expert by expert, for any device, shape and dtype.

    `unbind` gathers the gradient of all experts at once; indexing the stack would add up as many
    tensors of its whole size.
    """
    parts = x_A.tensor_split(ends_E[:-1].tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight_EOI.unbind(), strict=True)])


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None


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
        is_alone = len(x_TD) == 1
        y_TCD = (self._one_token if is_alone else self._sorted)(x_TD, ids_TC)
        if expert_scale_TC is not None:
            scale_TC1 = expert_scale_TC[..., None].to(y_TCD.dtype)
            y_TCD = _ScaleGradient.apply(y_TCD, scale_TC1)
        if is_alone:
            return gates_TC.to(y_TCD.dtype) @ y_TCD[0]
        # Gates in float32 are not rounded before they are multiplied.
        return (y_TCD * gates_TC[..., None]).sum(1).to(y_TCD.dtype)

    def _sorted(self, x_TD: Tensor, ids_TC: Tensor) -> Tensor:
        """Each chosen expert's output, [T, C, D]."""
        ids_A, order_A = ids_TC.flatten().sort(stable=True)
        ends_E = torch.bincount(ids_A, minlength=self.down_proj.num_experts).cumsum(0).int()
        mixed_AF = gated_silu(self.gate_up_proj(x_TD[order_A // ids_TC.shape[1]], ends_E))
        y_AD = self.down_proj(mixed_AF, ends_E)
        # Back into the order of the tokens, and only then a sum: the result is deterministic.
        return y_AD[order_A.argsort()].unflatten(0, ids_TC.shape)

    def _one_token(self, x_1D: Tensor, ids_1C: Tensor) -> Tensor:
        """Decoding: the chosen experts in turn, nothing to sort; [1, C, D]."""
        outputs = []
        for expert in ids_1C[0].tolist():
            mixed_1F = gated_silu(self.gate_up_proj.of(expert, x_1D))
            outputs.append(self.down_proj.of(expert, mixed_1F))
        return torch.stack(outputs, 1)
