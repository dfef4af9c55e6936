"""A conversation with one model: its settings, its commands, and replies shown as they are made.

What is unusual: a reply is shown by parsing all of its tokens again after each one. The renderer
thus stays the only place that knows what thinking looks like, and what is on the screen at the end
is what `parse` returns.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unicodedata import category

from rich.console import Console

from phikit.base.errors import ChatError, ConfigError, ContextOverflowError
from phikit.base.files import write_atomic
from phikit.chat.history import Medium, Recorder, Turn
from phikit.chat.message import Message
from phikit.generate.language_model import (
    LanguageModel,
    Options,
    check_drawing,
    cut_message,
    of,
    stop_strings,
)
from phikit.generate.request import Request
from phikit.generate.stops import CLOSES, OPENS, visible
from phikit.weights.load import Loaded

SETTABLE: Mapping[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "seed": int,
}
"""What /set takes, and how its value is read."""


@dataclass
class Settings:
    """What commands may change while the conversation goes on."""

    temperature: float
    max_new_tokens: int
    system: str | None = None
    seed: int = 0
    remembers: bool = True
    """Whether a question is asked together with the turns before it."""
    shows_thinking: bool = True
    others: Options = field(default_factory=Options)
    """How else tokens are drawn, and where a reply stops."""


@dataclass(frozen=True)
class Exchange:
    """A question, the files that it showed, and the reply to it."""

    question: str
    images: tuple[str, ...]
    audio: tuple[str, ...]
    reply: Message


class Conversation:
    """Takes lines: commands that begin with a slash, and questions.

    Args:
        loaded: the model to talk to.
        settings: what commands change.
        console: where replies go; standard output by default.
        recorder: writes down what is said; None keeps nothing.
        load: opens another model, by its name.
    """

    def __init__(
        self,
        loaded: Loaded,
        settings: Settings,
        *,
        console: Console | None = None,
        recorder: Recorder | None = None,
        load: Callable[[str], Loaded] | None = None,
    ) -> None:
        self.model, self.settings = _speaker(loaded), settings
        self.console = console or Console(highlight=False)
        self.exchanges: list[Exchange] = []
        """What was said since the last /reset."""
        self._recorder, self._load = recorder, load
        self._images: list[str] = []
        self._audio: list[str] = []
        self._asked = 0
        self._commands: dict[str, Callable[[str], bool]] = {
            "help": self._help,
            "image": self._image,
            "audio": self._clip,
            "undo": self._undo,
            "retry": self._retry,
            "reset": self._reset,
            "system": self._system,
            "set": self._set,
            "temperature": self._temperature,
            "think": self._think,
            "memory": self._memory,
            "model": self._model,
            "save": self._save,
            "quit": self._quit,
        }

    @property
    def commands(self) -> list[str]:
        """What lines may begin with."""
        return [f"/{name}" for name in self._commands]

    @property
    def turns(self) -> list[Message]:
        """What was said since the last /reset, as messages."""
        return _messages(self.exchanges)

    def greet(self) -> None:
        """Say what can be done here."""
        config = self.model.config
        self._note(f"{self.model.path}: context {config.max_context} tokens. /help for commands.")
        if not self.settings.remembers:
            self._note("Each question is asked by itself, as in training; /memory on keeps turns.")

    def show(self, *, images: Sequence[str] = (), audio: Sequence[str] = ()) -> None:
        """Show these files with the next question; ChatError if one is not there."""
        found = {path: Path(path).expanduser() for path in (*images, *audio)}
        for path, file in found.items():
            try:
                is_there = file.is_file()
            except OSError as error:  # such as a name that is too long
                raise ChatError(f"cannot read {path}: {error.strerror}") from error
            if not is_there:
                raise ChatError(f"there is no file {path}", fix="check the path")
        self._images += [str(found[path]) for path in images]
        self._audio += [str(found[path]) for path in audio]

    def take(self, line: str) -> bool:
        """Obey a command or answer a question; False when the conversation is over.

        Raises:
            ChatError: the command is unknown, or cannot be obeyed, or a file is no image.
            ContextOverflowError: the question is too long for the model.
            StorageError: /save cannot write.
        """
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, _, argument = line[1:].partition(" ")
        if name not in self._commands:
            near = get_close_matches(name, self._commands, n=1, cutoff=0.0)[0]
            raise ChatError(f"no command /{name}", fix=f"did you mean /{near}? /help lists all")
        return self._commands[name](argument.strip())

    def _ask(self, question: str) -> None:
        """Answer a question, with the files that were shown for it."""
        images, audio = tuple(self._images), tuple(self._audio)
        self._images, self._audio = [], []  # a file that cannot be read is not shown again
        self._answer(Exchange(question, images, audio, Message("assistant", "")), self.exchanges)

    def _answer(self, asked: Exchange, before: list[Exchange]) -> None:
        """Fill in the reply, and put the exchange behind those `before`, which it may remember."""
        renderer = self.model.renderer
        told = [*(before if self.settings.remembers else ()), asked]
        request = self._request(
            [*self._opening(), *_messages(told)[:-1]],
            images=[path for exchange in told for path in exchange.images],
            audio=[path for exchange in told for path in exchange.audio],
        )
        stop = stop_strings(request)
        view = ReplyView(self.console, shows_thinking=self.settings.shows_thinking, stop=stop)
        started, tokens, finish = time.perf_counter(), list[int](), "cancelled"
        try:
            for token in self.model.engine.stream(request):
                tokens.append(token)
                view.show(renderer.parse(tokens))
            has_stopped = tokens[-1] in request.stop_ids or (request.stops or bool)(tokens)
            finish = "stop" if has_stopped else "length"
        finally:
            seconds = time.perf_counter() - started
            reply = cut_message(renderer.parse(tokens), stop)
            view.finish(reply)
            self._asked += 1
            if tokens:
                exchange = replace(asked, reply=reply)
                self._take_back(len(self.exchanges) - len(before))
                self._record(exchange, request, tokens=len(tokens), seconds=seconds, finish=finish)
                self.exchanges = [*before, exchange]
        if self.console.is_terminal:
            cut = ", cut at --max-new-tokens" if finish == "length" else ""
            self._note(f"({len(tokens)} tokens, {len(tokens) / seconds:.0f} tokens/s{cut})")

    def _take_back(self, count: int) -> None:
        """Forget so many of the last exchanges, here and in the history."""
        self.exchanges = self.exchanges[: len(self.exchanges) - count]
        if self._recorder is not None and count:
            self._recorder.rewind(2 * count)

    def _record(
        self, exchange: Exchange, request: Request, *, tokens: int, seconds: float, finish: str
    ) -> None:
        if self._recorder is None:
            return
        settings, name = self.settings, self._recorder.model
        media = []
        for kind, paths in (("image", exchange.images), ("audio", exchange.audio)):
            with suppress(OSError):  # removed meanwhile
                media += [Medium.of(kind, path) for path in paths]
        drawn = {**settings.others, "temperature": settings.temperature, "seed": request.seed}
        opening = []
        if settings.system is not None and self._recorder.conversation is None:
            opening = [Turn(Message("system", settings.system), name)]
        self._recorder.record(
            *opening,
            Turn(Message("user", exchange.question), name, media=tuple(media)),
            Turn(
                exchange.reply,
                name,
                settings=drawn,
                prompt_tokens=len(request.prompt),
                tokens=tokens,
                seconds=seconds,
                finish_reason=finish,
            ),
        )

    def _before(self) -> list[Message]:
        """What the model is told before the question."""
        return self._opening() + (self.turns if self.settings.remembers else [])

    def _opening(self) -> list[Message]:
        system = self.settings.system
        return [] if system is None else [Message("system", system)]

    def _request(
        self, asked: list[Message], *, images: Sequence[str] = (), audio: Sequence[str] = ()
    ) -> Request:
        """A request whose reply may take what the context leaves, up to the setting."""
        settings = self.settings
        seed = settings.seed + self._asked
        options: Options = {**settings.others, "temperature": settings.temperature, "seed": seed}
        request = self.model.request(
            asked,
            images=images,
            audio=audio,
            max_new_tokens=settings.max_new_tokens,
            **options,
        )
        room = self.model.config.max_context - len(request.prompt)
        request = replace(request, max_new_tokens=max(1, min(settings.max_new_tokens, room)))
        try:
            self.model.engine.check(request)
        except ContextOverflowError as error:
            fix = "ask something shorter"
            if any(message.role == "assistant" for message in asked):
                fix = "/reset starts a new conversation"
            raise ContextOverflowError(error.what, fix=fix) from None
        return request

    def _note(self, text: str) -> None:
        self.console.out(text, style="dim", highlight=False)

    def _last(self, purpose: str) -> Exchange:
        if not self.exchanges:
            raise ChatError(f"there is nothing to {purpose} yet", fix="ask something")
        return self.exchanges[-1]

    def _help(self, _: str) -> bool:
        """/help: this list."""
        for command in self._commands.values():
            self._note((command.__doc__ or "").strip())
        self._note("A line that ends in a backslash goes on in the next one.")
        self._note('Lines between two """ are one question.')
        self._note("Ctrl-C stops a reply, twice in quick succession or Ctrl-D leaves.")
        return True

    def _image(self, path: str) -> bool:
        """/image FILE: show an image with the next question."""
        self.show(images=[path])
        return True

    def _clip(self, path: str) -> bool:
        """/audio FILE: play a clip with the next question."""
        self.show(audio=[path])
        return True

    def _undo(self, _: str) -> bool:
        """/undo: take the last question and its reply back."""
        last = self._last("take back")
        self._take_back(1)
        self._note(f"taken back: {last.question}")
        return True

    def _retry(self, _: str) -> bool:
        """/retry: ask the last question again, for another reply."""
        self._answer(self._last("ask again"), self.exchanges[:-1])
        return True

    def _reset(self, _: str) -> bool:
        """/reset: forget the conversation so far."""
        self.exchanges = []
        if self._recorder is not None:
            self._recorder.restart()
        return True

    def _system(self, text: str) -> bool:
        """/system TEXT: set the system message and start anew; without TEXT, the model's own."""
        self.settings.system = text or None
        return self._reset("")

    def _set(self, text: str) -> bool:
        """/set NAME VALUE: temperature, top_k, top_p, min_p ...; off for none; alone, lists all."""
        settings = self.settings
        if not text:
            for name in SETTABLE:
                own = getattr(settings, name, None)
                self._note(f"{name} {own if own is not None else settings.others.get(name, 'off')}")
            return True
        name, _, word = text.partition(" ")
        if name not in SETTABLE:
            near = get_close_matches(name, SETTABLE, n=1, cutoff=0.0)[0]
            raise ChatError(f"{name} cannot be set", fix=f"did you mean {near}? /set lists all")
        try:
            value = None if word.strip() == "off" else SETTABLE[name](word)
            trial: Any = {"max_new_tokens": 1, "temperature": 1.0, name: value}
            check_drawing(Request([0], **trial))
        except (ValueError, TypeError, ConfigError) as error:
            fix = error.fix if isinstance(error, ConfigError) else "give a number"
            raise ChatError(f"{name} cannot be {word!r}", fix=fix) from error
        if hasattr(settings, name):
            setattr(settings, name, value)
        else:
            settings.others = {**settings.others, name: value}  # pyright: ignore
        return True

    def _temperature(self, text: str) -> bool:
        """/temperature T: how freely tokens are drawn; 0 takes the likeliest."""
        return self._set(f"temperature {text}")

    def _think(self, text: str) -> bool:
        """/think on|off: show the thinking, or fold it into one line; alone, that of the last."""
        if text:
            self.settings.shows_thinking = _switch(text)
        else:
            self._note(disarmed(self._last("look into").reply.thinking or "it did not think"))
        return True

    def _memory(self, text: str) -> bool:
        """/memory on|off: ask with the turns before, or each question by itself."""
        self.settings.remembers = _switch(text)
        return True

    def _model(self, name: str) -> bool:
        """/model NAME: go on with another model."""
        if not name or self._load is None:
            raise ChatError("/model needs the name of a model", fix="`phikit ls` lists them")
        self.model = _speaker(self._load(name))
        if self._recorder is not None:
            self._recorder.model = name
        self.greet()
        return True

    def _save(self, text: str) -> bool:
        """/save FILE: write the conversation, one JSON message a line."""
        if not text:
            raise ChatError("/save needs a file name", fix="for example: /save talk.jsonl")
        records = [
            {key: x for key, x in asdict(turn).items() if x or key == "content"}
            for turn in self.turns
        ]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        write_atomic(Path(text).expanduser(), "".join(lines))
        self._note(f"{len(self.turns)} messages written to {text}")
        return True

    def _quit(self, _: str) -> bool:
        """/quit: leave."""
        return False


class ReplyView:
    """Prints a growing reply: thinking dim, then the answer.

    Where output is no terminal the thinking stands between its tags instead.

    Args:
        stop: strings that end the reply, of which nothing is to be seen.
    """

    def __init__(self, console: Console, *, shows_thinking: bool, stop: Sequence[str] = ()) -> None:
        self._console, self._shows_thinking, self._stop = console, shows_thinking, stop
        self._thought, self._said = "", ""
        self._is_thinking = False

    def show(self, message: Message) -> None:
        """Print what is certain of the reply so far and not printed yet."""
        if message.thinking is not None:
            self._open_thinking()
            is_over = message.content != ""
            self._think(message.thinking if is_over else visible(message.thinking, self._stop))
        self._say(visible(message.content, self._stop))

    def finish(self, message: Message) -> None:
        """Print the rest, and end the line."""
        if message.thinking is not None:
            self._open_thinking()
            self._think(message.thinking)
            self._close_thinking()
        self._say(message.content)
        self._print("\n" if self._console.is_terminal else "\n\n")

    def _open_thinking(self) -> None:
        if self._is_thinking or self._thought or self._said:
            return
        self._is_thinking = True
        if not self._shows_thinking:
            self._print("thinking; /think on shows it", dim=True)
        elif not self._console.is_terminal:
            self._print(f"{OPENS}\n")

    def _close_thinking(self) -> None:
        if not self._is_thinking:
            return
        self._is_thinking = False
        tagged = self._shows_thinking and not self._console.is_terminal
        self._print(f"{CLOSES}\n" if tagged else "\n\n")

    def _think(self, text: str) -> None:
        if text.startswith(self._thought):
            if self._shows_thinking:
                self._print(text[len(self._thought) :], dim=True)
            self._thought = text

    def _say(self, text: str) -> None:
        if text != self._said and text.startswith(self._said):
            self._close_thinking()
            self._print(text[len(self._said) :])
            self._said = text

    def _print(self, text: str, *, dim: bool = False) -> None:
        if text:
            self._console.out(disarmed(text), end="", style="dim" if dim else None, highlight=False)


def disarmed(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c in "\n\t" or category(c) != "Cc" else "\ufffd" for c in text)


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ChatError(f"{text!r} is neither on nor off", fix="say on or off")
    return text == "on"


def _messages(exchanges: Sequence[Exchange]) -> list[Message]:
    """Questions and replies; placeholders say where the files of all of them stand, in order."""
    messages, images, clips = [], 0, 0
    for exchange in exchanges:
        marks = [f"<|image_{images + number}|>" for number in range(1, len(exchange.images) + 1)]
        marks += [f"<|audio_{clips + number}|>" for number in range(1, len(exchange.audio) + 1)]
        images, clips = images + len(exchange.images), clips + len(exchange.audio)
        messages += [Message("user", "".join((*marks, exchange.question))), exchange.reply]
    return messages


def _speaker(loaded: Loaded) -> LanguageModel:
    return loaded if isinstance(loaded, LanguageModel) else of(loaded)
