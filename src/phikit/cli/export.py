"""`phikit export`: a model for other programs: Ollama and llama.cpp, transformers, PEFT."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from phikit.base.errors import ConfigError, WeightsError
from phikit.base.files import write_atomic
from phikit.cli.locate import RUN_HELP, complete_model
from phikit.cli.merge import dtype_called, load_model
from phikit.cli.output import fresh
from phikit.cli.stop import stoppable

if TYPE_CHECKING:
    from phikit.weights.gguf_out import Quant
    from phikit.weights.load import Loaded

MILLION = 1_000_000
MODELFILE = ".Modelfile"


class Target(StrEnum):
    """What `--to` takes."""

    gguf = "gguf"
    hf = "hf"
    peft = "peft"


To = Annotated[
    Target,
    typer.Option(
        metavar="LAYOUT",
        help="gguf: a file for llama.cpp, and a Modelfile for Ollama beside it. hf: a folder for "
        "transformers. peft: the adapters inside of the model, a folder each.",
    ),
]
Quantisation = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="For gguf: f16, bf16, q8_0 or q4_0. bf16 if not given; a model that is quantised "
        "keeps its own bits.",
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize", help="For hf: write the numbers that the bits of a quantised model mean."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="For hf: float32, bfloat16 or float16; as stored if not."),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Tokens that Ollama makes room for; 8192, or the model's limit if that is less.",
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, metavar="T", help="At which Ollama draws, if not told otherwise.")
]
WantsModelfile = Annotated[
    bool,
    typer.Option("--modelfile/--no-modelfile", help="Write OUT.Modelfile beside the GGUF file."),
]


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=RUN_HELP, autocompletion=complete_model)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .gguf file, or a new folder.")],
    to: To,
    quant: Quantisation = None,
    dtype: Dtype = None,
    dequantize: Dequantize = False,
    context: Context = None,
    temperature: Temperature = 0.6,
    with_modelfile: WantsModelfile = True,
) -> None:
    """Write a model for other programs, whole or not at all.

    With q4_0 the embeddings and the head are kept in q8_0, since an error there reaches every
    token. A model that `phikit quantize` made keeps its integers: nothing is rounded twice.

    The Modelfile holds the chat format as a Go template, the stop tokens, a context and the
    sampling. Make an Ollama model of it: ollama create NAME -f OUT.Modelfile
    """
    if to is not Target.gguf and quant is not None:
        raise ConfigError(f"--quant {quant} goes with --to gguf alone", fix="leave it out")
    if to is not Target.hf and (dtype is not None or dequantize):
        given = "--dequantize" if dequantize else f"--dtype {dtype}"
        raise ConfigError(
            f"{given} goes with --to hf alone", fix="leave it out; --quant f16 is for gguf"
        )
    with stoppable(kept="nothing is written until all is done"):
        match to:
            case Target.hf:
                _export_hf(model, out, dtype=dtype, dequantize=dequantize)
            case Target.peft:
                _export_peft(model, out)
            case Target.gguf:
                kind, loaded = quant_called(quant) if quant else None, load_model(model)
                page = None
                if with_modelfile:
                    from phikit.weights.modelfile import modelfile

                    page = modelfile(loaded, out.name, context=context, temperature=temperature)
                _export_gguf(loaded, out, kind, page)


def quant_called(name: str) -> "Quant":
    """The quantisation of this name, in any case; ConfigError if there is none."""
    from phikit.weights.gguf_out import Quant

    for kind in get_args(Quant):
        if kind == name.lower():
            return kind
    raise ConfigError(
        f"unknown quantisation {name!r}", fix=f"choose from: {', '.join(get_args(Quant))}"
    )


def _export_hf(model: str, out: Path, *, dtype: str | None, dequantize: bool) -> None:
    from phikit.weights.dequantise import dequantise
    from phikit.weights.save import save

    wanted = dtype_called(dtype)
    with fresh(out) as place:
        loaded = load_model(model)
        if loaded.model.quantisation is not None:
            if not dequantize:
                raise WeightsError(
                    f"{model} is quantised, in a form that transformers does not read",
                    fix="add --dequantize, which writes what its bits mean; or take the original",
                )
            loaded = dequantise(loaded, dtype=wanted)
        with _watched("safetensors") as advance:
            save(place, loaded, dtype=wanted, on_progress=advance)
    typer.echo(out)


def _export_peft(model: str, out: Path) -> None:
    """Every adapter of the model, in a folder of its name."""
    from phikit.nn.lora import route_of
    from phikit.weights.adapter import save_adapter

    with fresh(out) as place:
        loaded = load_model(model)
        names = route_of(loaded.model).names
        if not names:
            raise WeightsError(
                f"{loaded.path} carries no adapters",
                fix="--to peft takes a model with adapters inside, such as Phi-4-multimodal",
            )
        for name in names:
            save_adapter(place / name, loaded.model, name=name, base=str(loaded.path))
    typer.echo(out)


def _export_gguf(loaded: "Loaded", out: Path, quant: "Quant | None", page: str | None) -> None:
    """The file, and with a page the Modelfile beside it: both or none."""
    if page is None:
        with fresh(out) as place:
            _write_gguf(place, loaded, quant)
        typer.echo(out)
        return
    beside = out.with_suffix(MODELFILE)
    with fresh(out) as place, fresh(beside) as draft:
        _write_gguf(place, loaded, quant)
        write_atomic(draft, page)
    typer.echo(f"{out}\n{beside}")


def _write_gguf(place: Path, loaded: "Loaded", quant: "Quant | None") -> None:
    from phikit.weights.gguf_blocks import KINDS
    from phikit.weights.gguf_out import save_gguf

    quantisation = loaded.model.quantisation
    if quant is None:
        quant = "bf16" if quantisation is None else KINDS[quantisation.bits]
    with _watched(quant) as advance:
        save_gguf(place, loaded, quant=quant, on_progress=advance)


@contextmanager
def _watched(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress; what it yields takes the weights written so far, and all of them."""
    from rich.console import Console

    from phikit.base.progress import Progress

    done: int | None = None
    with Progress(console=Console(stderr=True)) as progress:

        def advance(weights: int, total: int) -> None:
            nonlocal done
            if done is None:
                progress.task(f"writing {what}, million weights", max(1, total // MILLION))
                done = 0
            progress.advance(weights // MILLION - done)
            done = weights // MILLION

        yield advance
