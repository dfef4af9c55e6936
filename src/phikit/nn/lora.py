"""Low-rank adapters (Hu et al., 2021): one frozen linear, any number of named adapters.

`LoRALinear` *is* an `nn.Linear`, so the base weight keeps its checkpoint key and a model with
adapters loads a checkpoint without them. With no adapter chosen the base runs exactly, bit for bit.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """`scale * B(A(x))`, with A drawn like a linear layer and B zero: the identity at the start."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a_RD = nn.Parameter(torch.empty(rank, in_features))
        self.b_DR = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.a_RD, a=5**0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a_RD), self.b_DR) * self.scale

    def delta(self) -> Tensor:
        """The dense update this adapter stands for, in float32, [out, in]."""
        return self.scale * (self.b_DR.float() @ self.a_RD.float())


class LoRALinear(nn.Linear):
    """A linear layer with named low-rank adapters, of which at most one is active."""

    @classmethod
    def wrap(cls, linear: nn.Linear) -> "LoRALinear":
        """A LoRALinear that shares `linear`'s parameters, which are frozen."""
        wrapped = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        wrapped.weight, wrapped.bias = linear.weight, linear.bias
        wrapped.requires_grad_(False)
        wrapped.adapters = nn.ModuleDict()
        wrapped.active = None
        return wrapped

    adapters: nn.ModuleDict
    active: str | None

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)
        return y if self.active is None else y + self.adapters[self.active](input)


def attach_lora(
    model: nn.Module,
    *,
    name: str,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freeze `model`, give the linears named in `targets` an adapter each; return its weights.

    The adapter is active from then on; `choose_adapter(model, None)` gives the base back.
    """
    model.requires_grad_(False)
    trainable: list[nn.Parameter] = []
    wanted = set(targets)
    for path, module in list(model.named_modules()):
        leaf = path.rpartition(".")[2]
        if leaf not in wanted or not isinstance(module, nn.Linear):
            continue
        wrapped = module if isinstance(module, LoRALinear) else LoRALinear.wrap(module)
        adapter = LowRank(
            module.in_features, module.out_features, rank=rank, alpha=alpha, generator=generator
        )
        wrapped.adapters[name] = adapter.to(module.weight.device, module.weight.dtype)
        wrapped.active = name
        model.get_submodule(path.rpartition(".")[0]).register_module(leaf, wrapped)
        trainable += wrapped.adapters[name].parameters()
    return trainable


def choose_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter `name` the active one everywhere; None runs the bare base."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.active = name


@torch.no_grad()
def merge_lora(model: nn.Module, name: str) -> None:
    """Add adapter `name` into the base weights (in float32) and remove all adapters."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, LoRALinear):
            continue
        update = module.adapters[name].delta()  # pyright: ignore[reportCallIssue]
        plain = nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta"
        )
        weight = (module.weight.float() + update).to(module.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(weight), module.bias
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent).register_module(leaf, plain)
