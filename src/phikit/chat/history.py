"""Conversations kept in one SQLite file, whoever holds them: a terminal, a page, a server.

`History` reads and writes the file and raises typed errors. `Recorder` is what a conversation talks
to: it never raises and never waits long, since a full or locked disk must not cost anybody a reply;
it says so once and keeps silent from then on.

What is unusual: images and sounds are kept as their paths and digests, never as their bytes. The
file is open to its owner alone, several processes may write to it (SQLite's write-ahead log), and
its size is bounded: beyond `MAX_BYTES` the conversations that were left longest ago go.
"""

import hashlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from phikit.base.errors import DataError, PhikitError, StorageError
from phikit.base.files import storage_errors
from phikit.base.places import data_folder
from phikit.chat.message import Message
from phikit.chat.tools import ToolCall, ToolDefinition

SWITCH = "PHIKIT_HISTORY"
"""The environment variable that keeps nothing if it is "off"."""
MAX_BYTES = 512 << 20
WAIT_S = 5.0
"""How long a locked file is waited for: other writers take milliseconds."""
TITLE_CHARS = 80

_MIGRATIONS = (
    """
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY,
        created REAL NOT NULL,
        updated REAL NOT NULL,
        source TEXT NOT NULL,
        model TEXT NOT NULL,
        title TEXT NOT NULL
    ) STRICT;
    CREATE INDEX conversations_updated ON conversations (updated);
    CREATE TABLE turns (
        conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        created REAL NOT NULL,
        model TEXT NOT NULL,
        role TEXT NOT NULL,
        content TEXT NOT NULL,
        thinking TEXT,
        about TEXT NOT NULL,
        PRIMARY KEY (conversation, number)
    ) STRICT, WITHOUT ROWID;
    """,
)
"""What brings a file from version `i` to `i + 1`. Only ever added to."""


@dataclass(frozen=True, slots=True)
class Medium:
    """An image or a clip that a message showed."""

    kind: str
    """"image" or "audio"."""
    path: str | None
    """None if it came as bytes."""
    sha256: str

    @classmethod
    def of(cls, kind: str, source: str | Path | bytes) -> "Medium":
        """The medium in a file or in bytes; OSError if the file cannot be read."""
        if isinstance(source, bytes):
            return cls(kind, None, hashlib.sha256(source).hexdigest())
        path = Path(source).absolute()
        return cls(kind, str(path), hashlib.sha256(path.read_bytes()).hexdigest())


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, and how it came about."""

    message: Message
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How tokens were drawn; of a reply alone."""
    media: tuple[Medium, ...] = ()
    prompt_tokens: int | None = None
    tokens: int | None = None
    """Sampled ones, the stop token included."""
    seconds: float | None = None
    finish_reason: str | None = None
    created: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def to_dict(self) -> dict[str, Any]:
        """All that is known of it, as JSON values; what is empty is left out."""
        values = {**asdict(self.message), **asdict(self)}
        del values["message"]
        kept = {key: x for key, x in values.items() if x not in (None, (), [], {})}
        return {**kept, "content": self.message.content}


class Conversation(NamedTuple):
    """A conversation without its turns."""

    id: str
    created: float
    updated: float
    source: str
    """Who held it: "chat", "generate", "page", "server"."""
    model: str
    """The last that replied."""
    title: str
    """How its first question begins."""
    turns: int


class Found(NamedTuple):
    """A turn in which a text was found."""

    conversation: Conversation
    number: int
    role: str
    excerpt: str


def history_file() -> Path:
    """Where conversations are kept."""
    return data_folder() / "history.sqlite3"


class History:
    """All conversations of a user. Threads may share one object, processes the file.

    Args:
        path: the file, made if need be; None is the user's own.
        max_bytes: the size beyond which the oldest conversations are dropped.
        wait_s: how long a locked file is waited for.

    Raises:
        StorageError: here and in every method: the file cannot be read or written, stays locked,
            is damaged, or was written by a newer version.
    """

    def __init__(
        self, path: Path | None = None, *, max_bytes: int = MAX_BYTES, wait_s: float = WAIT_S
    ) -> None:
        self.path, self._max_bytes = path or history_file(), max_bytes
        self._lock = threading.Lock()
        with storage_errors(self.path):
            # SQLite gives its log the permissions of the file, so this is where they are set.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        with self._explained():
            self._db = sqlite3.connect(
                self.path, timeout=wait_s, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.execute("PRAGMA journal_mode = WAL")
            # A power cut may cost the last turns, never the file; and a turn costs no wait.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._migrate()

    def begin(self, *, model: str, source: str) -> str:
        """The id of a new conversation."""
        now = time.time()
        with self._transaction() as db:
            while True:
                id_ = secrets.token_hex(4)
                row = (id_, now, now, source, model, "")
                done = db.execute("INSERT OR IGNORE INTO conversations VALUES (?,?,?,?,?,?)", row)
                if done.rowcount:
                    return id_

    def add(self, id_: str, turns: Sequence[Turn]) -> None:
        """Append turns to a conversation: all of them, or in case of an error none.

        Raises:
            DataError: there is no such conversation, for example since it was deleted meanwhile.
        """
        with self._transaction() as db:
            last = "SELECT COALESCE(MAX(number), -1) FROM turns WHERE conversation = ?"
            [before] = db.execute(last, (id_,)).fetchone()
            for number, turn in enumerate(turns, before + 1):
                update = "UPDATE conversations SET updated = ?, model = ? WHERE id = ?"
                if not db.execute(update, (turn.created, turn.model, id_)).rowcount:
                    raise _unknown(id_)
                db.execute("INSERT INTO turns VALUES (?,?,?,?,?,?,?,?)", _row(id_, number, turn))
                if turn.message.role == "user":
                    entitle = "UPDATE conversations SET title = ? WHERE id = ? AND title = ''"
                    db.execute(entitle, (_title(turn.message.content), id_))
            self._bound(db, keep=id_)

    def rewind(self, id_: str, turns: int) -> None:
        """Take the last so many turns back."""
        last = "SELECT number FROM turns WHERE conversation = ? ORDER BY number DESC LIMIT ?"
        with self._transaction() as db:
            db.execute(
                f"DELETE FROM turns WHERE conversation = ? AND number IN ({last})",  # noqa: S608
                (id_, id_, turns),
            )
            asked = "SELECT 1 FROM turns WHERE conversation = ?1 AND role = 'user'"
            db.execute(
                f"UPDATE conversations SET title = '' WHERE id = ?1 AND NOT EXISTS ({asked})",  # noqa: S608
                (id_,),
            )

    def conversations(self, *, limit: int = 20, offset: int = 0) -> list[Conversation]:
        """Conversations, the one that was spoken in last first."""
        return self._select("ORDER BY updated DESC, rowid DESC LIMIT ? OFFSET ?", limit, offset)

    def find(self, start: str) -> Conversation:
        """The conversation whose id begins like this; DataError unless it is exactly one."""
        found = self._select("WHERE substr(id, 1, ?) = ?", len(start), start) if start else []
        if not found:
            raise _unknown(start)
        if len(found) > 1:
            ids = ", ".join(conversation.id for conversation in found)
            raise DataError(f"{len(found)} conversations begin with {start!r}: {ids}")
        return found[0]

    def turns(self, id_: str) -> list[Turn]:
        """The turns of a conversation, in order."""
        columns = "role, content, thinking, model, created, about"
        query = f"SELECT {columns} FROM turns WHERE conversation = ? ORDER BY number"  # noqa: S608
        with self._explained():
            return [_turn(row) for row in self._db.execute(query, (id_,)).fetchall()]

    def search(self, text: str, *, limit: int = 20) -> list[Found]:
        """Turns that hold this text in what was said or thought, the newest first.

        Latin letters match in either case.
        """
        literal = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        query = (
            "SELECT conversation, number, role, content, thinking FROM turns "
            "WHERE content LIKE ?1 ESCAPE '\\' OR thinking LIKE ?1 ESCAPE '\\' "
            "ORDER BY created DESC, number DESC LIMIT ?2"
        )
        with self._explained():
            rows = self._db.execute(query, (f"%{literal}%", limit)).fetchall()
        return [
            Found(self.find(id_), number, role, _excerpt(text, said, thought or ""))
            for id_, number, role, said, thought in rows
        ]

    def delete(self, id_: str | None) -> int:
        """Remove a conversation, or with None all of them; returns how many there were.

        What they held is overwritten in the file, and in its log.
        """
        where, values = ("", ()) if id_ is None else (" WHERE id = ?", (id_,))
        with self._transaction() as db:
            count = db.execute(f"DELETE FROM conversations{where}", values).rowcount  # noqa: S608
        with self._explained():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def _select(self, rest: str, *values: object) -> list[Conversation]:
        query = (
            "SELECT id, created, updated, source, model, title, "  # noqa: S608
            "(SELECT COUNT(*) FROM turns WHERE conversation = id) FROM conversations " + rest
        )
        with self._explained():
            return [Conversation(*row) for row in self._db.execute(query, values).fetchall()]

    def _migrate(self) -> None:
        [version] = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise StorageError(
                f"{self.path} was written by a newer phikit (its version is {version}, known is "
                f"{len(_MIGRATIONS)})",
                fix=f"update phikit, or keep no history: {SWITCH}=off",
            )
        if version == len(_MIGRATIONS):
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            [version] = self._db.execute("PRAGMA user_version").fetchone()  # another was faster
            for script in _MIGRATIONS[version:]:
                for statement in filter(str.strip, script.split(";")):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _bound(self, db: sqlite3.Connection, *, keep: str) -> None:
        """Drop the oldest conversations, but one, until the rest fits."""
        while self._used_bytes(db) > self._max_bytes:
            oldest = "SELECT id FROM conversations WHERE id != ? ORDER BY updated LIMIT 1"
            found = db.execute(oldest, (keep,)).fetchone()
            if found is None:
                return
            db.execute("DELETE FROM conversations WHERE id = ?", found)

    @staticmethod
    def _used_bytes(db: sqlite3.Connection) -> int:
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        return (pages - free) * size

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; the writers of other processes wait."""
        with self._lock, self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, full, not ours to write
            raise StorageError(
                f"{self.path} cannot be used: {error}",
                fix=f"look at its disk and its permissions, or keep no history: {SWITCH}=off",
            ) from error
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"{self.path} is damaged: {error}", fix="move it away; a new one is begun"
            ) from error


class Recorder:
    """Writes one conversation down as it goes on, and never fails.

    Args:
        model, source: as in `Conversation`.
        warn: told once why nothing is kept from here on.
        is_on: whether to keep anything; the environment variable `SWITCH` may say no, too.
        history: where to write; None opens the user's own at the first turn.
    """

    def __init__(
        self,
        *,
        model: str,
        source: str,
        warn: Callable[[str], None],
        is_on: bool = True,
        history: History | None = None,
    ) -> None:
        self.model, self._source, self._warn = model, source, warn
        self.is_on = is_on and os.environ.get(SWITCH, "").lower() not in ("off", "0", "no")
        """Whether turns are being kept."""
        self._history, self._is_own = history, history is None
        self.conversation: str | None = None
        """Its id; None before the first turn."""

    def record(self, *turns: Turn) -> None:
        """Append turns."""

        def write(history: History) -> None:
            if self.conversation is None:
                self.conversation = history.begin(model=self.model, source=self._source)
            history.add(self.conversation, turns)

        self._try(write)

    def rewind(self, turns: int) -> None:
        """Take the last so many turns back."""
        id_ = self.conversation
        if id_ is not None:
            self._try(lambda history: history.rewind(id_, turns))

    def restart(self) -> None:
        """What follows is another conversation."""
        self.conversation = None

    def close(self) -> None:
        if self._is_own and self._history is not None:
            self._history.close()
            self._history = None

    def _try(self, write: Callable[[History], None]) -> None:
        if not self.is_on:
            return
        try:
            if self._history is None:
                self._history = History()
            write(self._history)
        except (PhikitError, OSError) as error:
            self.is_on = False
            what = error.what if isinstance(error, PhikitError) else str(error)
            self._warn(f"this conversation is not kept from here on: {what}")


# --- Rows ---------------------------------------------------------------------------------------

_ABOUT = ("settings", "media", "prompt_tokens", "tokens", "seconds", "finish_reason")
_ABOUT_MESSAGE = ("tools", "tool_calls", "note")


def _row(id_: str, number: int, turn: Turn) -> tuple[object, ...]:
    message, values = turn.message, turn.to_dict()
    about = {key: values[key] for key in (*_ABOUT, *_ABOUT_MESSAGE) if key in values}
    texts = (message.role, _storable(message.content))
    thinking = None if message.thinking is None else _storable(message.thinking)
    return id_, number, turn.created, turn.model, *texts, thinking, json.dumps(about)


def _turn(row: tuple[Any, ...]) -> Turn:
    role, content, thinking, model, created, text = row
    about = json.loads(text)
    message = Message(
        role,
        content,
        thinking,
        tools=tuple(ToolDefinition(**tool) for tool in about.get("tools", ())),
        tool_calls=tuple(ToolCall(**call) for call in about.get("tool_calls", ())),
        note=about.get("note"),
    )
    known = {key: about[key] for key in _ABOUT if key in about and key != "media"}
    media = tuple(Medium(**medium) for medium in about.get("media", ()))
    return Turn(message, model, media=media, created=created, **known)


def _storable(text: str) -> str:
    """Text without halves of surrogate pairs, which stand for bytes that were no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _title(text: str) -> str:
    line = _storable(text.strip().partition("\n")[0])
    return line if len(line) <= TITLE_CHARS else f"{line[: TITLE_CHARS - 1]}…"


def _excerpt(wanted: str, *texts: str, around: int = 40) -> str:
    """The line around the first occurrence of a text."""
    for text in texts:
        at = text.lower().find(wanted.lower())
        if at >= 0:
            end = at + len(wanted) + around
            start = max(0, at - around)
            cut = " ".join(text[start:end].split())
            return f"{'…' if start else ''}{cut}{'…' if end < len(text) else ''}"
    return ""


def _unknown(id_: str) -> DataError:
    return DataError(f"no conversation {id_!r}", fix="`phikit history` lists them")
