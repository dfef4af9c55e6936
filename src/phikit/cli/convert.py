"""`phikit convert` and `phikit merge`: a model in another layout, or with an adapter in it."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from phikit.base.errors import ConfigError, WeightsError
from phikit.cli.locate import RUN_HELP, complete_model, locate
from phikit.cli.output import fresh

if TYPE_CHECKING:
    import torch

    from phikit.weights.gguf_out import Quant
    from phikit.weights.load import Loaded


class Layout(StrEnum):
    """What `--to` takes."""

    hf = "hf"
    gguf = "gguf"
    peft = "peft"


Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; as stored if not given."),
]


def convert(
    model: Annotated[
        str, typer.Argument(metavar="IN", help=RUN_HELP, autocompletion=complete_model)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or a new .gguf file.")],
    to: Annotated[
        Layout,
        typer.Option(
            metavar="LAYOUT",
            help="hf: a folder that transformers reads. gguf: one file for llama.cpp. peft: the "
            "adapters of the model, a folder each.",
        ),
    ],
    dtype: Dtype = None,
    quant: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="For gguf: f16, bf16 (the default), q8_0 or q4_0."),
    ] = None,
) -> None:
    """Write a model in another layout, with its tokenizer and its chat template."""
    if quant is not None and to is not Layout.gguf:
        raise ConfigError(f"--quant {quant} goes with --to gguf alone", fix="leave it out")
    if dtype is not None and to is not Layout.hf:
        raise ConfigError(
            f"--dtype {dtype} goes with --to hf alone", fix="leave it out; --quant is for gguf"
        )
    wanted, kind = dtype_called(dtype), quant_called(quant)
    with fresh(out) as place:
        loaded = load_model(model)
        match to:
            case Layout.hf:
                from phikit.weights.quantised import refuse_quantised
                from phikit.weights.save import save

                refuse_quantised(loaded.model, "writing it for transformers")
                save(place, loaded, dtype=wanted)
            case Layout.gguf:
                from phikit.weights.gguf_out import save_gguf

                save_gguf(place, loaded, quant=kind)
            case Layout.peft:
                _save_adapters(place, loaded)
    typer.echo(out)


def merge(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help=RUN_HELP, autocompletion=complete_model)
    ],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder in PEFT's layout.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    dtype: Dtype = None,
) -> None:
    """Add a low-rank adapter into the weights of its base, and write the model as a folder.

    Sums are made in float32 and rounded once, at the end.
    """
    import torch

    from phikit.nn.lora import merge_lora
    from phikit.weights.adapter import load_adapter
    from phikit.weights.save import save

    wanted = dtype_called(dtype)
    with fresh(out) as place:
        loaded = load_model(base, dtype=None if wanted is None else torch.float32)
        load_adapter(adapter, loaded.model, name="merged", dtype=torch.float32)
        merge_lora(loaded.model, "merged")
        save(place, loaded, dtype=wanted)
    typer.echo(out)


def load_model(model: str, *, dtype: "torch.dtype | None" = None) -> "Loaded":
    """The model that a command was pointed at."""
    from phikit.weights.load import load

    return load(locate(model).model, dtype=dtype)


def dtype_called(name: str | None) -> "torch.dtype | None":
    """The dtype of this name; ConfigError if there is none."""
    from phikit.base.device import parse_dtype

    return None if name is None else parse_dtype(name)


def quant_called(name: str | None) -> "Quant":
    """The quantisation of this name, in any case; ConfigError if there is none."""
    from phikit.weights.gguf_out import Quant

    for kind in get_args(Quant):
        if kind == (name or "bf16").lower():
            return kind
    raise ConfigError(
        f"unknown quantisation {name!r}", fix=f"choose from: {', '.join(get_args(Quant))}"
    )


def _save_adapters(place: Path, loaded: "Loaded") -> None:
    """Every adapter of the model, in a folder of its name."""
    from phikit.nn.lora import route_of
    from phikit.weights.adapter import save_adapter

    names = route_of(loaded.model).names
    if not names:
        raise WeightsError(
            f"{loaded.path} carries no adapters",
            fix="--to peft takes a model with adapters inside, such as Phi-4-multimodal",
        )
    for name in names:
        save_adapter(place / name, loaded.model, name=name, base=str(loaded.path))
