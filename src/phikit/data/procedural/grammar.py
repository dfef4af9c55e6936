"""A paraphrase grammar: templates with nested alternatives, expanded by a seeded generator.

A template is text with `{this|that|}` for alternatives (which nest, and may be empty) and
`<name>` for a slot: `"<who> {buys|gets {3|4}} more <items>."`; a `|` outside braces separates
whole templates. Three choices of three stand for 27 phrasings, so questions vary in wording far
more than in vocabulary, which is what a model with a thousand tokens needs. Templates are parsed
once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from random import Random
from typing import NamedTuple

_TOKEN = re.compile(r"[{|}]|<\w+>|[^{|}<]+")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")


class Slot(NamedTuple):
    """A place filled by name."""

    name: str


class Choice(NamedTuple):
    """A place filled by one of several pieces, all equally likely."""

    options: tuple[Node, ...]


class Chain(NamedTuple):
    """Pieces one after another."""

    nodes: tuple[Node, ...]


Node = str | Slot | Choice | Chain


@lru_cache(maxsize=4096)
def parse(template: str) -> Node:
    """The template as a tree; ValueError when its braces do not match."""
    tokens = [*_TOKEN.findall(template), ""]
    node, position = _parse_choice(tokens, 0)
    if position != len(tokens) - 1:
        raise ValueError(f"unopened brace in the template {template!r}")
    return node


def expand(template: str, rng: Random, slots: Mapping[str, object]) -> str:
    """One phrasing of the template; KeyError when a slot has no value."""
    pieces: list[str] = []
    _expand((parse(template),), rng.random, slots, pieces)
    return "".join(pieces)


def capitalise_sentences(text: str) -> str:
    """The text with every sentence starting in upper case."""
    return _SENTENCE_START.sub(lambda match: match.group().upper(), text)


def _parse_choice(tokens: list[str], position: int) -> tuple[Node, int]:
    """Reads alternatives up to a closing brace, or the end marked "", and says where that is."""
    options: list[Node] = []
    chain: list[Node] = []
    while tokens[position] not in ("}", ""):
        token = tokens[position]
        if token == "|":
            options.append(_chained(chain))
            chain = []
        elif token == "{":
            node, position = _parse_choice(tokens, position + 1)
            if tokens[position] != "}":
                raise ValueError(f"unclosed brace in the template {''.join(tokens)!r}")
            chain.append(node)
        else:
            chain.append(Slot(token[1:-1]) if token[0] == "<" else token)
        position += 1
    options.append(_chained(chain))
    return (options[0] if len(options) == 1 else Choice(tuple(options))), position


def _chained(nodes: list[Node]) -> Node:
    """The nodes as one; a single node stays itself, which saves calls when expanding."""
    if not nodes:
        return ""
    return nodes[0] if len(nodes) == 1 else Chain(tuple(nodes))


def _expand(
    nodes: tuple[Node, ...],
    draw: Callable[[], float],
    slots: Mapping[str, object],
    pieces: list[str],
) -> None:
    for node in nodes:
        while isinstance(node, Choice):
            node = node.options[int(draw() * len(node.options))]
        if isinstance(node, str):
            pieces.append(node)
        elif isinstance(node, Slot):
            pieces.append(str(slots[node.name]))
        else:
            _expand(node.nodes, draw, slots, pieces)
