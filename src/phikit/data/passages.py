"""Text to calibrate a quantised model on, and other text to compare it on; no download needed.

Both are prose from the documentation of Python and solved word problems, as a conversation where
the model has one. A text is on one side or the other by its content (`data.split`).
"""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from phikit.base.errors import DataError
from phikit.chat.text import TextRenderer
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.turns import Renderer
from phikit.data import prose
from phikit.data.procedural import generate
from phikit.data.split import Split, split_of

ROW_TOKENS = 256
"""Of a row, unless the model's context is shorter."""
CALIBRATION_PROBLEMS, HELD_OUT_PROBLEMS = 64, 20
MAX_PROSE_TOKENS = 8192
FIX = 'write each line as {"text": "..."}'


def calibration_rows(
    tokenizer: Tokenizer, renderer: Renderer, *, row_tokens: int
) -> list[list[int]]:
    """About 16,000 tokens of the training side, in rows of at most `row_tokens`."""
    return [
        *_prose(tokenizer, "train", row_tokens=row_tokens),
        *_solved(tokenizer, renderer, "train", CALIBRATION_PROBLEMS, row_tokens=row_tokens),
    ]


def held_out_rows(tokenizer: Tokenizer, renderer: Renderer, *, row_tokens: int) -> list[list[int]]:
    """Some thousand tokens of the test side, in rows of at most `row_tokens`."""
    return [
        *_prose(tokenizer, "test", row_tokens=row_tokens),
        *_solved(tokenizer, renderer, "test", HELD_OUT_PROBLEMS, row_tokens=row_tokens),
    ]


def file_rows(path: Path, tokenizer: Tokenizer, *, row_tokens: int) -> list[list[int]]:
    """The text of a file, or the "text" of each line of a `.jsonl`, in rows of `row_tokens`.

    Raises:
        DataError: the file cannot be read, a line has no text, or all is shorter than two tokens.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(
            f"{path} cannot be read as text: {error}", fix="give a .txt or .jsonl file in UTF-8"
        ) from error
    texts: Iterable[str] = [content]
    if path.suffix == ".jsonl":
        lines = enumerate(content.splitlines(), start=1)
        texts = [_text(line, f"{path}:{number}") for number, line in lines if line.strip()]
    rows = list(chain.from_iterable(_cut(tokenizer.encode(text), row_tokens) for text in texts))
    if not rows:
        raise DataError(f"{path} holds no text", fix="give a file with some thousand words")
    return rows


def _text(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}", fix=FIX) from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{place} has no "text"', fix=FIX)
    return text


def _prose(tokenizer: Tokenizer, split: Split, *, row_tokens: int) -> list[list[int]]:
    """Paragraphs one after another, cut into full rows."""
    chosen = [paragraph for paragraph in prose.paragraphs() if split_of(paragraph) == split]
    ids = tokenizer.encode("\n\n".join(chosen))
    return _cut(ids[:MAX_PROSE_TOKENS], row_tokens)


def _solved(
    tokenizer: Tokenizer, renderer: Renderer, split: Split, count: int, *, row_tokens: int
) -> list[list[int]]:
    """A row for each problem with its working and answer."""
    rows = []
    for problem in generate(seed=17, count=count, split=split):
        if isinstance(renderer, TextRenderer):
            ids = tokenizer.encode(f"{problem.question}\n{problem.solution}")
        else:
            ids = renderer.example(problem.messages()).tokens.tolist()
        rows.append(ids[:row_tokens])
    return rows


def _cut(ids: list[int], row_tokens: int) -> list[list[int]]:
    rows = [ids[start : start + row_tokens] for start in range(0, len(ids), row_tokens)]
    return [row for row in rows if len(row) > 1]
