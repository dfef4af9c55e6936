"""The training of routers: chance, balance and statistics, beside whatever objective is trained.

A session routes in the place of a model's routers while micro-batches run, and at no other time:
rollouts and evaluations between steps are deterministic, in train mode too.

- **Chance** is a function of (seed, step, data rank, micro-batch, layer). So a block that is run
  again by activation checkpointing draws the same, a resumed run draws what the unbroken one did,
  ranks that share their data (tensor parallel) agree without a word, data-parallel ranks differ.
- **Auxiliary losses** never meet the objective: their gradient with respect to the logits is exact
  and cheap, and is added to what arrives there in the backward pass. So no form of checkpointing
  or sharding can lose it or count it twice. Each layer has its own loss; layers add up.
- **Loads** for the global balance loss are those of all ranks, and of the step's micro-batches up
  to now (as in arXiv 2501.11873): those to come are not known yet, which is the one way in which
  cutting a step into more micro-batches changes its result. Loads carry no gradient, so the parts
  of the loss that ranks and micro-batches contribute add up to the whole.

Sources: GRIN (arXiv 2409.12136), section 3.3, for the global loss; 2408.15664 for the bias.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from phikit.base.config import Config
from phikit.base.errors import ConfigError
from phikit.nn.moe.balance import balance_loss, bias_step, max_violation, z_loss
from phikit.nn.moe.block import MoE
from phikit.nn.moe.estimator import RandomDraws
from phikit.nn.moe.router import (
    Router,
    RouterStats,
    Routing,
    SigmoidRouter,
    SparseMixerRouter,
)

SUMS = ("tokens", "entropy", "single", "gate_sum", "z")
"""What is summed over tokens, after the loads of the experts and their shares."""


class RoutingConfig(Config):
    """How the routers of a mixture of experts are trained; other models leave it as it is."""

    sampled: bool = True
    """Whether routers that can draw do so. False trains with the routing of evaluation, which is
    what fine-tuning and reinforcement learning on finished models want."""
    frozen: bool = False
    """Whether the routers' weights stay as they are."""
    balance: Literal["local", "global", "bias"] | None = None
    """Keep loads even: by a loss on the loads of each micro-batch of each rank; by one on the loads
    of the whole step; or by the bias of sigmoid routers."""
    balance_coefficient: float = Field(default=0.01, ge=0)
    """Factor on each layer's balance loss, which is 1 for even loads. GRIN's is unpublished."""
    bias_rate: float = Field(default=1e-3, ge=0)
    """What a bias moves in a step."""
    z_coefficient: float = Field(default=0.0, ge=0)
    """Factor on each layer's z-loss, the mean squared log-sum-exp of its logits."""


class _AddGradient(torch.autograd.Function):
    """The gates unchanged; backward adds a gradient to that of the scores."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, scores: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad, gradient, None


class RouterSession:
    """Trains the routers of a model, if it has any. In a loop:

        session.begin(step, batches=len(batches), tokens=tokens_of_the_step_over_all_ranks)
        for batch in batches:
            with session.micro_batch(batch.is_text_BT):
                loss = ...  # one forward pass
            loss.backward()
        metrics = session.end()

    Args:
        model: routers are those of the `MoE` blocks in it.
        config: what to do.
        seed: of everything drawn.
        group: the data-parallel group, if it is not all processes.

    Raises ConfigError if the model has not the routers that the config is about.
    """

    def __init__(
        self,
        model: nn.Module,
        config: RoutingConfig,
        *,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config, self.seed, self.group = config, seed, group
        found = [module for module in model.modules() if isinstance(module, MoE)]
        self.blocks = [block for block in found if isinstance(block.router, Router)]
        self.routers = [block.router for block in self.blocks if isinstance(block.router, Router)]
        _check(config, self.routers)
        self._is_together = dist.is_initialized() and dist.get_world_size(group) > 1
        self._rank = dist.get_rank(group) if self._is_together else 0
        self._biases = {
            layer: router.bias.float().clone()
            for layer, router in enumerate(self.routers)
            if isinstance(router, SigmoidRouter)
        }
        weights = [router.gate.weight for router in self.routers if config.frozen]
        self._frozen = [weight for weight in weights if weight.requires_grad]
        for weight in self._frozen:
            weight.requires_grad_(False)
        self._step = self._tokens = self._most_batches = 0
        self._loads_LE = self._sums_L = torch.empty(0)

    def begin(self, step: int, *, batches: int, tokens: int) -> None:
        """Start a step of so many micro-batches on this rank and `tokens` tokens over all ranks."""
        self._step, self._tokens, self._most_batches = step, tokens, batches
        self._batch = -1
        if not self.routers:
            return
        device = self.routers[0].gate.weight.device
        if self._is_together and self.config.balance == "global":
            most = torch.tensor(batches, device=device)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
            self._most_batches = int(most)
        layers, num_experts = len(self.routers), len(self.routers[0].gate.weight)
        self._loads_LE = torch.zeros(layers, num_experts, device=device)
        self._sums_L = torch.zeros(layers, 2 * num_experts + len(SUMS), device=device)

    @contextmanager
    def micro_batch(self, is_text_BT: Tensor) -> Iterator[None]:
        """Train the routers in one forward pass, and in what its backward pass runs again.

        `is_text_BT` is False for padding, which is routed but neither balanced nor counted.
        """
        self._batch += 1
        self._counts_T = is_text_BT.flatten().float()
        self._seen: dict[int, Tensor] = {}
        self._is_again = False
        for layer, block in enumerate(self.blocks):
            block.guide = partial(self._route, layer)
        yield
        self._is_again = True

    def end(self) -> dict[str, float]:
        """Finish the step on all ranks: move the biases; statistics over all ranks, for the log."""
        for block in self.blocks:
            block.guide = None
        for _ in range(self._batch + 1, self._most_batches):  # of other ranks: this one had fewer
            for load_E in self._loads_LE:
                self._over_ranks(torch.zeros_like(load_E))
        if not self.routers or not self._tokens:
            return {}
        if self._is_together:
            dist.all_reduce(self._sums_L, group=self.group)
        if self.config.balance == "bias":
            for layer, bias_E in self._biases.items():
                load_E = self._sums_L[layer, : len(bias_E)]
                bias_E += bias_step(load_E, rate=self.config.bias_rate)
                self.routers[layer].get_buffer("bias").copy_(bias_E)
        return self._metrics()

    def close(self) -> None:
        """Let go of the model: its routers are deterministic again, and as trainable as before."""
        for block in self.blocks:
            block.guide = None
        for weight in self._frozen:
            weight.requires_grad_(True)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights: biases in full precision."""
        return {f"router/bias.{layer}": bias_E for layer, bias_E in self._biases.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""
        for layer, bias_E in self._biases.items():
            bias_E.copy_(state[f"router/bias.{layer}"])
            self.routers[layer].get_buffer("bias").copy_(bias_E)

    def _route(self, layer: int, x_TD: Tensor) -> Routing:
        router = self.routers[layer]
        draws = RandomDraws(self._generator(layer, x_TD.device)) if self.config.sampled else None
        routing: Routing = router(x_TD, draws=draws, is_learning=True)
        with torch.no_grad():
            is_new = layer not in self._seen
            assert is_new or self._is_again, "one forward pass a micro-batch"
            load_E = routing.stats.load_E(self._counts_T).float()
            if is_new:
                self._seen[layer] = self._balanced(layer, load_E)
        scores_TE = routing.stats.scores_TE
        # A graph that nothing runs backward would never be freed: it holds its own results.
        learns = self._has_losses and scores_TE.requires_grad
        # Activation checkpointing would take what this little graph keeps for its own, and run the
        # whole block again to get it back.
        with saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            leaf_TE = scores_TE.detach().requires_grad_(learns)
            shares_TE = router.share(leaf_TE)
            gates_TC = routing.gates_TC
            if learns:
                gates_TC = self._with_losses(routing, leaf_TE, shares_TE, self._seen[layer])
        if is_new:
            self._count(layer, routing.stats, shares_TE, load_E)
        return routing._replace(gates_TC=gates_TC)

    @property
    def _has_losses(self) -> bool:
        """Whether anything is added to the loss."""
        return self._is_balanced_by_loss or bool(self.config.z_coefficient)

    @property
    def _is_balanced_by_loss(self) -> bool:
        config = self.config
        return config.balance in ("local", "global") and bool(config.balance_coefficient)

    def _balanced(self, layer: int, load_E: Tensor) -> Tensor:
        """The loads that the balance loss is about."""
        if self.config.balance != "global":
            return load_E
        self._loads_LE[layer] += self._over_ranks(load_E.clone())
        return self._loads_LE[layer].clone()

    def _over_ranks(self, load_E: Tensor) -> Tensor:
        if self._is_together and self.config.balance == "global":
            dist.all_reduce(load_E, group=self.group)
        return load_E

    def _with_losses(
        self, routing: Routing, leaf_TE: Tensor, shares_TE: Tensor, load_E: Tensor
    ) -> Tensor:
        """The gates, which carry the gradient of the auxiliary losses to the scores.

        `leaf_TE` is the scores as a leaf, of which `shares_TE` are computed.
        """
        config, losses = self.config, []
        if self._is_balanced_by_loss:
            balance = balance_loss(shares_TE, load_E, self._counts_T)
            losses.append(config.balance_coefficient * balance)
        if config.z_coefficient:
            losses.append(config.z_coefficient * z_loss(leaf_TE, self._counts_T))
        [gradient_TE] = torch.autograd.grad(torch.stack(losses).sum() / self._tokens, leaf_TE)
        return _AddGradient.apply(  # pyright: ignore[reportReturnType]
            routing.gates_TC, routing.stats.scores_TE, gradient_TE
        )

    @torch.no_grad()
    def _count(self, layer: int, stats: RouterStats, shares_TE: Tensor, load_E: Tensor) -> None:
        counts_T = self._counts_T
        of_tokens = {
            "tokens": torch.ones_like(counts_T),
            "entropy": torch.special.entr(shares_TE).sum(-1),  # in nats
            "single": stats.is_single_T() if stats.candidates else torch.zeros_like(counts_T),
            "gate_sum": stats.gate_sum_T(),
            "z": stats.scores_TE.logsumexp(-1).square(),
        }
        values_ST = torch.stack([of_tokens[name].float() for name in SUMS])
        sums = [load_E, counts_T @ shares_TE.float(), values_ST @ counts_T]
        self._sums_L[layer] += torch.cat(sums)

    def _metrics(self) -> dict[str, float]:
        """Means over tokens and then over layers; loads for each expert."""
        of_layers: list[dict[str, float]] = []
        metrics: dict[str, float] = {}
        one = torch.ones(1)
        for layer, sums in enumerate(self._sums_L.cpu()):
            tokens, *rest = sums[-len(SUMS) :].tolist()
            load_E, share_E = sums[: -len(SUMS)].chunk(2)
            found = {name: value / tokens for name, value in zip(SUMS[1:], rest, strict=True)}
            found["balance"] = float(balance_loss(share_E[None] / tokens, load_E, one))
            found["max_vio"] = float(max_violation(load_E))
            if not isinstance(self.routers[layer], SparseMixerRouter):
                del found["single"]
            of_layers.append(found)
            for expert, share in enumerate((load_E / load_E.sum()).tolist()):
                metrics[f"router.load.{layer}.{expert}"] = share
        means = {
            f"router.{name}": sum(found[name] for found in of_layers) / len(of_layers)
            for name in of_layers[0]
        }
        return means | metrics

    def _generator(self, layer: int, device: torch.device) -> torch.Generator:
        where = (self.seed, self._step, self._rank, self._batch, layer)
        digest = hashlib.blake2b(repr(where).encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def _check(config: RoutingConfig, routers: list[Router]) -> None:
    if not routers and config != RoutingConfig():
        raise ConfigError(
            "the model has no routers, and routing is configured",
            fix="remove the settings of loop.routing, or train a mixture of experts",
        )
    others = [type(router).__name__ for router in routers if not isinstance(router, SigmoidRouter)]
    if config.balance == "bias" and others:
        raise ConfigError(
            f"balance by bias needs sigmoid routers, and the model has a {others[0]}",
            fix='choose routing.balance="global", or the router {"kind": "sigmoid"}',
        )
