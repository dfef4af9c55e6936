"""Even loads: the auxiliary losses of routers, and the bias that needs no loss.

All are sums over tokens; the caller divides by the number of tokens once, so that micro-batches
and ranks add up to the loss of the whole step.
"""

import torch
from torch import Tensor


def balance_loss(shares_TE: Tensor, load_E: Tensor, counts_T: Tensor) -> Tensor:
    """E sum_i f_i P_i, summed over tokens: 1 for each if the load is even, however many choices.

    Switch Transformer (arXiv 2101.03961), equation 4. Gradient flows through the shares alone.

    Args:
        shares_TE: each token's softmax over all experts.
        load_E: assignments of each expert, over whatever part of the step is to be balanced.
        counts_T: 1 for a token that counts, 0 for padding.
    """
    f_E = load_E.to(shares_TE.dtype)
    f_E = f_E / f_E.sum().clamp(min=1)
    return f_E.numel() * ((shares_TE @ f_E) * counts_T).sum()


def z_loss(scores_TE: Tensor, counts_T: Tensor) -> Tensor:
    """Squared log-sum-exp of the logits, summed over tokens: keeps them small (ST-MoE, 2202.08906).

    Arguments as in `balance_loss`.
    """
    return (scores_TE.logsumexp(-1).square() * counts_T).sum()


def bias_step(load_E: Tensor, *, rate: float) -> Tensor:
    """What to add to the selection bias of each expert: up for the idle, down for the busy.

    `rate` times the sign of (mean load - load), the mean of the signs taken off, so that the biases
    do not drift together (arXiv 2408.15664; the centring is torchtitan's).
    """
    signs_E = torch.sign(load_E.mean() - load_E)
    return rate * (signs_E - signs_E.mean())


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio of arXiv 2408.15664: largest load over mean load, minus 1."""
    return load_E.max() / load_E.mean() - 1
