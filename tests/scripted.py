"""Small random models that are made to say what a test wants, by the engine's own constraints.

Everything runs as it does with a real model: prompts, encoders, cache, sampler, streams. Only which
token may come next is given.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from phikit.chat.message import Message
from phikit.chat.phi import AUDIO_TOKEN, IMAGE_TOKEN
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import train_tokenizer
from phikit.generate.engine import Engine
from phikit.generate.language_model import LanguageModel
from phikit.generate.request import Request
from phikit.models.decoder import Decoder
from phikit.models.multimodal import MultimodalModel
from phikit.serve.models import ModelShelf, Source

SPECIALS = (
    *("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *(IMAGE_TOKEN, AUDIO_TOKEN, "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
    *("<|tool_response|>", "<think>", "</think>"),
)
TEXTS = ("What is 12 + 7? The answer is 19, because 12 and 7 make 19.\n",)
TOKENIZER = train_tokenizer(TEXTS, size=290, specials=SPECIALS)
IMAGE, AUDIO = TOKENIZER.special(IMAGE_TOKEN), TOKENIZER.special(AUDIO_TOKEN)
OTHERWISE = Message("assistant", "I was not told what to say.")


class Script:
    """Allows one token at each place, after a pause."""

    def __init__(self, tokens: list[int], *, vocab_size: int, pause_s: float) -> None:
        self._tokens, self._pause_s = tokens, pause_s
        self._place = 0
        self._allowed_V = torch.zeros(vocab_size, dtype=torch.bool)

    @property
    def finished(self) -> bool:
        return self._place == len(self._tokens)

    def allowed(self) -> Tensor:
        time.sleep(self._pause_s)
        self._allowed_V.zero_()
        self._allowed_V[self._tokens[self._place]] = True
        return self._allowed_V

    def accept(self, token: int) -> None:
        assert token == self._tokens[self._place]
        self._place += 1


class Scripted(LanguageModel):
    """Answers the last question as `replies` say, by a word in it; they may change at any time."""

    replies: Mapping[str, Message]
    pause_s: float = 0.0

    def request(self, prompt: Any, **options: Any) -> Request:
        request = super().request(prompt, **options)
        asked = prompt[-1].content
        said = next((reply for word, reply in self.replies.items() if word in asked), OTHERWISE)
        example = self.renderer.example([Message("user", "Say it."), said])
        tokens = example.tokens[example.loss_mask].tolist()
        size = self.config.vocab_size

        def constraint() -> Script:
            return Script(tokens, vocab_size=size, pause_s=self.pause_s)

        return replace(request, constraint=constraint)


def scripted(model: Decoder, replies: Mapping[str, Message], *, pause_s: float = 0.0) -> Scripted:
    """A model that says `replies`; its vocabulary must be that of `TOKENIZER`."""
    loaded = Scripted(model, TOKENIZER, renderer_for(TOKENIZER, "phi4-mini"))
    object.__setattr__(loaded, "replies", replies)
    object.__setattr__(loaded, "pause_s", pause_s)
    return loaded


def shelf_of(**models: LanguageModel) -> ModelShelf:
    """A shelf with these models."""

    def source(loaded: LanguageModel) -> Source:
        return Source(lambda: loaded, lambda: 1, {})

    sources = {name: source(loaded) for name, loaded in models.items()}
    return ModelShelf(
        sources, make_engine=lambda loaded: Engine(loaded.model, max_rows=4), memory_bytes=1 << 32
    )


def sizes(model: type[Decoder]) -> dict[str, Any]:
    """What `tiny_model` and `tiny_multimodal` are to be made with."""
    own = {"image_token": IMAGE, "audio_token": AUDIO} if model is MultimodalModel else {}
    return {"vocab_size": TOKENIZER.size, "max_context": 2048, **own}
