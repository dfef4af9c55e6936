"""A router, its experts, and perhaps an expert that all tokens share, as a feed-forward block."""

from collections.abc import Callable

from torch import Tensor, nn

from phikit.nn.mlp import SwiGLU
from phikit.nn.moe.experts import Experts
from phikit.nn.moe.router import Routing


class MoE(nn.Module):
    """A mixture of experts in the place of a feed-forward block, [B, T, D] to [B, T, D]."""

    def __init__(
        self, router: nn.Module, experts: Experts, *, shared: SwiGLU | None = None
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.guide: Callable[[Tensor], Routing] | None = None
        """Routes in the router's place while a `RouterSession` trains it."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_TD = x_BTD.flatten(0, 1)
        routing: Routing = (self.guide or self.router)(x_TD)
        y_TD = self.experts(x_TD, routing.ids_TC, routing.gates_TC, routing.expert_scale_TC)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view_as(x_BTD)
