"""Low-rank adapters (Hu et al., 2021): one frozen linear, any number of named adapters.

`LoRALinear` *is* a `Linear`, and `LoRAQuantLinear` a `QuantLinear`, so the base weight keeps its
checkpoint key and a model with adapters loads a checkpoint without them.

Which adapter a row of the batch uses is data, not a property of the model (the Mixture-of-LoRAs of
Phi-4-multimodal, arXiv 2503.01743, section 2.2.1): the linears of a model share one `AdapterRoute`,
and `route_adapters` sets it for one forward pass. The base runs once for the whole batch and every
adapter adds to its own rows alone, all adapters in one grouped product (`nn.low_rank`). So a row
without an adapter is what the base computes, bit for bit, whatever its neighbours do.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from phikit.base.errors import ConfigError, WeightsError
from phikit.nn.linear import Linear, product
from phikit.nn.low_rank import Factors, add_update, grouped_update
from phikit.nn.moe.experts import ExpertLinear, expert_product
from phikit.nn.quantised import PackedWeight, QuantExpertLinear, QuantLinear

BLOCKS = "model.layers"
"""Where a decoder keeps its blocks; its encoders may have linears of the same names."""


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

    @classmethod
    def of(cls, a_RD: Tensor, b_DR: Tensor, *, scale: float) -> "LowRank":
        """The adapter with these weights."""
        with torch.device("meta"):
            adapter = cls(a_RD.shape[1], len(b_DR), rank=len(a_RD), alpha=scale * len(a_RD))
        adapter.a_RD, adapter.b_DR, adapter.scale = nn.Parameter(a_RD), nn.Parameter(b_DR), scale
        return adapter

    @property
    def factors(self) -> Factors:
        return Factors(self.a_RD, self.b_DR, self.scale)

    def delta(self) -> Tensor:
        """The dense update this adapter stands for, in float32, [out, in]."""
        return self.scale * (self.b_DR.float() @ self.a_RD.float())


class LowRankExperts(nn.Module):
    """A `LowRank` for each of a stack of experts."""

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.a_ERD = nn.Parameter(torch.empty(num_experts, rank, in_features))
        self.b_EDR = nn.Parameter(torch.zeros(num_experts, out_features, rank))
        for a_RD in self.a_ERD.detach():
            nn.init.kaiming_uniform_(a_RD, a=5**0.5, generator=generator)

    def forward(self, x_A: Tensor, ends_E: Tensor) -> Tensor:
        inner_AR = expert_product(x_A, self.a_ERD, ends_E) * self.scale
        return expert_product(inner_AR, self.b_EDR, ends_E)

    def of(self, expert: int, x: Tensor) -> Tensor:
        """One expert's update, [..., in] to [..., out]."""
        return product(product(x, self.a_ERD[expert]) * self.scale, self.b_EDR[expert])

    def delta(self) -> Tensor:
        """The dense updates this adapter stands for, in float32, [E, out, in]."""
        return self.scale * (self.b_EDR.float() @ self.a_ERD.float())


class AdapterRows(NamedTuple):
    """The rows of a batch that use one adapter, int64; None is all of them."""

    name: str
    rows: Tensor | None


class AdapterRoute:
    """Which adapters run: shared by all adapted linears of a model, not safe across threads."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """All adapters of the model, in the order they were attached."""
        self.chosen: str | None = None
        """The adapter of rows that name none."""
        self.parts: tuple[AdapterRows, ...] | None = None
        """Set during a routed pass; None sends all rows through `chosen`."""
        self.is_sorted = False
        """Whether the parts, one after another, are all rows of the batch in their order."""

    def now(self) -> tuple[AdapterRows, ...]:
        """The parts of the running batch that use an adapter."""
        if self.parts is not None:
            return self.parts
        return () if self.chosen is None else (AdapterRows(self.chosen, None),)

    def check(self, name: str) -> None:
        """Raise ConfigError if the model has no adapter `name`."""
        if name not in self.names:
            raise ConfigError(
                f"the model has no adapter {name!r}",
                fix=f"it has {', '.join(self.names)}"
                if self.names
                else "attach one first (nn.lora.attach_lora)",
            )


class Adapted(nn.Module):
    """What a layer with named low-rank adapters has; at most one of them acts on each row."""

    adapters: nn.ModuleDict
    route: AdapterRoute

    def adapt(self, route: AdapterRoute, adapters: nn.ModuleDict | None = None) -> Self:
        """Begin with these adapters, or with none."""
        self.adapters = nn.ModuleDict() if adapters is None else adapters
        self.route = route
        return self

    def bare(self) -> nn.Module:
        """The layer without its adapters, sharing its parameters."""
        raise NotImplementedError


class AdaptedRows(Adapted):
    """Adapters of a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        y, now = super().forward(input), self.route.now()
        parts = [part for part in now if part.name in self.adapters]
        if not parts:
            return y
        factors = [self._factors(part.name) for part in parts]
        rows = [part.rows for part in parts if part.rows is not None]
        if not rows:  # one adapter for all rows leaves none for another
            return add_update(y, input, factors, [len(input)])
        counts = [len(each) for each in rows]
        if self.route.is_sorted and len(parts) == len(now):
            return add_update(y, input, factors, counts)
        index = torch.cat(rows)
        return y.index_add_(0, index, grouped_update(input.index_select(0, index), factors, counts))

    def _factors(self, name: str) -> Factors:
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter.factors


class AdaptedExperts(Adapted):
    """Adapters of stacked experts; all rows of a batch use the same one."""

    def forward(self, x_A: Tensor, ends_E: Tensor) -> Tensor:
        y = super().forward(x_A, ends_E)
        for adapter in self._acting():
            y = y + adapter(x_A, ends_E)
        return y

    def of(self, expert: int, x: Tensor) -> Tensor:
        y = super().of(expert, x)  # pyright: ignore[reportAttributeAccessIssue]
        for adapter in self._acting():
            y = y + adapter.of(expert, x)
        return y

    def _acting(self) -> Iterator[LowRankExperts]:
        for name, rows in self.route.now():
            if name in self.adapters:
                if rows is not None:
                    raise ConfigError(
                        f"adapter {name!r} adapts experts, and only some rows of the batch use it",
                        fix="run rows with and without it in batches of their own",
                    )
                adapter = self.adapters[name]
                assert isinstance(adapter, LowRankExperts)
                yield adapter


class LoRALinear(AdaptedRows, Linear):
    """A linear layer with named low-rank adapters."""

    @classmethod
    def wrap(cls, linear: nn.Linear, route: AdapterRoute) -> Self:
        """A LoRALinear that shares `linear`'s parameters."""
        wrapped = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        wrapped.weight, wrapped.bias = linear.weight, linear.bias
        return wrapped.adapt(route)

    def bare(self) -> Linear:
        plain = Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        plain.weight, plain.bias = self.weight, self.bias
        return plain


class LoRAExpertLinear(AdaptedExperts, ExpertLinear):
    """Stacked experts with named low-rank adapters."""

    @classmethod
    def wrap(cls, experts: ExpertLinear, route: AdapterRoute) -> Self:
        """A LoRAExpertLinear that shares the experts' weights."""
        with torch.device("meta"):
            wrapped = cls(experts.num_experts, *reversed(experts.weight.shape[1:]))
        wrapped.weight = experts.weight
        return wrapped.adapt(route)

    def bare(self) -> ExpertLinear:
        with torch.device("meta"):
            plain = ExpertLinear(self.num_experts, *reversed(self.weight.shape[1:]))
        plain.weight = self.weight
        return plain


class LoRAQuantLinear(AdaptedRows, QuantLinear):
    """A quantised linear layer with named low-rank adapters in floating point."""

    def bare(self) -> QuantLinear:
        return QuantLinear(self.weight, bias=self.bias)


class LoRAQuantExpertLinear(AdaptedExperts, QuantExpertLinear):
    """Quantised experts with named low-rank adapters in floating point."""

    def bare(self) -> QuantExpertLinear:
        return QuantExpertLinear(self.weight)


PLAIN = (nn.Linear, QuantLinear, ExpertLinear, QuantExpertLinear)
"""Layers that can be adapted."""


def quantised(
    layer: nn.Linear | ExpertLinear, weight: PackedWeight
) -> QuantLinear | QuantExpertLinear:
    """`layer` over a quantised weight, with the bias and the adapters that it has."""
    if isinstance(layer, ExpertLinear):
        if isinstance(layer, LoRAExpertLinear):
            return LoRAQuantExpertLinear(weight).adapt(layer.route, layer.adapters)
        return QuantExpertLinear(weight)
    if isinstance(layer, LoRALinear):
        made = LoRAQuantLinear(weight, bias=layer.bias)
        return made.adapt(layer.route, layer.adapters)
    return QuantLinear(weight, bias=layer.bias)


def lora_linears(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Paths and modules of all layers of a model that can carry adapters."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            yield path, module


def route_of(model: nn.Module) -> AdapterRoute:
    """The route that the model's adapted linears share; one of its own for a model without any."""
    _, linear = next(lora_linears(model), ("", None))
    return AdapterRoute() if linear is None else linear.route


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one adapter, to train it alone."""
    return [
        parameter
        for _, linear in lora_linears(model)
        if name in linear.adapters
        for parameter in linear.adapters[name].parameters()
    ]


def check_new(model: nn.Module, name: str) -> None:
    """Raise ConfigError if there is an adapter of that name, which a new one would mix with."""
    if name in route_of(model).names:
        raise ConfigError(
            f"the model has an adapter {name!r} already",
            fix="merge or remove that one first, or give the new one another name",
        )


def add_adapter(
    model: nn.Module, path: str, *, name: str, adapter: LowRank | LowRankExperts
) -> None:
    """Give the layer at `path` an adapter; freeze and choose nothing."""
    layer = model.get_submodule(path)
    if not isinstance(layer, Adapted):
        layer = _adaptable(layer, route_of(model))
        model.set_submodule(path, layer)
    layer.adapters[name] = adapter
    if name not in layer.route.names:
        layer.route.names.append(name)


def _adaptable(layer: nn.Module, route: AdapterRoute) -> Adapted:
    match layer:
        case nn.Linear():
            return LoRALinear.wrap(layer, route)
        case QuantLinear():
            return LoRAQuantLinear(layer.weight, bias=layer.bias).adapt(route)
        case ExpertLinear():
            return LoRAExpertLinear.wrap(layer, route)
        case QuantExpertLinear():
            return LoRAQuantExpertLinear(layer.weight).adapt(route)
    raise AssertionError(type(layer))


def add_adapters(
    model: nn.Module,
    *,
    name: str,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    within: str = BLOCKS,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Give the linears named in `targets` an adapter each; freeze and choose nothing.

    Stacked experts are linears here, and each expert has an adapter. Returns the adapters' weights.
    Raises ConfigError if a target is no linear layer of the submodule `within`, or there is an
    adapter of that name.
    """
    check_new(model, name)
    targets = list(targets)
    linears = {
        f"{within}.{path}": module
        for path, module in model.get_submodule(within).named_modules()
        if isinstance(module, PLAIN)
    }
    leaves = {path.rpartition(".")[2] for path in linears}
    for target in targets:
        if target not in leaves:
            near = difflib.get_close_matches(target, leaves, n=1, cutoff=0.0)
            raise ConfigError(
                f"the model's blocks have no linear layer {target!r}",
                fix=f"the nearest name is {near[0]!r}" if near else None,
            )
    like = next(model.parameters())
    trainable: list[nn.Parameter] = []
    for path, linear in linears.items():
        if path.rpartition(".")[2] in targets:
            shape = linear.weight.shape
            adapter = _new_adapter(shape, rank=rank, alpha=alpha, generator=generator)
            adapter.to(like.device, like.dtype)
            add_adapter(model, path, name=name, adapter=adapter)
            trainable += adapter.parameters()
    return trainable


def _new_adapter(
    shape: Sequence[int], *, rank: int, alpha: float, generator: torch.Generator | None
) -> LowRank | LowRankExperts:
    """For a matrix of this shape, or a stack of them."""
    *stack, rows, width = shape
    if stack:
        [count] = stack
        return LowRankExperts(count, width, rows, rank=rank, alpha=alpha, generator=generator)
    return LowRank(width, rows, rank=rank, alpha=alpha, generator=generator)


def attach_lora(
    model: nn.Module,
    *,
    name: str,
    targets: Iterable[str],
    rank: int,
    alpha: float,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freeze `model`, give the linears of its blocks named in `targets` an adapter each.

    Returns the adapters' weights. The adapter is chosen from then on; `choose_adapter(model, None)`
    gives the base back. Raises ConfigError for a target that the blocks do not have.
    """
    model.requires_grad_(False)
    trainable = add_adapters(
        model, name=name, targets=targets, rank=rank, alpha=alpha, generator=generator
    )
    choose_adapter(model, name)
    return trainable


def choose_adapter(model: nn.Module, name: str | None) -> None:
    """Make `name` the adapter of all rows that name none; None runs the bare base.

    Raises ConfigError if the model has no such adapter.
    """
    route = route_of(model)
    if name is not None:
        route.check(name)
    route.chosen = name


@contextmanager
def route_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """During the context, row i of every batch through `model` uses the adapter `names[i]`.

    None is the chosen adapter, which is the bare base unless `choose_adapter` said otherwise; an
    adapter that adapts only some linears leaves the others to the base. Raises ConfigError if the
    model has no adapter of one of these names.
    """
    route = route_of(model)
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        name = name or route.chosen
        if name is not None:
            rows_of.setdefault(name, []).append(row)
    device = next(model.parameters()).device
    parts = []
    for name, rows in rows_of.items():
        route.check(name)
        index = None if len(rows) == len(names) else torch.tensor(rows, device=device)
        parts.append(AdapterRows(name, index))
    before = route.parts, route.is_sorted
    route.parts = tuple(parts)
    route.is_sorted = [row for rows in rows_of.values() for row in rows] == [*range(len(names))]
    try:
        yield
    finally:
        route.parts, route.is_sorted = before


@torch.no_grad()
def merge_lora(
    model: nn.Module, name: str, *, others: Literal["drop", "keep"] | None = None
) -> None:
    """Add adapter `name` into the base weights (in float32) and remove it.

    What becomes of other adapters must be said: "drop" removes them; "keep" leaves them on the
    merged base, which is right only if they were trained on top of `name`.

    Raises:
        ConfigError: the model has no such adapter, or it has others and `others` is None.
        WeightsError: the model is quantised: a sum would have to be rounded to few bits again.
    """
    route = route_of(model)
    route.check(name)
    quantised_ones = (LoRAQuantLinear, LoRAQuantExpertLinear)
    if any(isinstance(linear, quantised_ones) for _, linear in lora_linears(model)):
        raise WeightsError(
            f"the model is quantised, and adapter {name!r} cannot be merged into it",
            fix="merge it into the model that this one was quantised from, then quantise that",
        )
    rest = [other for other in route.names if other != name]
    if rest and others is None:
        raise ConfigError(
            f"the model has other adapters than {name!r}: {', '.join(rest)}",
            fix='merge with others="drop", or "keep" if they were trained on the merged model',
        )
    route.names, route.chosen = rest, None
    for path, linear in list(lora_linears(model)):
        assert isinstance(linear, LoRALinear | LoRAExpertLinear)
        if name in linear.adapters:
            weight = linear.weight
            update = linear.adapters[name].delta()  # pyright: ignore[reportCallIssue]
            linear.weight = nn.Parameter((weight.float() + update).to(weight.dtype))
            del linear.adapters[name]
        if others != "keep" or not len(linear.adapters):
            model.set_submodule(path, linear.bare())
