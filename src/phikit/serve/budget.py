"""What the cloud may cost: calls and money, of this process and of a day.

A call is paid for before it is made, at the most it can cost, and settled when its price is known.
So calls at once cannot overspend together, and neither can a process that dies, or a reply whose
price never came: what is unknown counts in full. The day's sums lie in an SQLite file, which
several processes may share; a day is one of UTC.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import Field, model_validator

from phikit.base.config import Config
from phikit.base.errors import PhikitError, RemoteError, StorageError
from phikit.chat.message import Message
from phikit.generate.chat import ChatOptions, ChatReply
from phikit.generate.remote import Remote
from phikit.generate.reply import Piece

BUSY_S = 10.0
"""How long to wait for another process that writes to the file."""


class BudgetError(PhikitError):
    """The next call might cost more than is left."""


class BudgetConfig(Config):
    """Bounds on what goes to the cloud, money in the currency of its prices; None is no bound."""

    calls_per_run: int | None = Field(default=None, ge=0)
    calls_per_day: int | None = Field(default=None, ge=0)
    cost_per_run: float | None = Field(default=None, ge=0)
    cost_per_day: float | None = Field(default=None, ge=0)
    file: Path | None = None
    """Where the sums of the days are kept; bounds per day need it."""

    @model_validator(mode="after")
    def _days_need_a_file(self) -> Self:
        per_day = self.calls_per_day is not None or self.cost_per_day is not None
        if per_day and self.file is None:
            raise ValueError("a bound per day needs `file`, where the day's sums are kept")
        return self


class Sums(NamedTuple):
    """What has been spent, or is held for calls under way."""

    calls: int = 0
    cost: float = 0.0


class Budget:
    """Counts what is spent, and refuses what might be too much. For any number of threads.

    Raises:
        StorageError: the file cannot be made or read.
    """

    def __init__(self, config: BudgetConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._run = Sums()
        self._file = None if config.file is None else config.file.expanduser()
        with self._day() as (database, day):
            self._sums_of(database, day)

    @property
    def run(self) -> Sums:
        """Of this process."""
        return self._run

    @property
    def today(self) -> Sums:
        """Of this day, by all processes that share the file; without a file, of this process."""
        with self._day() as (database, day):
            return self._run if database is None else self._sums_of(database, day)

    def spend(self, cost: float) -> str:
        """Spend a call at the most it may cost; returns the day, for `settle`.

        Raises:
            BudgetError: that is more than is left.
        """
        bounds = self.config
        with self._lock, self._day() as (database, day):
            run, today = self._run, self._sums_of(database, day)
            for what, spent, wanted, bound in (
                ("calls_per_run", run.calls, 1, bounds.calls_per_run),
                ("cost_per_run", run.cost, cost, bounds.cost_per_run),
                ("calls_per_day", today.calls, 1, bounds.calls_per_day),
                ("cost_per_day", today.cost, cost, bounds.cost_per_day),
            ):
                if bound is not None and spent + wanted > bound:
                    raise BudgetError(
                        f"{spent:g} of {what}={bound:g} is spent, and a call may take {wanted:g}",
                        fix=f"raise {what}, or wait for the next {what.rpartition('_')[2]}",
                    )
            self._add(database, day, 1, cost)
        return day

    def settle(self, day: str, calls: int, cost: float) -> None:
        """Correct what has been spent on a day by so much."""
        with self._lock, self._day() as (database, _):
            self._add(database, day, calls, cost)

    def _add(self, database: sqlite3.Connection | None, day: str, calls: int, cost: float) -> None:
        self._run = Sums(self._run.calls + calls, max(0.0, self._run.cost + cost))
        if database is not None:
            database.execute(
                "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (day) DO UPDATE"
                " SET calls = calls + excluded.calls, cost = max(0, cost + excluded.cost)",
                (day, calls, cost),
            )

    def _sums_of(self, database: sqlite3.Connection | None, day: str) -> Sums:
        if database is None:
            return Sums()
        row = database.execute("SELECT calls, cost FROM spent WHERE day = ?", (day,)).fetchone()
        return Sums(*row) if row else Sums()

    @contextmanager
    def _day(self) -> Iterator[tuple[sqlite3.Connection | None, str]]:
        """The file, locked for writing until the block ends, and today's name."""
        day = f"{datetime.now(UTC):%Y-%m-%d}"
        if self._file is None:
            yield None, day
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._file, timeout=BUSY_S)) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS spent (day TEXT PRIMARY KEY, calls INT, cost REAL)"
                )
                database.execute("BEGIN IMMEDIATE")
                yield database, day
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"cannot keep the budget in {self._file}: {error}",
                fix="choose another budget.file, or remove a damaged one",
            ) from error


class Metered:
    """A `Remote` that spends from a budget; a `Chat` that may raise BudgetError too."""

    def __init__(self, remote: Remote, budget: Budget) -> None:
        self.remote, self.budget = remote, budget

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> list[ChatReply]:
        """See `Chat.answer`."""
        with self._paid(messages, options) as bill:
            replies = self.remote.answer(messages, options)
            bill += replies
        return replies

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | ChatReply]:
        """See `Chat.stream`."""
        with self._paid(messages, options) as bill:
            for item in self.remote.stream(messages, options):
                if isinstance(item, ChatReply):
                    bill.append(item)
                yield item

    @contextmanager
    def _paid(self, messages: Sequence[Message], options: ChatOptions) -> Iterator[list[ChatReply]]:
        """Spend a call; what it cost is known from the replies that the block puts into a list."""
        prices = self.remote.config
        most = prices.worst_cost(messages, options)
        day = self.budget.spend(most)
        bill: list[ChatReply] = []
        try:
            yield bill
        except RemoteError as error:
            if not error.may_be_billed:
                self.budget.settle(day, -1, -most)
            raise
        finally:
            if bill:
                said = sum(reply.reply_tokens for reply in bill)
                self.budget.settle(day, 0, prices.cost(bill[0].prompt_tokens, said) - most)
