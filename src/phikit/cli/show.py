"""`phikit show`: what a checkpoint is, without loading it; or what a published one would be."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import WeightsError
from phikit.cli.locate import complete_model, locate

if TYPE_CHECKING:
    from phikit.models.catalogue import Checkpoint
    from phikit.models.decoder import DecoderConfig
    from phikit.weights.describe import Adapter, Description, Packed

SHOWN_SPECIALS = 24


def show(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A model folder, a .gguf file, an adapter, a run, the id of a pulled model, or "
            "the name of a known one, such as phi-4-mini-instruct.",
            autocompletion=complete_model,
        ),
    ],
) -> None:
    """Tell what a checkpoint is: parameters by part, memory, context, special tokens, adapters.

    Reads its configuration and the headers of its files; no weights. A known model that is not on
    this machine is described from the catalogue.
    """
    from phikit.models.catalogue import find
    from phikit.weights.describe import describe, describe_adapter

    if (Path(path) / "adapter_config.json").is_file():
        _print([("adapter", path), *_adapter_rows(describe_adapter(Path(path)))])
        return
    known = None if Path(path).exists() else find(path)
    try:
        place = locate(path if known is None else known.hub_id)
    except WeightsError:
        if known is None:
            raise
        _print(_catalogue_rows(known))
        return
    found = describe(place.model)
    rows = [*_stored_rows(found), *_config_rows(found.config), *_chat_rows(found)]
    _print([*rows, *_sense_rows(found)])
    for adapter in found.adapters:
        typer.echo()
        _print([("adapter", adapter.name), *_adapter_rows(adapter)])


def _catalogue_rows(known: "Checkpoint") -> list[tuple[str, str]]:
    rows = [
        ("model", f"{known.hub_id}, from the catalogue: it is not on this machine"),
        *_config_rows(known.config, original_context=known.original_context),
        ("fetch", f"phikit pull {known.hub_id}"),
    ]
    return [*rows, ("note", known.note)] if known.note else rows


def _stored_rows(found: "Description") -> list[tuple[str, str]]:
    from phikit.cli.screen import in_bytes

    stored = found.stored
    files = "1 file" if stored.files == 1 else f"{stored.files} files"
    return [
        ("path", str(found.path)),
        ("layout", f"{stored.layout}, {stored.dtype}"),
        ("stored", f"{stored.tensors} tensors in {files}, {in_bytes(stored.size)}"),
        *([] if found.packed is None else _packed_rows(found.packed, stored.dtype)),
    ]


def _packed_rows(packed: "Packed", dtype: str) -> list[tuple[str, str]]:
    from phikit.cli.screen import in_bytes

    bits, group, method, embedding_bits = (
        getattr(packed.config, name) for name in ("bits", "group", "method", "embedding_bits")
    )
    kept = ", ".join(f"{name} {count:,}" for name, count in packed.kept.items())
    return [
        (
            "quantised",
            f"{bits} bits, embeddings and head {embedding_bits}; groups of {group}; {method}",
        ),
        (
            "  packed",
            f"{packed.weights:,} weights in {in_bytes(packed.size)}, "
            f"{8 * packed.size / max(packed.weights, 1):.2f} bits each with their scales",
        ),
        (f"  in {dtype}", kept),
    ]


def _config_rows(
    config: "DecoderConfig", *, original_context: int | None = None
) -> list[tuple[str, str]]:
    from phikit.cli.screen import in_bytes
    from phikit.models.registry import active_parameter_count, parameters_by_part
    from phikit.weights.describe import cache_bytes_per_token, weight_memory

    parts = parameters_by_part(config)
    total = sum(parts.values())
    active = active_parameter_count(config)
    active_words = f", {active:,} active for each token" if active < total else ""
    memory = weight_memory(config)
    heads = f"{config.num_heads} query heads, {config.num_kv_heads} key heads of {config.head_dim}"
    per_token = cache_bytes_per_token(config)
    return [
        ("family", type(config).__name__.removesuffix("Config").lower()),
        ("shape", f"{config.num_layers} layers of width {config.d_model}; {heads}"),
        ("vocabulary", f"{config.vocab_size:,} tokens, head {_head(config)}"),
        ("parameters", f"{total:,}{active_words}"),
        *((f"  {name}", f"{count:,}") for name, count in parts.items()),
        (
            "weights in memory",
            f"{in_bytes(memory.bf16)} at bf16, {in_bytes(memory.int8)} at int8, "
            f"{in_bytes(memory.int4)} at int4",
        ),
        ("context", _context(config, original_context)),
        (
            "keys and values",
            f"{in_bytes(per_token)} a token at bf16, "
            f"{in_bytes(per_token * config.max_context)} at full context",
        ),
        ("rope", _rope(config)),
    ]


def _head(config: "DecoderConfig") -> str:
    return "tied to the embeddings" if config.tie_embeddings else "of its own"


def _context(config: "DecoderConfig", original: int | None) -> str:
    words = f"{config.max_context:,} tokens"
    if config.longrope is not None:
        original = config.longrope.original_context
    if original is not None:
        words += f", {original:,} of them before LongRoPE's extension"
    if config.sliding_window is not None and config.sliding_window < config.max_context:
        words += f"; a token sees the last {config.sliding_window:,}"
    return words


def _rope(config: "DecoderConfig") -> str:
    words = f"theta {config.rope_theta:,.0f}, {config.rotary_dim} of {config.head_dim} channels"
    if config.longrope is not None:
        low, high = min(config.longrope.long_factor), max(config.longrope.long_factor)
        words += f"; LongRoPE, long factors {low:.3g} to {high:.3g}"
    return words


def _chat_rows(found: "Description") -> list[tuple[str, str]]:
    rows = []
    if found.tokenizer is not None:
        specials = sorted(found.tokenizer.specials.items(), key=lambda item: item[1])
        words = [f"{name} {id_}" for name, id_ in specials[:SHOWN_SPECIALS]]
        if len(specials) > SHOWN_SPECIALS:
            words.append(f"and {len(specials) - SHOWN_SPECIALS} more")
        rows.append(("special tokens", ", ".join(words)))
    if found.renderer is None:
        rows.append(("chat template", found.renderer_fault or "none"))
    else:
        stops = ", ".join(map(str, found.renderer.stop_ids))
        name = found.renderer.name
        kind = "none: it only goes on with a text" if name == "text" else f"that of {name}"
        rows.append(("chat template", f"{kind}; a reply ends at {stops}"))
    return rows


def _sense_rows(found: "Description") -> list[tuple[str, str]]:
    words = [
        sense.name if sense.parameters is None else f"{sense.name} ({sense.parameters:,} beside it)"
        for sense in found.senses
    ]
    return [("perceives", ", ".join(words))] if words else []


def _adapter_rows(adapter: "Adapter") -> list[tuple[str, str]]:
    alpha = "" if adapter.alpha is None else f", alpha {adapter.alpha:g}"
    return [
        ("rank", f"{adapter.rank}{alpha}"),
        ("adapts", ", ".join(adapter.targets)),
        ("parameters", f"{adapter.parameters:,}"),
    ]


def _print(rows: list[tuple[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from phikit.cli.screen import screen

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    screen().print(table)
