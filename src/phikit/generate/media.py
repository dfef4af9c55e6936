"""Requests that bring media or name an adapter, on whatever model the engine runs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from phikit.base.errors import ChatError
from phikit.generate.request import Request
from phikit.models.decoder import Decoder
from phikit.models.multimodal import MultimodalModel
from phikit.nn.lora import route_adapters, route_of


def check_media(model: Decoder, request: Request) -> None:
    """Raise ChatError if the media do not fit prompt or model, ConfigError for no such adapter."""
    if request.adapter is not None:
        route_of(model).check(request.adapter)
    if isinstance(model, MultimodalModel):
        model.check_media(request.prompt, request.media)
    elif request.media is not None:
        raise ChatError(
            "the prompt has images or audio, and the model reads text only",
            fix="load a multimodal model, such as microsoft/Phi-4-multimodal-instruct",
        )


def adapters_of(model: Decoder, requests: Sequence[Request]) -> list[str | None]:
    """The adapter of each request: the one it names, else the one its media call for."""
    wanted: list[str | None] = [None] * len(requests)
    if isinstance(model, MultimodalModel):
        wanted = model.adapters_for([request.media for request in requests])
    return [r.adapter or name for r, name in zip(requests, wanted, strict=True)]


def embed_prompts(model: Decoder, tokens_BT: Tensor, requests: Sequence[Request]) -> Tensor:
    """What the model's first block is given for the prompts of the requests, [B, T, D]."""
    media = [request.media for request in requests]
    if isinstance(model, MultimodalModel) and any(media):
        return model.embed(tokens_BT, media=media)
    return model.embed(tokens_BT)


def routed(model: Decoder, adapters: Sequence[str | None]) -> AbstractContextManager[None]:
    """`route_adapters`, at no cost where no row names an adapter."""
    return route_adapters(model, adapters) if any(adapters) else nullcontext()
