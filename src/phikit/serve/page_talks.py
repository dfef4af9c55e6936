"""The conversations of the chat page: what is asked, asked again, edited, stopped and deleted.

The history file is the truth; a tab knows only the id of the conversation it shows. So a reload, a
second tab and a restart of the server all see the same. A question is written down when it is
asked, its reply when that ends.

What is unusual: a question whose reply failed stays on the page with the reason, for it to be
edited or asked again, and is taken back when another is asked in its place.
"""

import mimetypes
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from phikit.base.errors import ChatError, PhikitError
from phikit.base.files import storage_errors
from phikit.chat.history import Conversation, History, Medium, Turn
from phikit.chat.message import Message
from phikit.serve.models import ModelShelf
from phikit.serve.page_reply import LiveReply, Question, Settings

SOURCE = "page"
LISTED = 200
"""So many conversations are offered, the one spoken in last first."""


class Choice(NamedTuple):
    """A model that the page offers, by its name on the shelf."""

    name: str

    sees: bool = False
    hears: bool = False
    adapters: tuple[str, ...] = ()
    remembers: bool = True
    """False for a model that was trained on single questions."""


class Talks:
    """Holds all conversations; belongs to the server's event loop.

    Args:
        media: the folder that attached files are copied to, one folder for each conversation.
    """

    def __init__(
        self, shelf: ModelShelf, choices: Sequence[Choice], *, history: History, media: Path
    ) -> None:
        self.choices = {choice.name: choice for choice in choices}
        self.shelf, self.history, self.media = shelf, history, media
        self._live: dict[str, LiveReply] = {}
        self._drop_forgotten_media()

    def listed(self) -> list[Conversation]:
        """The conversations, the one spoken in last first."""
        return [talk for talk in self.history.conversations(limit=LISTED) if talk.turns]

    def turns(self, id_: str | None) -> list[Turn]:
        """What was said; nothing in a conversation that has not begun, or is gone."""
        return [] if id_ is None else self.history.turns(id_)

    def reply(self, id_: str | None) -> LiveReply | None:
        """The reply that is being made, or that failed."""
        return self._live.get(id_ or "")

    def ask(
        self, id_: str | None, text: str, files: Sequence[str], *, model: str, settings: Settings
    ) -> str:
        """Ask a question, in a new conversation if `id_` is None; returns the id.

        Raises:
            ChatError: nothing is asked, a reply is still being made, a file is neither an image nor
                a sound, or the model neither sees nor hears it.
        """
        self._check_idle(id_)
        if not text.strip() and not files:
            raise ChatError("the question is empty", fix="type something")
        kinds = [self._kind(file, model) for file in files]
        id_ = id_ or self.history.begin(model=model, source=SOURCE)
        media = tuple(self._kept(id_, *pair) for pair in zip(kinds, files, strict=True))
        turns = self.turns(id_)
        if turns and turns[-1].message.role == "user":
            self.history.rewind(id_, 1)
        self.history.add(id_, [Turn(Message("user", text), model, media=media)])
        self._start(id_, model, settings)
        return id_

    def ask_again(self, id_: str, number: int, *, model: str, settings: Settings) -> None:
        """Have the question at or before turn `number` answered anew; later turns are taken back.

        Raises ChatError as `ask`.
        """
        self._check_idle(id_)
        turns = self.turns(id_)
        asked = _question_before(turns, number)
        before = turns[asked + 1].settings.get("seed", 0) if asked + 1 < len(turns) else None
        self.history.rewind(id_, len(turns) - asked - 1)
        # The same seed would say the same.
        seed = settings.seed if before is None or before < settings.seed else before + 1
        self._start(id_, model, replace(settings, seed=seed))

    def edit(self, id_: str, number: int, text: str, *, model: str, settings: Settings) -> None:
        """Ask turn `number` in other words; what followed is taken back.

        Raises ChatError as `ask`.
        """
        self._check_idle(id_)
        if not text.strip():
            raise ChatError("the question is empty", fix="type something")
        turns = self.turns(id_)
        asked = _question_before(turns, number)
        media = turns[asked].media
        self.history.rewind(id_, len(turns) - asked)
        self.history.add(id_, [Turn(Message("user", text), model, media=media)])
        self._start(id_, model, settings)

    def stop(self, id_: str | None) -> None:
        """End the reply that is being made, if one is; what it has said is kept."""
        reply = self.reply(id_)
        if reply is not None:
            reply.stop()

    def delete(self, id_: str) -> None:
        """Forget a conversation and its attached files."""
        self.stop(id_)
        self._live.pop(id_, None)
        self.history.delete(id_)
        shutil.rmtree(self.media / id_, ignore_errors=True)

    def _start(self, id_: str, model: str, settings: Settings) -> None:
        question = question_of(self.turns(id_), settings)

        def keep(reply: Turn) -> None:
            if self._live.get(id_) is live:  # otherwise it was deleted meanwhile
                self.history.add(id_, [reply])

        self._live[id_] = live = LiveReply(self.shelf, model, question, settings, keep=keep)

    def _check_idle(self, id_: str | None) -> None:
        reply = self.reply(id_)
        if reply is not None and not reply.done:
            raise ChatError("a reply is still being made", fix="stop it, or wait for its end")

    def _kind(self, file: str, model: str) -> str:
        """Whether a file is an image or a sound that the model can take."""
        name, choice = Path(file).name, self.choices[model]
        kind = (mimetypes.guess_type(name)[0] or "").partition("/")[0]
        if kind not in ("image", "audio"):
            raise ChatError(f"{name} is neither an image nor a sound", fix="attach one of these")
        if not (choice.sees if kind == "image" else choice.hears):
            verb = "see images" if kind == "image" else "hear sounds"
            raise ChatError(
                f"{model} does not {verb}",
                fix="take the file away, or choose a multimodal model, such as "
                "microsoft/Phi-4-multimodal-instruct",
            )
        return kind

    def _kept(self, id_: str, kind: str, file: str) -> Medium:
        """A file copied to where it outlives the upload."""
        medium, folder = Medium.of(kind, file), self.media / id_
        with storage_errors(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = folder / f"{medium.sha256[:16]}{Path(file).suffix.lower()}"
            shutil.copyfile(file, kept)
        return replace(medium, path=str(kept))

    def _drop_forgotten_media(self) -> None:
        """Remove the files of conversations that were deleted elsewhere."""
        for folder in self.media.glob("*/"):
            try:
                self.history.find(folder.name)
            except PhikitError:
                shutil.rmtree(folder, ignore_errors=True)


def question_of(turns: Sequence[Turn], settings: Settings) -> Question:
    """The last turn as a question, with the turns before it if the settings say so."""
    asked = turns if settings.remembers else turns[-1:]
    counts = {"image": 0, "audio": 0}
    files: dict[str, list[Path]] = {"image": [], "audio": []}
    messages = []
    for turn in asked:
        marks = []
        for medium in turn.media:
            counts[medium.kind] += 1
            marks.append(f"<|{medium.kind}_{counts[medium.kind]}|>")
            files[medium.kind].append(Path(medium.path or ""))
        text = turn.message.content
        if not any(mark in text for mark in marks):
            text = "".join((*marks, text))
        messages.append(replace(turn.message, content=text))
    if settings.system is not None:
        own = [message for message in messages if message.role != "system"]
        messages = [Message("system", settings.system), *own]
    return Question(messages, files["image"], files["audio"])


def _question_before(turns: Sequence[Turn], number: int) -> int:
    """The number of the user's turn at or before `number`."""
    for asked in range(min(number, len(turns) - 1), -1, -1):
        if turns[asked].message.role == "user":
            return asked
    raise ChatError("this question is not there any more", fix="load the page again")
