"""The linear layer of decoder blocks and heads: `nn.Linear`, with a faster way to decode.

Parameters, checkpoint keys and the training path are those of `nn.Linear`. In inference mode, few
rows on the CPU go to a kernel of ours, which reads the weights at the speed of memory where torch's
bfloat16 product reaches half of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phikit.nn import kernels


class Linear(nn.Linear):
    """`nn.Linear`, [..., I] to [..., O]."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by the kernel where that is the faster one."""
    if kernels.ready(x, weight) and x.dtype == weight.dtype and kernels.serves(x):
        return kernels.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def padded_rows(rows: int, device: torch.device) -> int:
    """A number of rows, at least `rows`, that products on this device have likely met before.

    oneDNN compiles a kernel for every new shape of a bfloat16 product, which takes 10 ms; here
    there are eight sizes from one power of two to the next.
    """
    if device.type != "cpu":
        return rows
    step = 1 << max(0, rows.bit_length() - 4)
    return rows + -rows % step
