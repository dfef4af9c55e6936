"""English prose that every machine with Python already has: the standard library's documentation.

The language reference (`pydoc_data.topics`) and the docstrings of some library modules are cut
into short plain paragraphs. The text is under the PSF licence and differs a little between Python
versions, so its provenance names the version.
"""

from __future__ import annotations

import ast
import platform
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

LICENSE = "PSF-2.0"
SOURCE = f"cpython-{platform.python_version()}"
MODULES = (
    *("argparse", "calendar", "collections", "configparser", "contextlib", "csv", "datetime"),
    *("difflib", "fractions", "functools", "heapq", "inspect", "json", "logging", "random"),
    *("shutil", "statistics", "string", "tempfile", "textwrap", "threading", "typing", "zipfile"),
)
MIN_WORDS, MAX_WORDS = 8, 70

_ROLE = re.compile(r":[a-z:]+:`([^`]*)`")
_MARKUP = re.compile(r"[*`_]{1,2}(?=\w)|(?<=\w)[*`]{1,2}")
_PLAIN = re.compile(r"[A-Za-z0-9 ,.;:'\"()\-?!%/=+*]+")


@cache
def paragraphs() -> tuple[str, ...]:
    """All usable paragraphs of 8 to 70 words, ASCII, without repeats, in a fixed order."""
    texts = (*(topics[name] for name in sorted(topics)), *_docstrings())
    cleaned = (_clean(block) for text in texts for block in re.split(r"\n\s*\n", text))
    return tuple(dict.fromkeys(paragraph for paragraph in cleaned if paragraph))


def _docstrings() -> Iterator[str]:
    """Docstrings read from source files, so that no module needs to be imported."""
    for name in MODULES:
        spec = find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _clean(block: str) -> str | None:
    """The block as one line of plain prose; None when it is a table, a heading or code."""
    lines = block.splitlines()
    if any(line.startswith(("   ", ">>>", "* ", "| ", "+-")) for line in lines):
        return None
    text = _MARKUP.sub("", _ROLE.sub(r"\1", " ".join(block.split())))
    words = text.split()
    mostly_words = sum(word.strip(".,;:()'\"").isalpha() for word in words) > 0.85 * len(words)
    fits = MIN_WORDS <= len(words) <= MAX_WORDS and text[0].isupper() and text.endswith(".")
    return text if fits and mostly_words and _PLAIN.fullmatch(text) else None
