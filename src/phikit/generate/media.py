"""Requests that bring media or name an adapter, on whatever model the engine runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from phikit.base.errors import ChatError
from phikit.generate.request import Request
from phikit.models.decoder import Decoder
from phikit.nn.lora import route_adapters, route_of


def check_media(model: Decoder, request: Request) -> None:
    """Raise ChatError if the media do not fit prompt or model, ConfigError for no such adapter."""
    if request.adapter is not None:
        route_of(model).check(request.adapter)
    if model.senses:
        model.check_media(request.prompt, request.media)
    elif request.media is not None:
        raise ChatError(
            "the prompt has images or audio, and the model reads text only",
            fix="load a multimodal model, such as microsoft/Phi-4-multimodal-instruct",
        )


def resolve_adapter(model: Decoder, request: Request) -> str | None:
    """The adapter of a request: the one it names, else what its media call for, else the chosen."""
    [wanted] = model.adapters_for([request.media])
    return request.adapter or wanted or route_of(model).chosen


def embed_prompt(model: Decoder, request: Request) -> Tensor:
    """What the model's first block is given for the prompt of a request with media, [T, D]."""
    tokens_BT = torch.tensor([list(request.prompt)], device=model.device)
    return model.embed(tokens_BT, media=[request.media])[0]


def routed(model: Decoder, adapters: Sequence[str | None]) -> AbstractContextManager[None]:
    """`route_adapters`, at no cost where no row names an adapter."""
    return route_adapters(model, adapters) if any(adapters) else nullcontext()
