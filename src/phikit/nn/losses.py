"""Log-probabilities of tokens straight from hidden states, without the full logits in memory.

Logits of shape tokens x vocabulary dominate the memory of training a small model. Here they exist
only for a chunk of tokens at a time: the forward pass keeps one number per token (the log-sum-exp),
the backward pass recomputes the chunk. Only the last chunk is kept, whose memory the backward pass
would need again at once; a small batch is one chunk. Every objective is built on this one function:
cross-entropy is its negative, DPO sums it over replies, policy gradients weigh it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits held at once (float32: 16 MiB)."""
ROWS_STEP = 256
"""Rows are padded to a multiple of this. On CPU a matrix product of a shape not met before compiles
a kernel for 10 ms, and the number of supervised tokens is a new one in every batch."""


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
        norms, chosen, entropies, log_probs = [], [], [], None
        for start in range(0, len(x_ND), chunk):
            logits = _logits(x_ND[start : start + chunk], weight_VD, bias_V, temperature)
            targets = targets_N[start : start + chunk, None]
            norm = logits.logsumexp(-1)
            log_probs = logits.sub_(norm[:, None])
            chosen.append(log_probs.gather(-1, targets)[:, 0])
            if wants_entropy:
                if bias_V is not None:  # -inf rules a token out, and 0 * -inf is not a number
                    log_probs.clamp_(min=torch.finfo(torch.float32).min)
                entropies.append(-(log_probs.exp() * log_probs).sum(-1))
            norms.append(norm)
        empty = x_ND.new_zeros(0, dtype=torch.float32)
        norms_N = torch.cat([empty, *norms])
        ctx.save_for_backward(x_ND, weight_VD, bias_V, targets_N, norms_N, log_probs)
        ctx.temperature, ctx.chunk = temperature, chunk
        entropy_N = torch.cat([empty, *entropies])
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat([empty, *chosen]), entropy_N

    @staticmethod
    def backward(
        ctx: Any, grad_N: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        x_ND, weight_VD, bias_V, targets_N, norms_N, last = ctx.saved_tensors
        grad_x = torch.empty_like(x_ND)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias_V, dtype=torch.float32)
        for start in range(0, len(x_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            if start + ctx.chunk < len(x_ND):
                logits = _logits(x_ND[rows], weight_VD, bias_V, ctx.temperature)
                probs = logits.sub_(norms_N[rows, None]).exp_()
            else:
                probs = last.exp()
            scale = -grad_N[rows, None] / ctx.temperature
            grad = probs.mul_(scale)
            grad.scatter_add_(1, targets_N[rows, None], -scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(x_ND.dtype)
            grad_x[rows] = grad @ weight_VD
            if grad_weight is not None:
                grad_weight += grad.T @ x_ND[rows]
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(weight_VD.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _logits(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    logits = F.linear(x_ND, weight_VD, bias_V).float()
    return logits if temperature == 1 else logits.div_(temperature)


def token_log_probs(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each target under softmax((x W^T + b) / temperature), nats, float32 [N].

    Gradients flow to `x_ND`, `weight_VD` and `bias_V`.
    """
    return _padded(x_ND, weight_VD, targets_N, bias_V, temperature, wants_entropy=False)[0]


def token_log_probs_and_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`token_log_probs`, and the entropy of each distribution in nats, float32 [N], no gradient."""
    return _padded(x_ND, weight_VD, targets_N, bias_V, temperature, wants_entropy=True)


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, bias_V: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of each target in nats, float32 [N], not summed."""
    return -token_log_probs(x_ND, weight_VD, targets_N, bias_V=bias_V)


def _padded(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    *,
    wants_entropy: bool,
) -> tuple[Tensor, Tensor]:
    count = len(x_ND)
    padding = -count % ROWS_STEP if x_ND.device.type == "cpu" else 0
    log_probs_N, entropy_N = _TokenLogProbs.apply(  # pyright: ignore[reportGeneralTypeIssues]
        F.pad(x_ND, (0, 0, 0, padding)),
        weight_VD,
        bias_V,
        F.pad(targets_N, (0, padding)),
        temperature,
        wants_entropy,
    )
    return log_probs_N[:count], entropy_N[:count]
