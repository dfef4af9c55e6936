"""Weights of 4 or 8 bits: their layout, and the layers that compute with them.

Only weights are quantised: `y = x @ dequantised(W)^T`. A row of W is cut into groups of neighbours
that share one bfloat16 scale, `W[o, i] ~= q[o, i] * scale[o, i // group]`, q being an integer of 4
bits (-8..7) or 8 (-127..127). No group has a zero point.

There is one layout, in memory and in files, made for processors that multiply pairs of 16-bit
integers: 16 rows of W are a panel, and a vector of 64 bytes holds, for each of them, two 16-bit
words of neighbouring columns. With r the row in the panel, p = 0, 1 and v the number of the vector:

- 8 bits: byte j of word 2 r + p is q[r, 4 v + 2 j + p], signed; j = 0, 1.
- 4 bits: nibble j of word 2 r + p is q[r, 8 v + 2 j + p] + 8, unsigned; j = 0..3, lowest first.

P panels (the last one padded with zero rows), G groups a row, g columns a group: `packed` is uint8
[P, G, 2 * bits * g], `scales` is bfloat16 [P, G, 16]; stacks of matrices have an E in front.

A few rows of activations go to the kernels, which read the packed form. Many rows (a prompt), and
all of them where there are no kernels, meet a dequantised copy of the matrix that lives as long as
the product.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.nn import kernels

PANEL = 16
"""Rows of a matrix that lie together."""


class QuantConfig(Config):
    """How a model's weights are quantised."""

    bits: Literal[4, 8] = 4
    group: int = Field(default=32, gt=0, multiple_of=32)
    """Neighbours in a row that share a scale."""
    method: Literal["rtn", "gptq"] = "rtn"
    """Round to nearest, or with an eye on what the layer is given; see `weights.quantise`."""
    embedding_bits: Literal[4, 8, 16] = 8
    """Of the embeddings and the head, where an error reaches every token; 16 leaves them alone."""


def pack(q_OI: Tensor, *, bits: int, group: int) -> Tensor:
    """Integers [O, I] in the layout of `packed`; `group` divides I."""
    columns = 32 // bits  # of a vector
    q_OI = F.pad(q_OI.to(torch.int8), (0, 0, 0, -len(q_OI) % PANEL))
    parts = q_OI.unflatten(1, (-1, group // columns, columns // 2, 2)).unflatten(0, (-1, PANEL))
    words = parts.permute(0, 2, 3, 1, 5, 4)  # [P, G, v, r, p, j]
    if bits == 4:
        low, high = (words + 8).view(torch.uint8).unflatten(-1, (2, 2)).unbind(-1)
        words = low | high << 4
    return words.flatten(2).view(torch.uint8)


def pack_scales(scales_OG: Tensor) -> Tensor:
    """Scales [O, G] in the layout of `scales`."""
    padded = F.pad(scales_OG, (0, 0, 0, -len(scales_OG) % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).bfloat16().contiguous()


def unpack(packed: Tensor, scales: Tensor, *, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The dequantised matrix [O, I], or stack of them [E, O, I]; each number is rounded once."""
    *_, out_features, in_features = shape
    group = in_features // scales.shape[-2]
    words = packed.unflatten(-1, (-1, PANEL, 2, 2))
    values = _integers(words, bits=packed.shape[-1] // (2 * group)).float()  # [P, G, v, r, j, p]
    values *= scales.float()[..., None, :, None, None]
    rows = values.movedim(-3, -5).flatten(-4).flatten(-3, -2)
    return rows[..., :out_features, :].to(dtype)


def _integers(words: Tensor, *, bits: int) -> Tensor:
    """The numbers of 16-bit words, uint8 [..., p, 2], in the order of columns: int8 [..., j, p]."""
    if bits == 4:
        words = torch.stack((words & 15, words >> 4), -1).flatten(-2) - 8  # modulo 256
    return words.view(torch.int8).transpose(-1, -2)


class PackedWeight(nn.Module):
    """A quantised matrix of shape [O, I], or a stack of them, [E, O, I].

    It takes the place of a layer's parameter `weight`. Being a module, it can be shared, by tied
    embeddings and head, and stays shared when the model moves to another device.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, shape: Sequence[int], *, bits: int, group: int) -> None:
        super().__init__()
        *stack, rows, width = shape
        assert width % group == 0 and group % 32 == 0 and bits in (4, 8), (shape, bits, group)
        self.shape, self.bits, self.group = torch.Size(shape), bits, group
        panels = (*stack, -(-rows // PANEL), width // group)
        self.register_buffer("packed", torch.zeros(*panels, 2 * bits * group, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(*panels, PANEL, dtype=torch.bfloat16))

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, bits={self.bits}, group={self.group}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move along with the model; a change of its dtype is not for the scales."""
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.packed.device)
        return self

    def fill(self, q_OI: Tensor, scales_OG: Tensor, *, expert: int | None = None) -> None:
        """Take these integers and scales; for a stack, as its matrix `expert`."""
        packed, scales = self._matrix(expert)
        packed.copy_(pack(q_OI, bits=self.bits, group=self.group))
        scales.copy_(pack_scales(scales_OG))

    def dequantise(self, dtype: torch.dtype, *, expert: int | None = None) -> Tensor:
        """The matrix in floating point; that of one expert where `expert` is given."""
        packed, scales = self._matrix(expert)
        shape = self.shape if expert is None else self.shape[1:]
        is_known = dtype in (torch.float32, torch.bfloat16)
        if len(shape) == 2 and is_known and kernels.ready(scales):
            return kernels.unpack(packed, scales, out=scales.new_empty(tuple(shape), dtype=dtype))
        return unpack(packed, scales, shape=shape, dtype=dtype)

    def product(
        self, x: Tensor, *, bias: Tensor | None = None, expert: int | None = None
    ) -> Tensor:
        """`x @ W^T + bias`, [..., I] to [..., O]."""
        packed, scales = self._matrix(expert)
        if x.numel() and kernels.ready(x, scales):
            rows = self.shape[-2]
            return kernels.packed_linear(x, packed, scales, out_features=rows, bias=bias)
        return F.linear(x, self.dequantise(x.dtype, expert=expert), bias)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of a matrix with these numbers, float32 [..., I]; reads no other rows."""
        panels, lanes = ids // PANEL, ids % PANEL
        words = self.packed.unflatten(-1, (-1, PANEL, 2, 2))[panels, :, :, lanes]
        values = _integers(words, bits=self.bits).flatten(-3).float()  # [..., G, columns]
        return (values * self.scales[panels, :, lanes].float()[..., None]).flatten(-2)

    def _matrix(self, expert: int | None) -> tuple[Tensor, Tensor]:
        if expert is None:
            return self.packed, self.scales
        return self.packed[expert], self.scales[expert]


class QuantLinear(nn.Module):
    """`nn.Linear` over a packed weight, [..., I] to [..., O]."""

    bias: nn.Parameter | None

    def __init__(self, weight: PackedWeight, *, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.product(input, bias=self.bias)


class QuantEmbedding(nn.Module):
    """`nn.Embedding` over a packed weight: ids [...] to float32 [..., D]."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


class QuantExpertLinear(nn.Module):
    """`nn.moe.experts.ExpertLinear` over a packed stack."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.num_experts = weight.shape[0]

    def forward(self, x_A: Tensor, ends_E: Tensor) -> Tensor:
        """Rows [A, in] to [A, out]; expert e owns the rows from `ends_E[e - 1]` to `ends_E[e]`."""
        parts = x_A.tensor_split(ends_E[:-1].tolist())
        return torch.cat([self.of(e, part) for e, part in enumerate(parts) if len(part)])

    def of(self, expert: int, x: Tensor) -> Tensor:
        """One expert's product, [..., in] to [..., out]."""
        return self.weight.product(x, expert=expert)
