"""Low-rank adapters in the layout of PEFT: `adapter_config.json`, `adapter_model.safetensors`.

An adapter on a fused matrix fits PEFT as it is where the checkpoint fuses too (Phi-3). In the Llama
layout the fused q, k, v become three adapters that share A and split the rows of B; the update is
the same. The way back needs that shared A, so an adapter trained on q, k and v apart is refused.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phikit.base.errors import WeightsError
from phikit.base.files import storage_errors
from phikit.models.dense import DenseModel, checkpoint_parts
from phikit.nn.lora import LoRALinear, LowRank, attach_lora
from phikit.weights.build import mismatches
from phikit.weights.safetensors_files import open_file
from phikit.weights.save import write_json, write_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}
"""Settings of PEFT that we write, and the only values that we read."""
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq")
"""Initialisations that move part of the base into the adapter, so that it fits no other base."""


def save_adapter(
    folder: str | Path, model: DenseModel, *, name: str, base: str | None = None
) -> None:
    """Write the adapter `name` of a model; `base` says which model it belongs to.

    Raises:
        WeightsError: the model has no such adapter, or it has several ranks.
        StorageError: the disk is full or the folder may not be written.
    """
    folder = Path(folder)
    adapters = _adapters(model, name)
    if not adapters:
        raise WeightsError(f"the model has no adapter {name!r}", fix="attach it with attach_lora")
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    for path, adapter in adapters.items():
        parts = _parts(model, path)
        for (module, _), b_DR in zip(
            parts, adapter.b_DR.detach().cpu().split([rows for _, rows in parts]), strict=True
        ):
            tensors[_key(module, "A")] = adapter.a_RD.detach().cpu().clone()
            tensors[_key(module, "B")] = b_DR.clone()
            targets.add(module.rpartition(".")[2])
    settings = {(len(a.a_RD), a.scale * len(a.a_RD)) for a in adapters.values()}
    if len(settings) > 1:
        raise WeightsError(
            f"the adapter {name!r} has several ranks or alphas: {sorted(settings)}",
            fix="attach it with one rank and one alpha",
        )
    [(rank, alpha)] = settings
    config = _PLAIN | {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config)
    write_tensors(folder / TENSORS, tensors)


def load_adapter(folder: str | Path, model: DenseModel, *, name: str) -> list[nn.Parameter]:
    """Attach an adapter to a model under `name` and make it active; returns its weights.

    The base is frozen, as by `attach_lora`, so training can go on from here.

    Raises:
        WeightsError: it is no LoRA adapter, or does not fit the model; the model is unchanged.
    """
    folder = Path(folder)
    rank, alpha = _read_config(folder / CONFIG)
    linears = [p for p, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)]
    with open_file(folder / TENSORS) as source:
        targets = {
            path.rpartition(".")[2]
            for path in linears
            if any(_key(module, "A") in source.shapes for module, _ in _parts(model, path))
        }
        wanted: dict[str, tuple[int, ...]] = {}
        chosen = [path for path in linears if path.rpartition(".")[2] in targets]
        for path in chosen:
            width = model.get_parameter(f"{path}.weight").shape[1]
            for module, rows in _parts(model, path):
                wanted[_key(module, "A")] = (rank, width)
                wanted[_key(module, "B")] = (rows, rank)
        faults = mismatches(source.shapes, wanted)
        if faults or not wanted:
            raise WeightsError(
                f"the adapter in {folder} does not fit the model:"
                + "".join(f"\n  {fault}" for fault in faults or ["it adapts nothing"]),
                fix="load the base that the adapter was trained on",
            )
        read = {path: _read_pair(source.read, _parts(model, path), folder) for path in chosen}
        trainable = attach_lora(model, name=name, targets=targets, rank=rank, alpha=alpha)
        with torch.no_grad():
            for path, adapter in _adapters(model, name).items():
                a_RD, b_DR = read[path]
                adapter.a_RD.copy_(a_RD)
                adapter.b_DR.copy_(b_DR)
    return trainable


def _read_pair(read: Any, parts: list[tuple[str, int]], folder: Path) -> tuple[Tensor, Tensor]:
    first, *others = [read(_key(module, "A")) for module, _ in parts]
    if not all(torch.equal(first, other) for other in others):
        raise WeightsError(
            f"the adapter in {folder} adapts {', '.join(module for module, _ in parts)} apart, and "
            "here they are one matrix",
            fix="merge it into its base with peft, then load the merged model",
        )
    return first, torch.cat([read(_key(module, "B")) for module, _ in parts])


def _read_config(path: Path) -> tuple[int, float]:
    """Rank and alpha; refuses whatever changes the mathematics."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is not an adapter's config: {error!r}") from error
    odd = {key: config[key] for key, plain in _PLAIN.items() if config.get(key, plain) != plain}
    odd = {key: value for key, value in odd.items() if value}  # null and empty mean off as well
    if str(config.get("init_lora_weights")).startswith(_BASE_CHANGING):
        odd["init_lora_weights"] = config["init_lora_weights"]
    if odd or rank < 1:
        raise WeightsError(
            f"{path} asks for what is not supported: {odd or {'r': rank}}",
            fix="merge the adapter into its base with peft, then load the merged model",
        )
    return rank, alpha


def _adapters(model: DenseModel, name: str) -> dict[str, LowRank]:
    """The adapter's parts by the path of the linear layer they sit on."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and name in module.adapters:
            adapter = module.adapters[name]
            assert isinstance(adapter, LowRank)
            found[path] = adapter
    return found


def _parts(model: DenseModel, path: str) -> list[tuple[str, int]]:
    """The checkpoint's linear layers that make up ours at `path`: (module, rows)."""
    weight = model.get_parameter(f"{path}.weight")
    return [
        (name.removesuffix(".weight"), rows or len(weight))
        for name, rows in checkpoint_parts(model.config, f"{path}.weight")
    ]


def _key(module: str, letter: str) -> str:
    return f"base_model.model.{module}.lora_{letter}.weight"
