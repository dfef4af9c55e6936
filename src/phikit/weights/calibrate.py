"""GPTQ: rounding that knows what a layer is given (Frantar et al., 2022, arXiv 2210.17323).

A layer's output changes by (W - Q) x. Over the inputs x of a calibration text, its mean square is
tr((W - Q) H (W - Q)^T) with H = E[x x^T], so rows of W are independent and H is all there is to
know. Columns are rounded one after another; after each, those that are left move to where the error
so far is least (equation 2), which the Cholesky factor of H^-1 gives for all columns at once
(section 3.3). Columns with the largest inputs come first. The scales of the groups are chosen
before, so the order costs nothing at run time.

Blocks of the model are calibrated one after another, each on the outputs of those before it as they
are once quantised. So memory holds one block's activations and the moments of its linears, I^2
numbers for each, and for each expert of a mixture.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from phikit.base.errors import NumericsError
from phikit.models.decoder import Decoder
from phikit.nn.attention import CausalAttention
from phikit.nn.lora import BLOCKS
from phikit.nn.moe.experts import ExpertLinear
from phikit.weights.scales import LIMITS, choose_scales

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal of H, as in the paper."""
COLUMNS = 128
"""Rounded before the columns to their right are touched: one matrix product for all of them."""
MIN_SHARE = 0.25
"""A layer given fewer rows than this share of its width is rounded to nearest."""


class Moments:
    """Sums of x x^T over the inputs of a linear layer, or of each of some experts."""

    def __init__(self, count: int, width: int, *, device: torch.device) -> None:
        self._sums_EII = torch.zeros(count, width, width, device=device)
        self._rows = [0] * count

    def add(self, x: Tensor, *, expert: int = 0) -> None:
        """Count the rows of `x`, [..., I]."""
        x_SI = x.flatten(0, -2).float()
        self._sums_EII[expert].addmm_(x_SI.T, x_SI)
        self._rows[expert] += len(x_SI)

    def of(self, expert: int = 0) -> Tensor | None:
        """The mean, [I, I]; None if there were too few rows."""
        sum_II, rows = self._sums_EII[expert], self._rows[expert]
        return sum_II / rows if rows and rows >= MIN_SHARE * len(sum_II) else None


def watched_blocks(
    model: Decoder, rows: Sequence[Sequence[int]], *, paths: Collection[str]
) -> Iterator[tuple[list[str], Mapping[str, Moments]]]:
    """Yields, for each block, those of `paths` in it and the moments of their inputs.

    Before the next one, the block's outputs are computed as it then is: the caller may change it.
    """
    ids = [torch.tensor([row], device=model.device) for row in rows]
    states = [model.embed(tokens_1T) for tokens_1T in ids]
    for number, block in enumerate(model.model.layers):
        within = f"{BLOCKS}.{number}."
        inside = [path for path in paths if path.startswith(within)]
        with ExitStack() as stack:
            moments = {path: _watch(model.get_submodule(path), stack) for path in inside}
            for x_1TD in states:
                _run(model, block, x_1TD)
        yield inside, moments
        states = [_run(model, block, x_1TD) for x_1TD in states]


def _watch(module: nn.Module, stack: ExitStack) -> Moments:
    """Moments that count what `module` is given until `stack` closes."""
    weight = module.get_parameter("weight")
    experts = module.num_experts if isinstance(module, ExpertLinear) else 1
    moments = Moments(experts, weight.shape[-1], device=weight.device)

    def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, ExpertLinear):
            x_A, ends_E = given
            for expert, part in enumerate(x_A.tensor_split(ends_E[:-1].tolist())):
                moments.add(part, expert=expert)
        else:
            moments.add(given[0])

    stack.callback(module.register_forward_pre_hook(count).remove)
    return moments


@torch.inference_mode()
def _run(model: Decoder, block: nn.Module, x_1TD: Tensor) -> Tensor:
    positions_1T = torch.arange(x_1TD.shape[1], device=x_1TD.device)[None]
    attend = CausalAttention(window=model.config.sliding_window)
    return block(x_1TD, model.rope(positions_1T, dtype=x_1TD.dtype), attend)


def gptq(weight_OI: Tensor, moment_II: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers [O, I], int8, and scales [O, G], for a layer whose inputs have this moment."""
    importance_I = moment_II.diagonal()
    scales_OG = choose_scales(weight_OI, bits=bits, group=group, importance_I=importance_I)
    order_I = importance_I.argsort(descending=True)
    factor_II = _inverse_factor(moment_II[order_I][:, order_I])
    # Transposed: a column of W, which is worked on at once, is then a row in memory.
    left_IO = weight_OI.float().T[order_I].contiguous()
    scales_IO = scales_OG.T.repeat_interleave(group, 0)[order_I]
    inverse_IO = torch.where(scales_IO == 0, 0.0, 1 / scales_IO)
    q_IO = torch.empty_like(left_IO)
    for start in range(0, len(left_IO), COLUMNS):
        stop = min(start + COLUMNS, len(left_IO))
        errors = torch.empty_like(left_IO[start:stop])
        for i in range(start, stop):
            q_IO[i] = (left_IO[i] * inverse_IO[i]).round_().clamp_(*LIMITS[bits])
            error_O = (left_IO[i] - q_IO[i] * scales_IO[i]) / factor_II[i, i]
            left_IO[i + 1 : stop].addr_(factor_II[i, i + 1 : stop], error_O, alpha=-1)
            errors[i - start] = error_O
        left_IO[stop:].addmm_(factor_II[start:stop, stop:].T, errors, alpha=-1)
    q_OI = q_IO[order_I.argsort()].T.to(torch.int8)
    return q_OI, scales_OG


def _inverse_factor(moment_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moment.

    Raises NumericsError if the moment is not finite.
    """
    mean = moment_II.diagonal().mean().clamp(min=1e-30)
    if not mean.isfinite():
        raise NumericsError(
            "the model's activations on the calibration text are not finite",
            fix='load it in bfloat16 or float32, or round to nearest: method "rtn"',
        )
    eye_II = torch.eye(len(moment_II), device=moment_II.device)
    damping = DAMPING
    while True:
        lower_II, failed = torch.linalg.cholesky_ex(moment_II + damping * mean * eye_II)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower_II), upper=True)
        damping *= 10
