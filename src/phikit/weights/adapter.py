"""Low-rank adapters in the layout of PEFT: `adapter_config.json`, `adapter_model.safetensors`.

An adapter on a fused matrix fits PEFT as it is where the checkpoint fuses too (Phi-3). In the Llama
layout the fused q, k, v become three adapters that share A and split the rows of B; the update is
the same. On the way back, adapters trained on q, k and v apart (or on some of them) are stacked:
A one above the other, B along a diagonal. The rank of such a matrix is the sum of theirs.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phikit.base.errors import WeightsError
from phikit.base.files import storage_errors, write_atomic
from phikit.models.decoder import Decoder
from phikit.models.registry import checkpoint_parts
from phikit.nn.lora import (
    BLOCKS,
    LowRank,
    add_adapter,
    check_new,
    choose_adapter,
    lora_linears,
)
from phikit.nn.quantised import QuantLinear
from phikit.weights.build import TensorSource, mismatches
from phikit.weights.renamed import Renamed
from phikit.weights.safetensors_files import open_file, write_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""What PEFT puts before every name; the published adapters of Phi-4-multimodal may lack it."""

_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
}
"""Settings of PEFT that we write, and the only values that we read."""
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq")
"""Initialisations that move part of the base into the adapter, so that it fits no other base."""


class AdapterSettings(NamedTuple):
    """Ranks and alphas of an adapter: those of most linears, and by name those of the others."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def of(self, module: str) -> tuple[int, float]:
        """Rank and scale of the checkpoint's linear layer `module`."""
        rank, alpha = (
            next((n for name, n in of.items() if f".{module}".endswith(f".{name}")), default)
            for of, default in ((self.ranks, self.rank), (self.alphas, self.alpha))
        )
        return int(rank), alpha / rank


def save_adapter(
    folder: str | Path,
    model: Decoder,
    *,
    name: str,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the adapter `name` of a model; `base` says which model it belongs to.

    `dtype` None keeps that of the weights.

    Raises:
        WeightsError: the model has no such adapter, it adapts experts, or linears of one name have
            different ranks.
        StorageError: the disk is full or the folder may not be written.
    """
    folder = Path(folder)
    adapters = _adapters(model, name)
    if not adapters:
        raise WeightsError(f"the model has no adapter {name!r}", fix="attach it with attach_lora")
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, set[tuple[int, float]]] = {}
    for path, adapter in adapters.items():
        parts = _parts(model, path)
        rank = len(adapter.a_RD)
        for (module, _), b_DR in zip(
            parts, adapter.b_DR.split([rows for _, rows in parts]), strict=True
        ):
            tensors[_PREFIX + _key(module, "A")] = adapter.a_RD
            tensors[_PREFIX + _key(module, "B")] = b_DR
            leaf = module.rpartition(".")[2]
            shapes.setdefault(leaf, set()).add((rank, adapter.scale * rank))
    several = {leaf: found for leaf, found in shapes.items() if len(found) > 1}
    if several:
        raise WeightsError(
            f"the adapter {name!r} has several ranks or alphas: {several}",
            fix="attach it with one rank and one alpha",
        )
    by_leaf = {leaf: found.pop() for leaf, found in shapes.items()}
    rank, alpha = next(iter(by_leaf.values()))
    config = _PLAIN | {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {leaf: r for leaf, (r, _) in by_leaf.items() if r != rank},
        "alpha_pattern": {leaf: a for leaf, (_, a) in by_leaf.items() if a != alpha},
        "lora_dropout": 0.0,
        "target_modules": _targets(model, sorted(by_leaf)),
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_tensors(folder / TENSORS, tensors, dtype=dtype)


def load_adapter(
    folder: str | Path, model: Decoder, *, name: str, dtype: torch.dtype | None = None
) -> list[nn.Parameter]:
    """Attach an adapter to a model under `name` and choose it; returns its weights.

    The base is frozen, as by `attach_lora`, so training can go on from here. `dtype` None gives the
    adapter the dtype of the base; to merge it exactly, take float32.

    Raises:
        WeightsError: it is no LoRA adapter, or does not fit the model; the model is unchanged.
        ConfigError: the model has an adapter of that name.
    """
    check_new(model, name)
    folder = Path(folder)
    settings = read_settings(folder / CONFIG)
    with open_adapter(folder) as source:
        adapted = _adapted(model, source.shapes)
        wanted: dict[str, tuple[int, ...]] = {}
        for path, parts in adapted.items():
            width = _linear(model, path).in_features
            for part in parts:
                if part.is_adapted:
                    rank, _ = settings.of(part.module)
                    wanted[_key(part.module, "A")] = (rank, width)
                    wanted[_key(part.module, "B")] = (part.rows, rank)
        faults = mismatches(source.shapes, wanted, unreadable=source.unreadable)
        if faults or not wanted:
            raise WeightsError(
                f"the adapter in {folder} does not fit the model:"
                + "".join(f"\n  {fault}" for fault in faults or ["it adapts nothing"]),
                fix="load the base that the adapter was trained on",
            )
        adapters = {path: _joined(parts, settings, source) for path, parts in adapted.items()}
    model.requires_grad_(False)
    trainable: list[nn.Parameter] = []
    for path, adapter in adapters.items():
        adapter = adapter.to(model.device, dtype or model.dtype)
        add_adapter(model, path, name=name, adapter=adapter)
        trainable += adapter.parameters()
    choose_adapter(model, name)
    return trainable


def read_settings(path: Path) -> AdapterSettings:
    """Ranks and alphas of an `adapter_config.json`.

    Raises WeightsError if it is damaged or asks for what would change the mathematics.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = AdapterSettings(
            int(config["r"]),
            float(config["lora_alpha"]),
            {str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            {str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path} is not an adapter's config: {error!r}",
            fix="point at a folder that peft or phikit wrote an adapter to",
        ) from error
    odd = {key: config[key] for key, plain in _PLAIN.items() if config.get(key, plain) != plain}
    odd = {key: value for key, value in odd.items() if value}  # null and empty mean off as well
    if str(config.get("init_lora_weights")).startswith(_BASE_CHANGING):
        odd["init_lora_weights"] = config["init_lora_weights"]
    if any(rank < 1 for rank in (settings.rank, *settings.ranks.values())):
        odd["r"] = settings.rank
    if odd:
        raise WeightsError(
            f"{path} asks for what is not supported: {odd}",
            fix="merge the adapter into its base with peft, then load the merged model",
        )
    return settings


@contextmanager
def open_adapter(folder: Path) -> Iterator[TensorSource]:
    """The tensors of an adapter's folder, `{module}.lora_{A,B}.weight`."""
    with open_file(folder / TENSORS) as file:
        source = Renamed(file)
        source.add(file, [(name.removeprefix(_PREFIX), name) for name in file.shapes])
        yield source


class _Part(NamedTuple):
    """A linear layer of the checkpoint, which is some rows of one of ours."""

    module: str
    rows: int
    is_adapted: bool


def _adapted(model: Decoder, stored: Iterable[str]) -> dict[str, list[_Part]]:
    """Our linears that an adapter changes, and what they consist of.

    A name adapted in one block is taken to be adapted in all, so that a lost tensor is noticed.
    """
    stored = set(stored)
    parts = {
        f"{BLOCKS}.{path}": _parts(model, f"{BLOCKS}.{path}")
        for path, module in model.get_submodule(BLOCKS).named_modules()
        if isinstance(module, nn.Linear | QuantLinear)
    }
    leaves = {
        module.rpartition(".")[2]
        for modules in parts.values()
        for module, _ in modules
        if _key(module, "A") in stored
    }
    marked = {
        path: [_Part(name, rows, name.rpartition(".")[2] in leaves) for name, rows in modules]
        for path, modules in parts.items()
    }
    return {path: found for path, found in marked.items() if any(p.is_adapted for p in found)}


def _joined(parts: Sequence[_Part], settings: AdapterSettings, source: TensorSource) -> LowRank:
    """One adapter of the matrix that `parts` are stacked to."""
    scales = [settings.of(part.module)[1] for part in parts if part.is_adapted]
    a = [source.read(_key(part.module, "A")) for part in parts if part.is_adapted]
    b = [source.read(_key(part.module, "B")) for part in parts if part.is_adapted]
    is_shared = len(a) == len(parts) and len({*scales}) == 1
    if is_shared and all(torch.equal(a[0], other) for other in a):
        return LowRank.of(a[0], torch.cat(b), scale=scales[0])
    scaled = iter([b_DR * (scale / scales[0]) for b_DR, scale in zip(b, scales, strict=True)])
    blocks = [next(scaled) if part.is_adapted else a[0].new_zeros(part.rows, 0) for part in parts]
    return LowRank.of(torch.cat(a), torch.block_diag(*blocks), scale=scales[0])


def _adapters(model: Decoder, name: str) -> dict[str, LowRank]:
    """The adapter's parts by the path of the linear layer they sit on."""
    found = {}
    for path, linear in lora_linears(model):
        if name in linear.adapters:
            adapter = linear.adapters[name]
            if not isinstance(adapter, LowRank):
                raise WeightsError(
                    f"the adapter {name!r} adapts stacked experts, and PEFT has no layout for that",
                    fix="merge it into the model (nn.lora.merge_lora) and save the model",
                )
            found[path] = adapter
    return found


def _targets(model: Decoder, leaves: list[str]) -> list[str] | str:
    """`target_modules`: by name, or by a pattern if linears outside the blocks bear a name too."""
    outside = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantLinear) and not path.startswith(f"{BLOCKS}.")
    }
    if outside.isdisjoint(leaves):
        return leaves
    return rf"{re.escape(BLOCKS)}\.\d+\.\w+\.({'|'.join(leaves)})"


def _parts(model: Decoder, path: str) -> list[tuple[str, int]]:
    """The checkpoint's linear layers that make up ours at `path`: (module, rows)."""
    whole = _linear(model, path).out_features
    return [
        (name.removesuffix(".weight"), rows or whole)
        for name, rows in checkpoint_parts(model.config, f"{path}.weight")
    ]


def _linear(model: Decoder, path: str) -> nn.Linear | QuantLinear:
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear | QuantLinear)
    return linear


def _key(module: str, letter: str) -> str:
    return f"{module}.lora_{letter}.weight"
