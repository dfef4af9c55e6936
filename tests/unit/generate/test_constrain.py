"""Every reply with a schema parses and is valid, every reply with a regex matches it."""

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from tests.unit.chat.vocabularies import small

from phikit.base.errors import ConfigError
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.generate.constrain import MAX_FORCED, MAX_SCHEMA_BYTES, Grammars, _written_out
from phikit.generate.engine import Engine
from phikit.generate.request import Constraint, Request

pytest.importorskip("llguidance")

PADDING = 23
"""Rows of the embedding beyond the tokenizer."""


class Fruit(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["apple", "pear", "Ümlaut"]
    ripe: bool | None


class Basket(BaseModel):
    model_config = ConfigDict(extra="forbid")
    owner: str = Field(max_length=6)
    count: int = Field(ge=3, le=120)
    fruits: list[Fruit] = Field(max_length=2)


PATTERNS = (
    r"[0-9]{2}-(?:ja|nein)",
    r"(?:a|b){1,5}/\\\"[^a-z]",
    r"[äöü]{2} \d?",
    r"\n?(?:apples|pears)(?:, (?:apples|pears)){0,3}\.",
)


def grammars(tokenizer: Tokenizer) -> Grammars:
    stops = [i for name, i in tokenizer.specials.items() if name in ("<|endoftext|>", "<|end|>")]
    return Grammars(tokenizer, vocab_size=tokenizer.size + PADDING, stop_ids=stops)


@pytest.fixture(scope="module")
def nano(nano_tokenizer: Tokenizer) -> Grammars:
    return grammars(nano_tokenizer)


def ids_of(mask_V: torch.Tensor) -> list[int]:
    return mask_V.nonzero()[:, 0].tolist()


def wander(make: Callable[[], Constraint], rng: random.Random, *, longest: int = 300) -> list[int]:
    """A reply of tokens drawn evenly from those that are allowed."""
    walk, tokens = make(), []
    while not walk.finished and len(tokens) < longest:
        tokens.append(rng.choice(ids_of(walk.allowed())))
        walk.accept(tokens[-1])
    assert walk.finished
    return tokens


@pytest.mark.parametrize("kind", ["nano", "phi3", "phi3-small", "phi4", "phi4-mini"])
def test_whatever_is_drawn_is_valid(kind: str):
    tokenizer = small(kind)
    made = grammars(tokenizer)
    rng = random.Random(0)
    schema = made.json_schema(Basket.model_json_schema())
    for _ in range(15):
        text = tokenizer.decode(wander(schema, rng))
        Basket.model_validate_json(text, strict=True)
        assert text == text.strip()
        assert "\n\n" not in text
    for pattern in PATTERNS:
        regex = made.regex(pattern)
        for _ in range(8):
            text = tokenizer.decode(wander(regex, rng))
            # Llama's decoder takes a space away from the front of every text.
            assert re.fullmatch(pattern, text) or re.fullmatch(pattern, f" {text}")


def test_end_tokens_are_allowed_exactly_where_the_grammar_may_end(nano_tokenizer: Tokenizer):
    stops = {nano_tokenizer.special("<|end|>"), nano_tokenizer.special("<|endoftext|>")}
    walk = grammars(nano_tokenizer).regex("12+")()
    for character, may_end in (("1", False), ("2", True), ("2", True)):
        allowed = walk.allowed()
        assert allowed.dtype == torch.bool
        assert allowed.shape == (nano_tokenizer.size + PADDING,)
        assert not allowed[nano_tokenizer.size :].any()
        [token] = nano_tokenizer.encode(character)
        walk.accept(token)
        assert (stops <= set(ids_of(walk.allowed()))) == may_end
        assert stops.isdisjoint(ids_of(walk.allowed())) != may_end
        assert not walk.finished
    walk.accept(nano_tokenizer.special("<|end|>"))
    assert walk.finished


def test_samples_walk_apart(nano: Grammars, nano_tokenizer: Tokenizer):
    make = nano.regex("ab|cd")
    first, second = make(), make()
    first.accept(nano_tokenizer.encode("a")[0])
    assert ids_of(second.allowed()) != ids_of(first.allowed())
    second.accept(nano_tokenizer.encode("c")[0])
    assert ids_of(first.allowed()) == nano_tokenizer.encode("b")


@pytest.mark.parametrize("kind", ["phi4-reasoning", "phi4-mini"])
def test_a_thought_may_come_first_and_is_free(kind: str):
    """With tags that are special tokens, and with tags that are text."""
    tokenizer = small(kind)
    renderer = renderer_for(
        tokenizer, "phi4" if kind == "phi4-reasoning" else "phi4-mini-reasoning"
    )
    assert renderer.thinks
    made = grammars(tokenizer).regex("(yes|no)", may_think=True)
    thought = "\nis {it} 12 </thin or no\n\nyes\n"
    tags = [part for tag in ("<think>", "</think>") for part in tokenizer.mark(tag)]
    for before in ("", "\n"):
        walk, tokens = made(), tokenizer.encode_parts([tags[0], thought, tags[1], f"{before}no"])
        for token in tokens:
            assert walk.allowed()[token]
            walk.accept(token)
        assert walk.finished
        message = renderer.parse(tokens)
        assert (message.content, message.thinking) == ("no", thought.strip("\n"))
    walk = made()
    for token in tokenizer.encode("yes"):
        assert walk.allowed()[token]
        walk.accept(token)
    assert walk.finished
    assert not grammars(tokenizer).regex("(yes|no)")().allowed()[tokenizer.encode_parts(tags)[0]]


BROKEN_SCHEMAS = [
    ({"type": "strin"}, "strin"),
    ({"not": {"type": "string"}}, "not"),
    ({"type": "string", "format": "colour"}, "colour"),
    ({"type": "string", "pattern": "(a"}, "unclosed group"),
    ({"type": "string", "pattern": "((a{99}){99}){99}"}, "written out"),
    ({"patternProperties": {"(a{999}){999}": {}}}, "written out"),
    ({"$ref": "#/$defs/none"}, "none"),
    ({"$ref": "#"}, "no text at all fits"),
    ({"enum": []}, "Unsatisfiable"),
    ({"minimum": float("nan")}, "no JSON object"),
    ({"enum": [{1, 2}]}, "no JSON object"),
    ([1], "no JSON object"),
    ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "bytes"),
    ({"items": {"minItems": 1000, "items": {"const": 1}}, "minItems": 1000}, "multiply to 1000000"),
    (
        {"allOf": [{"anyOf": [{"minLength": i + j} for i in range(40)]} for j in range(6)]},
        "too large",
    ),
]


@pytest.mark.parametrize(("schema", "words"), BROKEN_SCHEMAS, ids=lambda x: str(x)[:40])
def test_a_schema_that_cannot_be_followed_is_a_typed_error(schema: Any, words: str, nano: Grammars):
    with pytest.raises(ConfigError, match=re.escape(words)):
        nano.json_schema(schema)


def test_schemas_that_are_deep_or_hold_themselves(nano: Grammars):
    deep: dict[str, Any] = {"type": "integer"}
    for depth in range(5000):
        deep = {"type": "array", "items": deep}
        if depth in (200, 4999):
            with pytest.raises(ConfigError):
                nano.json_schema(deep)
    deep["items"] = deep
    with pytest.raises(ConfigError, match="no JSON object"):
        nano.json_schema(deep)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a", "unclosed group"),
        ("a(?=b)", "look-ahead"),
        (r"(a)\1", "backreferences"),
        (r"[^\s\S]", "no text at all fits"),
        ("\ud800", "Unicode"),
        ("(" * 5000 + ")" * 5000, "cannot be followed"),
        ("a" * (MAX_SCHEMA_BYTES + 1), "bytes"),
        ("(?x)(a{500} ) {500}", "flag x"),
        ("(a{1000}){1000}", "1000000 characters"),
        (f"a{{{'0' * 50}99999}}", "99999 characters"),
        (f"a{{{'9' * 5000}}}", "characters"),
    ],
    ids=lambda x: str(x)[:20].encode("ascii", "replace").decode(),
)
def test_a_pattern_that_cannot_be_followed_is_a_typed_error(
    pattern: str, words: str, nano: Grammars
):
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=words):
        nano.regex(pattern)
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        ("abc", 3),
        ("a{3}b", 4),
        ("(ab|c){2,5}", 15),
        (r"\d{4}-\p{L}{2,}", 7),
        ("((ab){3}c){10}", 70),
        ("[]({1000}]{5}", 5),
        ("[[(](a{10}){10}", 100),
        ("((x[[a])]y{100}){100}){100}", 10**6),
        ("a{2}{3}{4}", 24),
    ],
)
def test_counts_are_written_out(pattern: str, least: int):
    assert least <= _written_out(pattern) <= 40 * least


def test_a_walk_through_what_is_just_allowed_takes_no_time(nano: Grammars):
    for make in (
        nano.regex(f"(a{{100}}){{{MAX_FORCED // 100}}}"),
        nano.regex("(a|aa)*b(.*c){50}"),
        nano.json_schema({"type": "array", "items": {"const": "abcd"}, "minItems": 10_000}),
        nano.json_schema(
            {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}
        ),
    ):
        rng, walk = random.Random(1), make()
        started = time.perf_counter()
        for _ in range(10):
            if not walk.finished:
                walk.accept(rng.choice(ids_of(walk.allowed())))
        assert time.perf_counter() - started < 10


def test_one_step_is_the_models_distribution_over_what_is_allowed(
    tiny_model, nano_tokenizer: Tokenizer
):
    model = tiny_model()
    made = Grammars(nano_tokenizer, vocab_size=300, stop_ids=[nano_tokenizer.special("<|end|>")])
    make = made.regex("[0-9]+|apples|pears")
    allowed_V = make().allowed()
    prompt = nano_tokenizer.encode("How many apples?")
    logits_V = model(torch.tensor([prompt]))[0, -1].detach()
    expected_V = logits_V.masked_fill(~allowed_V, float("-inf")).log_softmax(-1)
    request = Request(prompt, max_new_tokens=1, num_samples=400, constraint=make, top_log_probs=20)
    [completions] = Engine(model).generate([request])
    for completion in completions:
        [token], [log_prob] = completion.tokens, completion.log_probs
        assert log_prob == pytest.approx(float(expected_V[token]), abs=1e-5)
    found = dict(completions[0].top_log_probs[0])
    for token in ids_of(allowed_V):
        assert found[token] == pytest.approx(float(expected_V[token]), abs=1e-5)
    assert sum(c.tokens == [int(expected_V.argmax())] for c in completions) == pytest.approx(
        400 * float(expected_V.max().exp()), abs=4 * 10
    )


def test_through_the_engine_every_sample_is_valid(tiny_model, nano_tokenizer: Tokenizer):
    """Samples with and without a constraint in one batch; those without are as if alone."""
    model = tiny_model(max_context=400)
    end = nano_tokenizer.special("<|end|>")
    made = Grammars(nano_tokenizer, vocab_size=300, stop_ids=[end])
    prompt = nano_tokenizer.encode("What is 12 + 7?")
    schema = {"type": "array", "items": {"enum": [1, "x", None]}, "maxItems": 3}
    held = Request(
        prompt,
        max_new_tokens=200,
        num_samples=12,
        stop_ids=(end,),
        constraint=made.json_schema(schema),
    )
    free = Request(prompt, max_new_tokens=12, num_samples=3, seed=7)
    engine = Engine(model)
    with_schema, without = engine.generate([held, free])
    for completion in with_schema:
        assert completion.finish_reason == "stop"
        value = json.loads(nano_tokenizer.decode(completion.tokens))
        assert len(value) <= 3
        assert all(item in (1, "x", None) for item in value)
    [alone] = Engine(model).generate([free])
    assert [c.tokens for c in without] == [c.tokens for c in alone]
