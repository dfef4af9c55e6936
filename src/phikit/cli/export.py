"""`phikit export`: a model for other programs: Ollama and llama.cpp, or transformers."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.base.errors import ConfigError, WeightsError
from phikit.base.files import write_atomic
from phikit.cli.convert import dtype_called, load_model, quant_called
from phikit.cli.locate import RUN_HELP, complete_model
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


To = Annotated[
    Target,
    typer.Option(
        metavar="LAYOUT",
        help="gguf: a file for llama.cpp, and a Modelfile for Ollama beside it. hf: a folder for "
        "transformers.",
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
    if to is Target.hf and quant is not None:
        raise ConfigError(f"--quant {quant} goes with --to gguf alone", fix="leave it out")
    if to is Target.gguf and (dtype is not None or dequantize):
        given = "--dequantize" if dequantize else f"--dtype {dtype}"
        raise ConfigError(
            f"{given} goes with --to hf alone", fix="leave it out; --quant f16 is for gguf"
        )
    with stoppable(kept="nothing is written until all is done"):
        if to is Target.hf:
            _export_hf(model, out, dtype=dtype, dequantize=dequantize)
            typer.echo(out)
            return
        kind = quant_called(quant) if quant else None
        loaded = load_model(model)
        if with_modelfile:
            from phikit.weights.modelfile import modelfile

            page = modelfile(loaded, out.name, context=context, temperature=temperature)
            beside = out.with_suffix(MODELFILE)
            with fresh(out) as place, fresh(beside) as draft:
                _write_gguf(place, loaded, kind)
                write_atomic(draft, page)
            typer.echo(f"{out}\n{beside}")
            return
        with fresh(out) as place:
            _write_gguf(place, loaded, kind)
        typer.echo(out)


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
        save(place, loaded, dtype=wanted)


def _write_gguf(place: Path, loaded: "Loaded", quant: "Quant | None") -> None:
    from rich.console import Console

    from phikit.base.progress import Progress
    from phikit.weights.gguf_blocks import KINDS
    from phikit.weights.gguf_out import save_gguf

    quantisation = loaded.model.quantisation
    if quant is None:
        quant = "bf16" if quantisation is None else KINDS[quantisation.bits]
    done = -1
    with Progress(console=Console(stderr=True)) as progress:

        def advance(weights: int, total: int) -> None:
            nonlocal done
            if done < 0:
                progress.task(f"writing {quant}, million weights", max(1, total // MILLION))
                done = 0
            progress.advance(weights // MILLION - done)
            done = weights // MILLION

        save_gguf(place, loaded, quant=quant, on_progress=advance)
