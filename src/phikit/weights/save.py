"""Save a model as the folder that Hugging Face libraries read.

Nothing in it is ours alone: `transformers` loads the same weights, ids and chat template. The one
addition is the renderer's name in `tokenizer_config.json`, which others ignore. A quantised model
is the exception: phikit alone reads its packed weights (`weights.quantised`). The weights are
written tensor by tensor from where they lie, so saving needs no second copy of the model.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.base.files import storage_errors, write_atomic
from phikit.models.decoder import Decoder
from phikit.models.multimodal import SPEECH, VISION, MultimodalModel, is_beside
from phikit.models.registry import config_to_hf
from phikit.nn.lora import lora_linears, route_of
from phikit.weights.build import as_rows, named_tensors, stored_parts
from phikit.weights.load import RENDERER_KEY, Loaded
from phikit.weights.quantised import KEY, to_hf
from phikit.weights.safetensors_files import INDEX, SINGLE, dtype_in_file, write_tensors
from phikit.weights.surgery import renew_adapter, save_modalities

MAX_SHARD_BYTES = 5_000_000_000
"""The size at which Hugging Face libraries begin another file."""


def save(
    folder: str | Path,
    loaded: Loaded,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write config, weights, tokenizer and chat template; beside them, what makes the model see
    and hear: Phi-4-multimodal's adapters, modalities that were attached.

    Every file replaces its older self at once. For all of them at once, write into a checkpoint's
    temporary folder (`base.checkpoint.save_checkpoint`).

    Args:
        folder: made if need be.
        loaded: the model and what it is talked to through.
        dtype: of the weights in the files, packed ones apart; None keeps the one they have.
        max_shard_bytes: the tensors of one file; a single tensor may exceed it.
        on_progress: called with the numbers written so far, and all of them.

    Raises:
        WeightsError: adapters are attached to the model, other than the two that it is read with.
        StorageError: the disk is full or the folder may not be written.
    """
    folder, model, renderer = Path(folder), loaded.model, loaded.renderer
    own = (VISION, SPEECH) if isinstance(model, MultimodalModel) else ()
    adapters = [name for name in route_of(model).names if name not in model.modalities]
    if not {*adapters} <= {*own}:
        refuse_adapters(model)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.dtype
    end_of_text = renderer.stop_ids[-1]
    config = config_to_hf(model.config) | {
        "dtype": str(dtype).removeprefix("torch."),
        # transformers fills absent ids with those of its own default model, which may lie beyond
        # this vocabulary; and a padding id in here would freeze one embedding in training.
        "bos_token_id": None,
        "eos_token_id": renderer.stop_ids[0],
        "pad_token_id": None,
    }
    if model.quantisation is not None:
        config[KEY] = to_hf(model.quantisation)
    generation = {"eos_token_id": list(renderer.stop_ids), "pad_token_id": end_of_text}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _name(loaded, renderer.stop_ids[0]),
        "pad_token": _name(loaded, end_of_text),
        "model_max_length": model.config.max_context,
        "clean_up_tokenization_spaces": False,
        RENDERER_KEY: renderer.name,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer_config.json", about)
    if renderer.template:
        write_atomic(folder / "chat_template.jinja", renderer.template)
    loaded.tokenizer.save(folder)
    tensors = {n: t for n, t in checkpoint_tensors(model).items() if not is_beside(n)}
    done, total = 0, sum(tensor.numel() for tensor in tensors.values())

    def count(tensor: Tensor) -> None:
        nonlocal done
        done += tensor.numel()
        if on_progress is not None:
            on_progress(done, total)

    _write_shards(folder, tensors, dtype=dtype, max_bytes=max_shard_bytes, on_tensor=count)
    for name in own:
        renew_adapter(folder, model, name=name, dtype=dtype)
    save_modalities(folder, model, dtype=dtype)


def refuse_adapters(model: Decoder) -> None:
    """Raise WeightsError if adapters are attached: files of whole models hold plain weights."""
    if any(True for _ in lora_linears(model)):
        raise WeightsError(
            "the model has adapters attached, and a model file holds plain weights",
            fix="merge them (nn.lora.merge_lora), or save them alone (weights.save_adapter)",
        )


def checkpoint_tensors(model: Decoder, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights under the names of the model's Hugging Face family; a tied head is absent.

    With `dtype` None they are views of the model's own memory; otherwise copies if need be. Packed
    weights have names of their own and keep their dtype.
    """
    tensors = {}
    for key, tensor in named_tensors(model):
        weight = tensor.detach().to(dtype=dtype_in_file(key, tensor, dtype))
        first = 0
        for name, rows in stored_parts(model.config, key):
            if rows is None:
                tensors[name] = weight
            else:
                tensors[name] = as_rows(weight)[first : first + rows]
                first += rows
    return tensors


def _write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    max_bytes: float,
    on_tensor: Callable[[Tensor], None],
) -> None:
    """Write one file, or several with an index; then remove those of an older save."""
    shards: list[dict[str, Tensor]] = [{}]
    room, total = max_bytes, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype_in_file(name, tensor, dtype).itemsize
        total += size
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= size
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, dtype=dtype, on_tensor=on_tensor)
    if count > 1:
        files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        names.append(INDEX)
    with storage_errors(folder):
        for old in (folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
            if old.name not in names:
                old.unlink(missing_ok=True)


def _name(loaded: Loaded, id_: int) -> str:
    return loaded.tokenizer.decode([id_], keep_special=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
