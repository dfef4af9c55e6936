"""Save a model as the folder that Hugging Face libraries read.

Nothing in it is ours alone: `transformers` loads the same weights, ids and chat template. The one
addition is the renderer's name in `tokenizer_config.json`, which others ignore.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.base.files import storage_errors, write_atomic
from phikit.models.dense import DenseModel, checkpoint_parts, to_hf_config
from phikit.nn.lora import LoRALinear
from phikit.weights.load import RENDERER_KEY, Loaded
from phikit.weights.safetensors_files import SINGLE


def save(folder: str | Path, loaded: Loaded, *, dtype: torch.dtype | None = None) -> None:
    """Write config, weights, tokenizer and chat template; `dtype` None keeps that of the weights.

    Every file replaces its older self at once. For all of them at once, write into a checkpoint's
    temporary folder (`base.checkpoint.save_checkpoint`).

    Raises:
        WeightsError: adapters are attached to the model.
        StorageError: the disk is full or the folder may not be written.
    """
    folder, model, renderer = Path(folder), loaded.model, loaded.renderer
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise WeightsError(
            "the model has adapters attached, and a model folder holds plain weights",
            fix="merge them (nn.lora.merge_lora), or save them alone (weights.save_adapter)",
        )
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.lm_head.weight.dtype
    end_of_text = renderer.stop_ids[-1]
    config = to_hf_config(model.config) | {
        "dtype": str(dtype).removeprefix("torch."),
        # transformers fills absent ids with those of its own default model, which may lie beyond
        # this vocabulary; and a padding id in here would freeze one embedding in training.
        "bos_token_id": None,
        "eos_token_id": renderer.stop_ids[0],
        "pad_token_id": None,
    }
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
    write_atomic(folder / "chat_template.jinja", renderer.template)
    loaded.tokenizer.save(folder)
    write_tensors(folder / SINGLE, checkpoint_tensors(model, dtype=dtype))


def checkpoint_tensors(model: DenseModel, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under the names of the model's Hugging Face family; a tied head is absent."""
    tensors = {}
    for key, parameter in model.named_parameters():
        weight = parameter.detach().to("cpu", dtype)
        parts = checkpoint_parts(model.config, key)
        sizes = [rows or len(weight) for _, rows in parts]
        for (name, _), part in zip(parts, weight.split(sizes), strict=True):
            # safetensors refuses tensors that share memory.
            tensors[name] = part.contiguous() if len(parts) == 1 else part.clone()
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file under another name, then rename it.

    Raises:
        StorageError: the disk is full or the folder may not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors makes a file that its owner alone reads
            save_file(tensors, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _name(loaded: Loaded, id_: int) -> str:
    return loaded.tokenizer.decode([id_], keep_special=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=2) + "\n")
