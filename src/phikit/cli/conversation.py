"""A conversation with one model: its settings, its commands, and replies shown as they are made.

What is unusual: a reply is shown by parsing all of its tokens again after each one. The renderer
thus stays the only place that knows what thinking looks like, and what is on the screen at the end
is what `parse` returns.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from unicodedata import category

from rich.console import Console

from phikit.base.errors import ChatError, ContextOverflowError
from phikit.base.files import write_atomic
from phikit.chat.message import Message
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.weights.load import Loaded

OPENS, CLOSES = "<think>", "\n</think>"


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


class Conversation:
    """Takes lines: commands that begin with a slash, and questions."""

    def __init__(
        self, loaded: Loaded, settings: Settings, *, console: Console | None = None
    ) -> None:
        self.loaded, self.settings = loaded, settings
        self.console = console or Console(highlight=False)
        self.engine = Engine(loaded.model)
        self.turns: list[Message] = []
        """What was said since the last /reset."""
        self._asked = 0
        self._commands: dict[str, Callable[[str], bool]] = {
            "help": self._help,
            "reset": self._reset,
            "system": self._system,
            "temperature": self._temperature,
            "think": self._think,
            "memory": self._memory,
            "save": self._save,
            "quit": self._quit,
        }

    def greet(self) -> None:
        """Say what can be done here."""
        config = self.loaded.config
        self._note(f"{self.loaded.path}: context {config.max_context} tokens. /help for commands.")
        if not self.settings.remembers:
            self._note("Each question is asked by itself, as in training; /memory on keeps turns.")

    def take(self, line: str) -> bool:
        """Obey a command or answer a question; False when the conversation is over.

        Raises:
            ChatError: the command is unknown, or cannot be obeyed.
            ContextOverflowError: the question is too long for the model.
            StorageError: /save cannot write.
        """
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._answer(line)
            return True
        name, _, argument = line[1:].partition(" ")
        if name not in self._commands:
            near = get_close_matches(name, self._commands, n=1, cutoff=0.0)[0]
            raise ChatError(f"no command /{name}", fix=f"did you mean /{near}? /help lists all")
        return self._commands[name](argument.strip())

    def _answer(self, question: str) -> None:
        renderer, settings = self.loaded.renderer, self.settings
        asked = [*self._before(), Message("user", question)]
        request = self._request(renderer.prompt(asked))
        view = ReplyView(self.console, shows_thinking=settings.shows_thinking)
        started, tokens = time.perf_counter(), []
        try:
            for token in self.engine.stream(request):
                tokens.append(token)
                view.show(renderer.parse(tokens))
        finally:
            reply = renderer.parse(tokens)
            view.finish(reply)
            self.turns += [Message("user", question), reply]
            self._asked += 1
        if self.console.is_terminal:
            rate = len(tokens) / (time.perf_counter() - started)
            cut = "" if tokens[-1] in request.stop_ids else ", cut at --max-new-tokens"
            self._note(f"({len(tokens)} tokens, {rate:.0f} tokens/s{cut})")

    def _before(self) -> list[Message]:
        """What the model is told before the question."""
        system = self.settings.system
        opening = [] if system is None else [Message("system", system)]
        return opening + (self.turns if self.settings.remembers else [])

    def _request(self, prompt: list[int]) -> Request:
        """A request whose reply may take what the context leaves, up to the setting."""
        settings = self.settings
        room = self.loaded.config.max_context - len(prompt)
        request = Request(
            prompt=prompt,
            max_new_tokens=max(1, min(settings.max_new_tokens, room)),
            temperature=settings.temperature,
            seed=settings.seed + self._asked,
            stop_ids=self.loaded.renderer.stop_ids,
        )
        try:
            self.engine.check(request)
        except ContextOverflowError as error:
            long_ago = self.settings.remembers and self.turns
            fix = "/reset starts a new conversation" if long_ago else "ask something shorter"
            raise ContextOverflowError(error.what, fix=fix) from None
        return request

    def _note(self, text: str) -> None:
        self.console.out(text, style="dim", highlight=False)

    def _help(self, _: str) -> bool:
        """/help: this list."""
        for command in self._commands.values():
            self._note((command.__doc__ or "").strip())
        self._note("A line that ends in a backslash goes on in the next one.")
        self._note("Ctrl-C stops a reply, Ctrl-D leaves.")
        return True

    def _reset(self, _: str) -> bool:
        """/reset: forget the conversation so far."""
        self.turns.clear()
        return True

    def _system(self, text: str) -> bool:
        """/system TEXT: set the system message and start anew; without TEXT, the model's own."""
        self.settings.system = text or None
        return self._reset("")

    def _temperature(self, text: str) -> bool:
        """/temperature T: how freely tokens are drawn; 0 takes the likeliest."""
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ChatError(f"{text!r} is not a temperature", fix="give a number from 0 up")
        self.settings.temperature = value
        return True

    def _think(self, text: str) -> bool:
        """/think on|off: show the thinking, or fold it into one line."""
        self.settings.shows_thinking = _switch(text)
        return True

    def _memory(self, text: str) -> bool:
        """/memory on|off: ask with the turns before, or each question by itself."""
        self.settings.remembers = _switch(text)
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
    """

    def __init__(self, console: Console, *, shows_thinking: bool) -> None:
        self._console, self._shows_thinking = console, shows_thinking
        self._thought, self._said = "", ""
        self._is_thinking = False

    def show(self, message: Message) -> None:
        """Print what is certain of the reply so far and not printed yet."""
        if message.thinking is not None:
            self._open_thinking()
            is_over = message.content != ""
            self._think(message.thinking if is_over else _certain(message.thinking))
        self._say(_certain(message.content))

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


def _certain(text: str) -> str:
    """The text without an end that later tokens may turn into something else."""
    text = text.rstrip("\ufffd")
    starts = [tag[:length] for tag in (OPENS, CLOSES) for length in range(1, len(tag) + 1)]
    held = max((len(start) for start in starts if text.endswith(start)), default=0)
    return text[: len(text) - held]


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ChatError(f"{text!r} is neither on nor off", fix="say on or off")
    return text == "on"
