"""Sides that take turns: each in a process of its own, one at work at a time.

The speed of a shared machine drifts by a factor of two within minutes, so only rounds that
alternate may be compared. A process to itself also gives each side a peak memory of its own.
"""

import multiprocessing
import os
import platform
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.table import Table

MIB = 1 << 20
GRACE_S = 20
"""Seconds that a side has for ending."""


class Outcome(NamedTuple):
    """What one round gave."""

    rate: float
    """Work per unit of time; more is better."""
    facts: dict[str, float]
    """What else is worth telling, such as the tokens that were sampled."""


Play = Callable[[], Outcome]
"""Does one round of work."""


class Side(NamedTuple):
    """One of those compared: `make(job)` is called in its own process and returns a `Play`."""

    name: str
    make: Callable[[Any], Play]
    job: Any
    environment: tuple[tuple[str, str], ...] = ()
    """What its process finds in its environment beside what is in ours."""


class Result(NamedTuple):
    """All rounds of one side."""

    name: str
    rates: list[float]
    facts: dict[str, float]
    """Medians over the rounds."""
    peak_bytes: int
    idle_bytes: int
    """What the process held before its first round: libraries and interpreter."""


class Seat:
    """A running side. Close it to end its process."""

    def __init__(self, side: Side) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(side.make, side.job, theirs), daemon=True
        )
        with _environment(side.environment):
            self._process.start()
        theirs.close()
        self.name = side.name
        self.outcomes: list[Outcome] = []
        self.idle_bytes = self.peak_bytes = self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the process end by itself; end it if it does not."""
        self._pipe.close()
        self._process.join(timeout=GRACE_S)
        self._process.kill()
        self._process.join()

    def play(self) -> Outcome:
        """One round; raises RuntimeError with the other process's traceback if it fails."""
        self._pipe.send(True)
        outcome, self.peak_bytes = self._receive()
        self.outcomes.append(outcome)
        return outcome

    def result(self) -> Result:
        """The rounds so far, the first left out: it warms caches and lazy imports up."""
        rounds = self.outcomes[1:]
        facts = {key: median(r.facts[key] for r in rounds) for key in rounds[0].facts}
        rates = [r.rate for r in rounds]
        return Result(self.name, rates, facts, self.peak_bytes, self.idle_bytes)

    def _receive(self) -> Any:
        try:
            kind, content = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name} ended by itself: {self._ending()}") from None
        if kind == "error":
            raise RuntimeError(f"{self.name} failed:\n{content}")
        return content

    def _ending(self) -> str:
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@contextmanager
def _environment(added: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Environment variables that a process started in here inherits."""
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(make: Callable[[Any], Play], job: Any, pipe: Connection) -> None:
    from phikit.base.device import peak_memory_bytes

    try:
        play = make(job)
        pipe.send(("ready", peak_memory_bytes()))
        while pipe.recv():
            pipe.send(("done", (play(), peak_memory_bytes())))
    except EOFError:
        pass
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def take_turns(sides: Sequence[Side], *, rounds: int, console: Console) -> list[Result]:
    """`rounds` rounds of every side in alternation, after one to warm up that does not count."""
    seats: list[Seat] = []
    try:
        for side in sides:
            seats.append(Seat(side))
        for number in range(rounds + 1):
            rates = "  ".join(f"{seat.name} {seat.play().rate:,.1f}" for seat in seats)
            console.print(f"  {f'round {number}' if number else 'warm-up'}: {rates}")
        return [seat.result() for seat in seats]
    finally:
        for seat in seats:
            seat.close()


def fastest(sides: Sequence[Side], *, console: Console, rounds: int = 1) -> Side:
    """The side with the fastest of some rounds after a warm-up; those that fail drop out.

    Raises RuntimeError if all do.
    """
    rates: dict[Side, float] = {}
    for side in sides:
        try:
            with Seat(side) as seat:
                seat.play()
                rates[side] = max(seat.play().rate for _ in range(rounds))
            console.print(f"  trial: {side.name} {rates[side]:,.1f}")
        except RuntimeError as error:
            console.print(f"  trial: {side.name} does not run: {str(error).splitlines()[-1]}")
    if not rates:
        raise RuntimeError(f"none of these runs: {', '.join(side.name for side in sides)}")
    return max(rates, key=lambda side: rates[side])


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """Keep torch out of this process: a child's peak memory starts from its parent's."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def comparison(ours: Result, theirs: Result) -> dict[str, Any]:
    """The ratio of medians, the ratios of the single rounds, and both sides in full."""
    ratios = [a / b for a, b in zip(ours.rates, theirs.rates, strict=True)]
    return {
        "ratio_of_medians": median(ours.rates) / median(theirs.rates),
        "ratios_of_rounds": [min(ratios), max(ratios)],
        "memory_ratio": ours.peak_bytes / theirs.peak_bytes,
        "sides": [ours._asdict(), theirs._asdict()],
    }


def table(title: str, rows: Mapping[str, dict[str, Any]]) -> Table:
    """One line per side of every comparison."""
    made = Table(title=title, title_justify="left")
    for heading in ("", "side"):
        made.add_column(heading, no_wrap=True)
    for heading in ("median", "min", "max", "ratio", "in rounds", "peak MiB", "idle"):
        made.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        low, high = row["ratios_of_rounds"]
        ratios = [f"{row['ratio_of_medians']:.2f}x", f"{low:.2f}–{high:.2f}"]
        for number, side in enumerate(row["sides"]):
            rates = side["rates"]
            made.add_row(
                *("" if number else name, side["name"], f"{median(rates):,.1f}"),
                *(f"{min(rates):,.1f}", f"{max(rates):,.1f}"),
                *(["", ""] if number else ratios),
                *(f"{side[key] / MIB:,.0f}" for key in ("peak_bytes", "idle_bytes")),
            )
    return made


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on, and how busy it was with other things."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
