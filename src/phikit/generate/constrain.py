r"""Structured output: replies held to a JSON schema or a regular expression, through llguidance.

A grammar is walked along with the tokens and says which may come next; the sampler gives all others
no chance, so what is drawn is the model's own distribution over what the grammar allows. Tokens
that end a reply are allowed exactly where the grammar may end.

What is unusual: a model that thinks may do so first. The grammar then begins with an optional
thought of any text, `<think>` to `</think>`, and only the answer behind it is held to the schema.

Schemas and patterns may come from strangers. llguidance bounds the work of every step except for
text that is forced, which it writes out; so counts that multiply are refused here.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from phikit.base.errors import ConfigError, MissingExtraError
from phikit.chat.tokenizer import Tokenizer
from phikit.generate.request import Constraint

if TYPE_CHECKING:
    import llguidance

MAX_SCHEMA_BYTES = 1 << 16
"""Longest schema or pattern."""
MAX_FORCED = 10_000
"""Most characters that counts in patterns, and most elements that counts of elements, make."""
ROW_ITEMS = 20_000
"""What llguidance calls items in a row: 2,000, its default, are too few for 500 properties."""

JSON_SPACE = r"( |\n[ \t]{0,40})?"
"""White space between two marks of JSON: as Python writes it, with indents or without. More would
let a model that has lost its way write blanks to the end."""

TOKEN_THOUGHT = """
start: thought? answer
thought: <think> FREE </think> "\\n"?
FREE: /(?s:.*)/
"""
TEXT_THOUGHT = """
start: thought? answer
thought: "<think>" body "\\n"?
body[suffix="</think>"]: /(?s:.*)/
"""

# The parts of a pattern: an escape, a class, a count, or one character. A class that holds another
# is taken to end too early, which only makes the estimate greater.
_PARTS = re.compile(
    r"\\[pPxuU]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\s*(\d*)\s*,?\s*(\d*)\s*\}|.", re.DOTALL
)


class Grammars:
    """Makes constraints for one model's vocabulary.

    Args:
        vocab_size: rows of the model's embedding; ids beyond the tokenizer's are never allowed.
        stop_ids: tokens that end a reply.

    Raises:
        MissingExtraError: llguidance is not installed.
        ConfigError: it cannot work with this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, stop_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtraError("llguidance", "structured") from error
        self._library = llguidance
        self._vocab_size = vocab_size
        names = tokenizer.specials
        self._thought = TOKEN_THOUGHT if {"<think>", "</think>"} <= set(names) else TEXT_THOUGHT
        try:
            self._vocabulary = llguidance.LLTokenizer(
                tokenizer.to_json(), n_vocab=vocab_size, eos_token=list(stop_ids)
            )
        except Exception as error:  # it raises a bare one, or ValueError, for every fault
            raise ConfigError(f"structured output does not know this tokenizer: {error}") from error

    def json_schema(
        self, schema: Mapping[str, Any], *, may_think: bool = False
    ) -> Callable[[], Constraint]:
        """Replies that are JSON and valid under the schema, with properties in its order.

        Args:
            may_think: a thought may stand before the JSON.

        Raises:
            ConfigError: the schema is broken or too large, or has a keyword that is not supported.
        """
        fix = "simplify the schema; github.com/guidance-ai/llguidance lists what it may hold"
        ours = {"x-guidance": {"whitespace_pattern": JSON_SPACE}}
        try:
            text = json.dumps({**schema, **ours}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"the schema is no JSON object: {error}", fix=fix) from error
        _check_size(text, "schema")
        forced = 1
        for key, value in _members(schema):
            if key == "minItems" and isinstance(value, int | float):
                forced *= max(1, int(value))
            elif key == "pattern" and isinstance(value, str):
                _check_pattern(value)
            elif key == "patternProperties" and isinstance(value, Mapping):
                for pattern in value:
                    _check_pattern(str(pattern))
        if forced > MAX_FORCED:
            raise ConfigError(
                f"the schema's minItems multiply to {forced}",
                fix=f"stay within {MAX_FORCED}",
            )
        return self._made("the schema", f"answer: %json {text}", may_think, fix)

    def regex(self, pattern: str, *, may_think: bool = False) -> Callable[[], Constraint]:
        r"""Replies that the pattern matches from end to end.

        Args:
            pattern: in the syntax of Rust's `regex` crate, which is nearly Python's without
                look-around and back references.
            may_think: a thought may stand before the answer.

        Raises:
            ConfigError: the pattern is broken or too large, or needs what is not supported.
        """
        _check_size(pattern, "regex")
        _check_pattern(pattern)
        fix = "look-around and back references are not supported; the whole reply has to match"
        body = self._library.regex_to_lark(pattern, use_ascii="")
        shown = pattern if len(pattern) <= 60 else f"{pattern[:60]}..."
        return self._made(f"the regex {shown!r}", f"answer: /{body}/", may_think, fix)

    def _made(self, what: str, answer: str, may_think: bool, fix: str) -> Callable[[], Constraint]:
        """The grammar with its answer, compiled and tried at its beginning."""
        grammar = (self._thought if may_think else "start: answer\n") + answer
        matcher = self._library.LLMatcher(
            self._vocabulary,
            self._library.LLMatcher.grammar_from_lark(grammar),
            log_level=0,
            limits=self._library.LLParserLimits(max_items_in_row=ROW_ITEMS, verbose_errors=False),
        )
        trial = matcher.deep_copy()
        trial.compute_bitmask()
        if trial.is_error():
            raise ConfigError(f"{what} cannot be followed: {_fault(trial)}", fix=fix)
        return lambda: _Walk(matcher.deep_copy(), self._vocab_size)


class _Walk:
    """One reply's way through a grammar."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def allowed(self) -> Tensor:
        """Raises ConfigError if llguidance gives up, because a step is too much work for it."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask_V = np.unpackbits(bits, bitorder="little", count=self._vocab_size)
        return torch.from_numpy(mask_V.view(np.bool_))

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(
                f"the grammar cannot be followed any further: {_fault(self._matcher)}",
                fix="simplify the schema or the pattern",
            )


def _fault(matcher: "llguidance.LLMatcher") -> str:
    """What llguidance says, without the place in a grammar that the user has not written."""
    text = matcher.get_error()
    if text.startswith("NoExtension"):
        return "no text at all fits it"
    found = re.search(r"^error: (.*)$", text, re.MULTILINE)
    first = text.partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
    return found[1] if found else first


def _members(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at every depth."""
    pending: list[Any] = [schema]
    while pending:
        inside = pending.pop()
        if isinstance(inside, Mapping):
            yield from inside.items()
            pending += inside.values()
        elif isinstance(inside, list | tuple):
            pending += inside


def _check_size(text: str, what: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"the {what} is not valid Unicode text: {error}") from error
    if size > MAX_SCHEMA_BYTES:
        raise ConfigError(f"the {what} has {size} bytes", fix=f"at most {MAX_SCHEMA_BYTES} may be")


def _check_pattern(pattern: str) -> None:
    """Refuse a pattern whose counts come to too many characters when written out."""
    if re.search(r"\(\?[a-zA-Z-]*x", pattern):
        raise ConfigError("the pattern has the flag x", fix="leave it out, and its blanks")
    size = _written_out(pattern)
    if size > MAX_FORCED:
        raise ConfigError(
            f"the pattern comes to {size} characters when its counts are written out",
            fix=f"stay within {MAX_FORCED}; * and + have no such limit",
        )


def _written_out(pattern: str) -> int:
    """At least as many characters as the pattern has with `x{3}` as `xxx`."""
    groups, last = [0], 0
    for part in _PARTS.finditer(pattern):
        if part[0] == "(":
            groups.append(0)
        elif part[0] == ")":
            last = groups.pop()
            groups = groups or [0]
            groups[-1] += last
        elif part[1] is not None:
            times = max([1, *(int(n.lstrip("0")[:20] or 0) for n in part.groups() if n)])
            groups[-1] += last * (times - 1)
            last *= times
        elif part[0] not in "*+?|":
            last = 1
            groups[-1] += 1
    return sum(groups)
