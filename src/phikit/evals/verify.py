r"""Is this the right answer? Extraction and comparison of mathematical answers.

Two paths. Numbers (integers, decimals, fractions, percentages, thousands separators) are compared
exactly with `fractions.Fraction` in this process, with bounded work: no input makes it hang. All
other pairs are undecided here; a `Verifier` settles them symbolically with math-verify, in worker
processes that are killed at a wall-clock limit, because no limit inside the process can stop a big
integer power or a `simplify` that has lost its way.

Exact means exact: 0.333 is not 1/3. A percentage equals its hundredth and also its bare number
(50 % = 0.5, 50 % = 50), as in math-verify, since questions ask for either.

Sources: math-verify 0.9 (github.com/huggingface/Math-Verify); the `\boxed` convention of MATH
(Hendrycks et al., arXiv 2103.03874).
"""

import json
import queue
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from phikit.base.errors import ConfigError, MissingExtraError, RunError
from phikit.base.worker import exchange

MAX_CHARS = 1000
"""Answers longer than this are compared as strings only."""
MAX_EXPONENT = 1000
"""Largest power of ten that is read as a number; 1e999999999 would fill the memory."""

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:"
    rf"(?P<num>{_DECIMAL})/(?P<den>{_DECIMAL})"
    rf"|(?:(?P<whole>\d+) (?P<mnum>\d+)/(?P<mden>\d+))"
    rf"|(?P<dec>{_DECIMAL})(?:(?:[eE]| ?(?:\\times|\\cdot|×|\*) ?10\^)(?P<exp>[+-]?\d{{1,4}}))?"
    rf")(?P<percent>%?)"
)
_FRAC = re.compile(
    r"(?P<whole>\d*) ?\\frac"
    r"(?:\{(?P<top>[^{}]*)\}|(?P<top_digit>\d))(?:\{(?P<bottom>[^{}]*)\}|(?P<bottom_digit>\d))"
)
_NUMBER_IN_TEXT = re.compile(r"(?<![\w.])[+-]?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:/\d+)?%?")
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right)(?![A-Za-z])|\\[,;:!()\[\]]|\\?\$", ""),
        (r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}", r"\1"),
        (r"\\%|\bpercent\b", "%"),
        (r"\{,\}", ","),
        (r"\^\{([+-]?\d+)\}", r"^\1"),
        ("[−–]", "-"),
        (r"\\ |~|\s", " "),
        (r" *([^\w\s\\,]) *", r"\1"),
        (r" {2,}", " "),
    )
)


_WORKER = Path(__file__).with_name("verify_worker.py")
_START_S = 120.0
"""Importing sympy takes seconds on a busy machine; the limit on a check starts after it."""
_RECYCLE = 500
"""Checks per worker before it is replaced: sympy caches every expression it has seen."""


class Verdict(NamedTuple):
    """`error` says why the pair could not be settled; `equal` is then False."""

    equal: bool
    error: str | None = None


class Number(NamedTuple):
    """An exact rational; with `percent` it was written with a percent sign, 50 for 50 %."""

    value: Fraction
    percent: bool


def extract_answer(text: str, *, lenient: bool = False) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance; None when there is none.

    Only what follows `</think>` counts: a box inside the thinking is a thought, and thinking that
    never ends holds no answer. With `lenient`, the last number is taken where there is no box.
    One pass over the text, whatever it holds.
    """
    if "<think>" in text and "</think>" not in text:
        return None
    text = text.rpartition("</think>")[2]
    boxed = _last_boxed(text)
    if boxed is None and lenient:
        numbers = _NUMBER_IN_TEXT.findall(text)
        boxed = numbers[-1] if numbers else None
    return boxed


def equal(gold: str, answer: str) -> bool | None:
    """Compare by string and exact arithmetic; None when that cannot decide (`Verifier` can)."""
    if gold == answer:
        return True
    if max(len(gold), len(answer)) > MAX_CHARS:
        return None
    gold, answer = normalise(gold), normalise(answer)
    if gold == answer:
        return True
    left, right = parse_number(gold), parse_number(answer)
    if left is None or right is None:
        return None
    if left.percent != right.percent and left.value == right.value:
        return True
    return _plain(left) == _plain(right)


def normalise(text: str) -> str:
    r"""Drop typography without value: `$`, `\left`, `\text`, thin spaces, a final full stop.

    Words lose their case; a text of more than `MAX_CHARS` characters is returned as it is.
    """
    if len(text) > MAX_CHARS:
        return text
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".").rstrip()
    return text.casefold() if _WORDS.fullmatch(text) else text


def parse_number(text: str) -> Number | None:
    r"""Read a normalised text as one exact number.

    Integers, decimals, scientific notation, thousands separators, `a/b`, `\frac{a}{b}`, mixed
    numbers, a percent sign. None for anything else, for a zero denominator, and for numbers of more
    than `MAX_CHARS` digits or beyond 10^±`MAX_EXPONENT`.
    """
    if len(text) > MAX_CHARS:
        return None
    text = _FRAC.sub(_frac_to_slash, text)
    match = _NUMBER.fullmatch(text)
    if match is None or abs(int(match["exp"] or 0)) > MAX_EXPONENT:
        return None
    if match["dec"] is not None:
        value = _decimal(match["dec"]) * Fraction(10) ** int(match["exp"] or 0)
    else:
        top = _decimal(match["num"] or match["mnum"])
        bottom = _decimal(match["den"] or match["mden"])
        if bottom == 0:
            return None
        value = top / bottom + int(match["whole"] or 0)
    return Number(-value if match["sign"] == "-" else value, match["percent"] == "%")


class Verifier:
    """Compares answers, symbolically where arithmetic is not enough; a context manager.

    A check still running after `timeout_s` seconds ends as `Verdict(False, "timed out ...")`: its
    worker is killed and replaced, and the next check is not affected. Workers start when the first
    symbolic pair arrives. They are plain `python` processes that import math-verify alone, so
    the caller's `__main__` is not run again and torch is not loaded; math-verify's own limits
    (SIGALRM, main thread only) are off.

    Raises:
        MissingExtraError: math-verify is not installed (extra `eval`).
    """

    def __init__(
        self, *, timeout_s: float = 2.0, workers: int = 1, memory_bytes: int = 2 * 1024**3
    ) -> None:
        if timeout_s <= 0 or workers < 1:
            raise ConfigError(f"timeout_s={timeout_s} and workers={workers} must be positive")
        if find_spec("math_verify") is None:
            raise MissingExtraError("math-verify", "eval")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(timeout_s, memory_bytes) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts for (gold, answer) pairs, in order; each distinct pair is settled once."""
        verdicts: dict[tuple[str, str], Verdict] = {}
        undecided: list[tuple[str, str]] = []
        for pair in dict.fromkeys(pairs):
            decided = equal(*pair)
            if decided is not None:
                verdicts[pair] = Verdict(decided)
            elif max(map(len, pair)) > MAX_CHARS:
                longest = max(map(len, pair))
                verdicts[pair] = Verdict(False, f"{longest} characters, more than {MAX_CHARS}")
            else:
                undecided.append(pair)
        if undecided:
            with ThreadPoolExecutor(len(self._workers)) as threads:
                verdicts.update(zip(undecided, threads.map(self._settle, undecided), strict=True))
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _settle(self, pair: tuple[str, str]) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.check(*pair)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, one check at a time; a timer kills it when a check takes too long."""

    def __init__(self, timeout_s: float, memory_bytes: int) -> None:
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self.process: subprocess.Popen[str] | None = None
        self.checks = 0

    def check(self, gold: str, answer: str) -> Verdict:
        if self.process is None or self.process.poll() is not None or self.checks >= _RECYCLE:
            self.stop()
            self.process = self._start()
        self.checks += 1
        request = json.dumps([gold, answer]) + "\n"
        line, was_killed = exchange(self.process, request, timeout_s=self.timeout_s)
        if line:
            reply = json.loads(line)
            return Verdict(reply["equal"], reply["error"])
        code = self.stop()
        if was_killed:
            return Verdict(False, f"timed out after {self.timeout_s:g} s")
        return Verdict(False, f"the verifier process died (exit code {code}), likely out of memory")

    def stop(self) -> int | None:
        """Kill the process, if there is one; its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        with process:
            return process.wait()

    def _start(self) -> subprocess.Popen[str]:
        limits = [str(self.memory_bytes), str(self.timeout_s)]
        process = subprocess.Popen(  # noqa: S603 - our own script, no shell
            [sys.executable, "-P", str(_WORKER), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self.process, self.checks = process, 0
        line, _ = exchange(process, "", timeout_s=_START_S)
        failure = json.loads(line)["error"] if line else "it ended before it was ready"
        if failure is not None:
            self.stop()
            raise RunError(
                f"the answer verifier does not start: {failure}",
                fix='reinstall it with: pip install "phikit[eval]"',
            )
        return process


def _last_boxed(text: str) -> str | None:
    """Match braces with a stack, so that a million unclosed boxes still cost one pass."""
    open_braces: list[int | None] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        brace = match.group()
        if match["box"] is not None:
            open_braces.append(match.end())
        elif brace == "{":
            open_braces.append(None)
        elif brace == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (best is None or start > best[0]):
                best = (start, match.start())
    return None if best is None else text[slice(*best)].strip() or None


def _frac_to_slash(match: re.Match[str]) -> str:
    fraction = f"{match['top'] or match['top_digit']}/{match['bottom'] or match['bottom_digit']}"
    return f"{match['whole']} {fraction}" if match["whole"] else fraction


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")


def _plain(number: Number) -> Fraction:
    return number.value / 100 if number.percent else number.value
