"""`phikit merge`: an adapter into its base; and how commands that write models load them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phikit.cli.locate import RUN_HELP, complete_model, locate
from phikit.cli.output import fresh
from phikit.cli.speaker import Dtype
from phikit.cli.stop import stoppable

if TYPE_CHECKING:
    import torch

    from phikit.weights.load import Loaded


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
    with stoppable(kept="nothing is written until all is done"), fresh(out) as place:
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
