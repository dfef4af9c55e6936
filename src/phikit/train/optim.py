"""The optimiser: AdamW, and Muon for the matrices inside the blocks, on float32 master weights.

Muon (Jordan et al., 2024) replaces the momentum of a weight matrix by its nearest semi-orthogonal
matrix, found by five Newton-Schulz steps. Matrices of one shape are stepped together as one batched
product; a stack of experts is as many matrices. A router's matrix is AdamW's: its rows are what
tokens are compared with, one by one, and an orthogonal step would move rows of experts that few
tokens meet as far as all others. The model's own weights may be bfloat16; they are rounded copies
of the masters.
AdamW: Loshchilov & Hutter, 2019.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from phikit.base.config import Config

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class OptimConfig(Config):
    """Learning rates and constants of the optimiser."""

    adam_lr: float
    muon_lr: float | None = None
    """None trains every parameter with AdamW."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    clip_norm: float | None = 1.0
    """Bound on the global gradient norm."""
    warmup: float = 0.0
    """Share of the steps over which the rate rises linearly from 0."""
    decay: float = 0.0
    """Share of the steps, at the end, over which it falls linearly to `final`."""
    final: float = 0.0
    scales: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Factors of the learning rates for the parameters of the modules that are named, each by one
    part of a path: `{"img_processor": 0.1}`. The first that fits counts."""

    def scale(self, name: str) -> float:
        """The factor for the parameter of this name."""
        parts = name.split(".")
        return next((factor for part, factor in self.scales.items() if part in parts), 1.0)

    def rate(self, step: int, steps: int) -> float:
        """Multiplier of the learning rates at `step` of `steps`, in (0, 1]."""
        rise = (step + 1) / (self.warmup * steps) if self.warmup else 1.0
        left = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return min(1.0, rise, self.final + (1 - self.final) * left)


class Optimiser:
    """Masters, moments and the update. Gradients are gathered in float32 by `accumulate`."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> None:
        self.config = config
        named = [(name, p) for name, p in parameters if p.requires_grad]
        by_shape: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in named:
            is_muons = config.muon_lr is not None and _is_matrix(name, parameter)
            shape = "x".join(map(str, parameter.shape))
            scale = config.scale(name)
            of = shape if scale == 1 else f"{shape}@{scale:g}"
            key = f"muon.{of}" if is_muons else f"adam.{name}"
            by_shape.setdefault(key, []).append((name, parameter))
        self.groups = {key: [p for _, p in members] for key, members in by_shape.items()}
        self.names = {key: [n for n, _ in members] for key, members in by_shape.items()}
        self.scales = {key: config.scale(names[0]) for key, names in self.names.items()}
        self.master = {
            k: torch.stack([p.detach().float() for p in g]) for k, g in self.groups.items()
        }
        self.gradient = {k: torch.zeros_like(m) for k, m in self.master.items()}
        self.first = {k: torch.zeros_like(m) for k, m in self.master.items()}
        self.second = {k: torch.zeros_like(m) for k, m in self.master.items() if "adam" in k[:4]}
        self.steps = 0

    def accumulate(self) -> None:
        """Move the gradients of one micro-batch into the float32 sums."""
        for key, group in self.groups.items():
            for total, parameter in zip(self.gradient[key], group, strict=True):
                if parameter.grad is not None:
                    total += parameter.grad
                    parameter.grad = None

    def clip(self) -> float:
        """Sum gradients over ranks and bound their norm; returns the norm before clipping."""
        gradients = list(self.gradient.values())
        if dist.is_initialized():
            for gradient in gradients:
                dist.all_reduce(gradient)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        if self.config.clip_norm is not None:
            torch._foreach_mul_(gradients, float((self.config.clip_norm / norm).clamp(max=1.0)))
        return float(norm)

    def step(self, rate: float) -> None:
        """Apply the summed gradients at `rate` times the configured learning rates."""
        self.steps += 1
        for key, gradient in self.gradient.items():
            update = self._muon if key.startswith("muon") else self._adam
            update(key, gradient, rate * self.scales[key])
            gradient.zero_()
            with torch.no_grad():
                for master, parameter in zip(self.master[key], self.groups[key], strict=True):
                    parameter.copy_(master)

    def _adam(self, key: str, gradient: Tensor, rate: float) -> None:
        config, master = self.config, self.master[key]
        beta1, beta2 = config.betas
        first = self.first[key].lerp_(gradient, 1 - beta1)
        second = self.second[key].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / (1 - beta2**self.steps)).sqrt_().add_(config.eps)
        if master.ndim > 2:  # norms are not decayed
            master.mul_(1 - rate * config.adam_lr * config.weight_decay)
        master.addcdiv_(first, root, value=-rate * config.adam_lr / (1 - beta1**self.steps))

    def _muon(self, key: str, gradient: Tensor, rate: float) -> None:
        config, master = self.config, self.master[key]
        assert config.muon_lr is not None
        momentum = self.first[key].lerp_(gradient, 1 - config.momentum)
        direction = orthogonalise(gradient.lerp(momentum, config.momentum))
        stretch = max(1.0, master.shape[-2] / master.shape[-1]) ** 0.5
        master.mul_(1 - rate * config.muon_lr * config.weight_decay)
        master.add_(direction, alpha=-rate * config.muon_lr * stretch)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        parts = {"master": self.master, "first": self.first, "second": self.second}
        tensors = {f"{part}/{key}": t for part, group in parts.items() for key, t in group.items()}
        return {**tensors, "steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`; the model's weights are set from the masters."""
        self.steps = int(state["steps"])
        parts = {"master": self.master, "first": self.first, "second": self.second}
        for part, group in parts.items():
            for key, tensor in group.items():
                tensor.copy_(state[f"{part}/{key}"])
        with torch.no_grad():
            for key, group in self.groups.items():
                for master, parameter in zip(self.master[key], group, strict=True):
                    parameter.copy_(master)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix of a block, or a stack of them, one for each expert.

    A Conformer calls its blocks `encoders`; what has three dimensions there is a convolution.
    """
    if ".encoders." in name:
        return parameter.ndim == 2
    return parameter.ndim in (2, 3) and ".layers." in name and ".router." not in name


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximately U V^T of each matrix's singular value decomposition; float32 [..., rows, cols].

    Newton-Schulz in bfloat16: singular values end within about 0.3 of 1, which is all Muon needs.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).float()
