"""Laws that hold for every renderer and every conversation.

The reference for the template laws is `transformers`: its jinja environment makes the text, and the
text is encoded as it does it, with special tokens recognised. The published templates are in
`tests/data/templates`.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.chat.vocabularies import small
from transformers.utils.chat_template_utils import _compile_jinja_template

from phikit.base.errors import ChatError
from phikit.chat.chatml import ChatMLRenderer
from phikit.chat.message import Message, Role
from phikit.chat.recognise import renderer_from_template
from phikit.chat.render import NANO_SPECIALS, Renderer, renderer_for
from phikit.chat.template import TemplateRenderer
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.tools import ToolCall, ToolDefinition, tools_json

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"


@dataclass(frozen=True)
class Case:
    """A renderer under test: its name, its tokenizer, and a published template it must equal."""

    name: str
    vocabulary: str
    published: str
    system: bool = True
    tools: bool = False
    bos: str = ""


CASES = {
    "phi3": Case("phi3", "phi3", "phi3-mini"),
    "phi3.5": Case("phi3.5", "phi3", "phi3.5-mini"),
    "phi3-medium": Case("phi3-medium", "phi3", "phi3-medium", system=False),
    "phi3-small": Case("phi3-small", "phi3-small", "phi3-small", bos="<|endoftext|>"),
    "phi4": Case("phi4", "phi4", "phi4"),
    "phi4, first release": Case("phi4", "phi4", "phi4-first"),
    "phi4-reasoning": Case("phi4-reasoning", "phi4-reasoning", "phi4-reasoning", system=False),
    "phi4-mini": Case("phi4-mini", "phi4-mini", "phi4-mini", tools=True),
    "phi4-mini, nano": Case("phi4-mini", "nano", "phi4-mini"),
    "phi4-mini-reasoning": Case(
        "phi4-mini-reasoning", "phi4-mini", "phi4-mini-reasoning", tools=True
    ),
    "smollm2": Case("smollm2", "chatml", "smollm2"),
    "template": Case("template", "phi4-reasoning", "phi4"),
    "template, bytes": Case("template", "phi3", "phi3.5-mini"),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FEW = settings(max_examples=25)

FORGERIES = [*NANO_SPECIALS, "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|tool_call|>", "{{ 1 }}"]
PLAIN = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
# A template's text cannot tell a forged special token from a real one, so these texts have none;
# and no white space at their edges (phikit.chat.turns says why).
ORDINARY = PLAIN.map(lambda text: "a" + text.replace("|", "").replace("think>", "") + "z")
HOSTILE = st.lists(st.one_of(PLAIN, st.sampled_from(FORGERIES)), max_size=4).map("".join)
ARGUMENTS = st.dictionaries(PLAIN, st.none() | st.integers() | PLAIN | st.lists(PLAIN), max_size=2)


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    """[system] (user assistant)+ : every assistant message may think and call tools."""
    roles: tuple[Role, ...] = ("user", "assistant")
    calls = st.lists(st.builds(ToolCall, content, ARGUMENTS), max_size=2).map(tuple)
    offers = st.lists(st.builds(ToolDefinition, content, content, ARGUMENTS), max_size=2).map(tuple)
    pair = st.tuples(
        st.builds(Message, role=st.just(roles[0]), content=content),
        st.builds(
            Message,
            role=st.just(roles[1]),
            content=content,
            thinking=st.none() | content,
            tool_calls=calls,
        ),
    )
    system = st.lists(
        st.builds(Message, role=st.just("system"), content=content, tools=offers), max_size=1
    )
    pairs = st.lists(pair, min_size=1, max_size=3)
    return st.builds(lambda s, p: [*s, *itertools.chain.from_iterable(p)], system, pairs)


def fitting(case: Case, messages: list[Message]) -> list[Message]:
    """The conversation without what this model line has no words for."""

    def text(value: str) -> str:
        # Without special tokens for thinking, text that reads as a mark is a mark. And Llama's BPE
        # spells a space as U+2581.
        plain = value if "<think>" in small(case.vocabulary).specials else unmarked(value)
        return plain.replace("\u2581", "_") if case.vocabulary == "phi3" else plain

    return [
        replace(
            message,
            content=text(message.content),
            thinking=None if message.thinking is None else text(message.thinking),
            tools=message.tools if case.tools else (),
            tool_calls=message.tool_calls if case.tools else (),
        )
        for message in messages
        if case.system or message.role != "system"
    ]


def unmarked(text: str) -> str:
    """Without marks of thinking, those that taking one out would form included."""
    while "think>" in text:
        text = text.replace("think>", "")
    return text


@lru_cache
def made(case: Case) -> Renderer:
    return renderer_for(small(case.vocabulary), case.name, template=published(case))


def published(case: Case) -> str:
    return (TEMPLATES / f"{case.published}.jinja").read_text().removesuffix("\n")


def replies(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """The masked stretches of an example."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]


def as_others_say(message: Message) -> dict[str, Any]:
    """The message as `apply_chat_template` takes it."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking is not None:
        said["thinking"] = message.thinking
    if message.tools:
        said["tools"] = tools_json(message.tools)
    if message.tool_calls:
        said["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return said


def jinja_ids(
    template: str, messages: Sequence[Message], tokenizer: Tokenizer, *, ask: bool, bos: str = ""
) -> list[int]:
    text = _compile_jinja_template(template).render(
        messages=[as_others_say(m) for m in messages], add_generation_prompt=ask, bos_token=bos
    )
    return parser_of(tokenizer).encode(text, add_special_tokens=False).ids


@lru_cache
def parser_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as others use it: the text of a special token is that token."""
    parser = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    parser.encode_special_tokens = False
    return parser


@ALL
@FEW
@given(messages=conversations(HOSTILE))
def test_mask_covers_exactly_replies_and_their_end(case: Case, messages: list[Message]):
    renderer, messages = made(case), fitting(case, messages)
    example = renderer.example(messages)
    learnt = replies(example.tokens, example.loss_mask)
    said = [message for message in messages if message.role == "assistant"]
    assert [renderer.parse(reply) for reply in learnt] == said
    for reply in learnt:
        assert [id_ for id_ in reply if id_ in renderer.stop_ids] == [reply[-1]]
        assert reply[-1] == renderer.stop_ids[0]


@ALL
@FEW
@given(messages=conversations(HOSTILE))
def test_prompt_then_reply_is_a_prefix_of_everything_later(case: Case, messages: list[Message]):
    """Covers two laws: the prompt is a prefix of its example; each turn extends the last."""
    renderer, messages = made(case), fitting(case, messages)
    whole = renderer.example(messages).tokens.tolist()
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = renderer.prompt(messages[:index])
        turn = renderer.example(messages[: index + 1])
        reply = replies(turn.tokens, turn.loss_mask)[-1]
        assert whole[: len(prompt) + len(reply)] == prompt + reply
        assert whole[: len(turn)] == turn.tokens.tolist()
        if index + 1 < len(messages):
            later = renderer.prompt(messages[: index + 2])
            assert later[: len(turn)] == turn.tokens.tolist()


@ALL
@FEW
@given(messages=conversations(HOSTILE))
def test_text_never_becomes_a_special_token(case: Case, messages: list[Message]):
    """The only special ids are those of the framing, whatever the texts say."""
    renderer, messages = made(case), fitting(case, messages)
    special = set(small(case.vocabulary).specials.values())

    def framing(conversation: list[Message]) -> list[int]:
        return [id_ for id_ in renderer.example(conversation).tokens.tolist() if id_ in special]

    # Not empty: Phi-3.5 has no turn for an empty system message.
    blank = [
        replace(
            m,
            content="-" if m.content else "",
            thinking=None if m.thinking is None else "-",
            tools=tuple(replace(tool, name="-", parameters={}) for tool in m.tools),
            tool_calls=tuple(replace(call, name="-", arguments={}) for call in m.tool_calls),
        )
        for m in messages
    ]
    assert framing(messages) == framing(blank)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=k) for k, c in CASES.items() if c.name != "template"]
)
@FEW
@given(messages=conversations(ORDINARY))
def test_template_equals_renderer(case: Case, messages: list[Message]):
    renderer, messages = made(case), fitting(case, messages)
    tokenizer = small(case.vocabulary)
    example = renderer.example(messages)
    assert jinja_ids(renderer.template, messages, tokenizer, ask=False) == example.tokens.tolist()
    prompt = renderer.prompt(messages[:-1])
    assert jinja_ids(renderer.template, messages[:-1], tokenizer, ask=True) == prompt


@ALL
@FEW
@given(messages=conversations(ORDINARY))
def test_the_published_template_equals_renderer(case: Case, messages: list[Message]):
    """Thinking and tool calls are left out: no published template has them."""
    renderer, tokenizer = made(case), small(case.vocabulary)
    plain = [replace(m, thinking=None, tool_calls=()) for m in fitting(case, messages)]
    example = renderer.example(plain).tokens.tolist()
    text = published(case)
    assert jinja_ids(text, plain, tokenizer, ask=False, bos=case.bos) == example
    prompt = renderer.prompt(plain[:-1])
    assert jinja_ids(text, plain[:-1], tokenizer, ask=True, bos=case.bos) == prompt


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=k) for k, c in CASES.items() if c.name != "template"]
)
def test_the_published_template_names_its_renderer(case: Case):
    tokenizer = small(case.vocabulary)
    found = renderer_from_template(tokenizer, published(case), bos_token=case.bos)
    assert found.name == case.name
    assert not isinstance(found, TemplateRenderer)


@given(system=st.text(alphabet="ab'\\\"\n{}%é😀", max_size=12))
def test_any_default_system_survives_the_template(system: str):
    renderer = ChatMLRenderer(small("chatml"), name="chatml", default_system=system)
    messages = [Message("user", "hi")]
    rendered = jinja_ids(renderer.template, messages, small("chatml"), ask=True)
    assert rendered == renderer.prompt(messages)


def test_thinking_marks_as_text_are_refused_where_they_would_be_read():
    renderer = renderer_for(small("chatml"), "smollm2")
    with pytest.raises(ChatError):
        renderer.example([Message("user", "a"), Message("assistant", "b", thinking="x</think>y")])


def test_calls_and_definitions_are_the_json_that_others_read():
    """What stands between the marks is JSON with the names that the model was trained on."""
    tokenizer = small("phi4-mini")
    messages = [
        Message("system", "s", tools=(ToolDefinition("add", "Adds.", {"a": {"type": "int"}}),)),
        Message("user", "u"),
        Message("assistant", "", tool_calls=(ToolCall("add", {"a": 1}),)),
    ]
    tokens = renderer_for(tokenizer, "phi4-mini").example(messages).tokens
    text = tokenizer.decode(tokens.tolist(), keep_special=True)
    offered = text.partition("<|tool|>")[2].partition("<|/tool|>")[0]
    called = text.partition("<|tool_call|>")[2].partition("<|/tool_call|>")[0]
    parameters = {"a": {"type": "int"}}
    assert json.loads(offered) == [
        {"name": "add", "description": "Adds.", "parameters": parameters}
    ]
    assert json.loads(called) == [{"name": "add", "arguments": {"a": 1}}]
