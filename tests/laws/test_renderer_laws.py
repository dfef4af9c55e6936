"""Laws that hold for every renderer and every conversation.

The reference for the template law is jinja2's sandbox with the settings `transformers` uses, and
the rendered text is then encoded the way `transformers` does it: special tokens are recognised.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phikit.base.errors import ChatError
from phikit.chat.message import Message, Role
from phikit.chat.render import NANO_SPECIALS, ChatMLRenderer, PhiRenderer, Renderer
from phikit.chat.tokenizer import Tokenizer

PHI4_MINI_PUBLISHED = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + "
    "message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM2_PUBLISHED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGERIES = [*NANO_SPECIALS, "<|im_start|>", "<|im_end|>", "{{ 1 }}", "{% if x %}"]

PLAIN = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
# A template's text cannot tell a forged special token from a real one, so these texts have none;
# and they begin with a letter (the renderer's module says why).
ORDINARY = PLAIN.map(lambda text: "a" + text.replace("|", "").replace("think>", ""))
HOSTILE = st.lists(st.one_of(PLAIN, st.sampled_from(FORGERIES)), max_size=4).map("".join)


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    """[system] (user assistant)+ : every assistant message may think."""
    roles: tuple[Role, ...] = ("user", "assistant")
    thinking = st.none() | content
    pair = st.tuples(
        st.builds(Message, role=st.just(roles[0]), content=content),
        st.builds(Message, role=st.just(roles[1]), content=content, thinking=thinking),
    )
    system = st.lists(st.builds(Message, role=st.just("system"), content=content), max_size=1)
    pairs = st.lists(pair, min_size=1, max_size=3)
    return st.builds(lambda s, p: [*s, *itertools.chain.from_iterable(p)], system, pairs)


def distinguishable(renderer: Renderer, messages: list[Message]) -> list[Message]:
    """Without special tokens for thinking, text that reads as a mark is a mark: take it out."""
    if renderer.name == "phi4-mini":
        return messages
    return [
        Message(
            message.role,
            message.content.replace("think>", ""),
            None if message.thinking is None else message.thinking.replace("think>", ""),
        )
        for message in messages
    ]


@pytest.fixture(params=["phi4-mini", "smollm2", "chatml without default"], scope="module")
def renderer(
    request: pytest.FixtureRequest, nano_tokenizer: Tokenizer, chatml_tokenizer: Tokenizer
) -> Renderer:
    if request.param == "phi4-mini":
        return PhiRenderer(nano_tokenizer)
    if request.param == "smollm2":
        return ChatMLRenderer(chatml_tokenizer)
    return ChatMLRenderer(chatml_tokenizer, name="chatml", default_system=None)


@pytest.fixture(scope="module")
def tokenizer(
    renderer: Renderer, nano_tokenizer: Tokenizer, chatml_tokenizer: Tokenizer
) -> Tokenizer:
    return nano_tokenizer if renderer.name == "phi4-mini" else chatml_tokenizer


def replies(tokens: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """The masked stretches of an example."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [tokens[a:b].tolist() for a, b in edges.reshape(-1, 2)]


def jinja_ids(
    template: str, messages: Sequence[Message], tokenizer: Tokenizer, *, ask: bool
) -> list[int]:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain = [{"role": m.role, "content": m.content, "thinking": m.thinking} for m in messages]
    text = environment.from_string(template).render(messages=plain, add_generation_prompt=ask)
    parser = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    parser.encode_special_tokens = False
    return parser.encode(text, add_special_tokens=False).ids


@given(messages=conversations(HOSTILE))
def test_mask_covers_exactly_replies_and_their_end(renderer: Renderer, messages: list[Message]):
    messages = distinguishable(renderer, messages)
    example = renderer.example(messages)
    learnt = replies(example.tokens, example.loss_mask)
    said = [message for message in messages if message.role == "assistant"]
    assert [renderer.parse(reply) for reply in learnt] == said
    for reply in learnt:
        assert [id_ for id_ in reply if id_ in renderer.stop_ids] == [reply[-1]]
        assert reply[-1] == renderer.stop_ids[0]


@given(messages=conversations(HOSTILE))
def test_prompt_then_reply_is_a_prefix_of_everything_later(
    renderer: Renderer, messages: list[Message]
):
    """Covers two laws: the prompt is a prefix of its example; each turn extends the last."""
    messages = distinguishable(renderer, messages)
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


@given(messages=conversations(HOSTILE))
def test_text_never_becomes_a_special_token(
    renderer: Renderer, tokenizer: Tokenizer, messages: list[Message]
):
    """The only special ids are those of the framing, whatever the texts say."""
    messages = distinguishable(renderer, messages)
    special = set(tokenizer.specials.values())

    def framing(conversation: list[Message]) -> list[int]:
        return [id_ for id_ in renderer.example(conversation).tokens.tolist() if id_ in special]

    blank = [Message(m.role, "", None if m.thinking is None else "") for m in messages]
    assert framing(messages) == framing(blank)


@given(messages=conversations(ORDINARY))
def test_template_equals_renderer(
    renderer: Renderer, tokenizer: Tokenizer, messages: list[Message]
):
    example = renderer.example(messages)
    assert jinja_ids(renderer.template, messages, tokenizer, ask=False) == example.tokens.tolist()
    prompt = renderer.prompt(messages[:-1])
    assert jinja_ids(renderer.template, messages[:-1], tokenizer, ask=True) == prompt


@given(messages=conversations(ORDINARY))
def test_template_equals_the_published_one(
    nano_tokenizer: Tokenizer, chatml_tokenizer: Tokenizer, messages: list[Message]
):
    plain = [Message(message.role, message.content) for message in messages]
    for renderer, tokenizer, published in (
        (PhiRenderer(nano_tokenizer), nano_tokenizer, PHI4_MINI_PUBLISHED),
        (ChatMLRenderer(chatml_tokenizer), chatml_tokenizer, SMOLLM2_PUBLISHED),
    ):
        example = renderer.example(plain).tokens.tolist()
        assert jinja_ids(published, plain, tokenizer, ask=False) == example
        prompt = renderer.prompt(plain[:-1])
        assert jinja_ids(published, plain[:-1], tokenizer, ask=True) == prompt


@given(system=st.text(alphabet="ab'\\\"\n{}%é😀", max_size=12))
def test_any_default_system_survives_the_template(chatml_tokenizer: Tokenizer, system: str):
    renderer = ChatMLRenderer(chatml_tokenizer, name="chatml", default_system=system)
    messages = [Message("user", "hi")]
    rendered = jinja_ids(renderer.template, messages, chatml_tokenizer, ask=True)
    assert rendered == renderer.prompt(messages)


def test_thinking_marks_as_text_are_refused_where_they_would_be_read(chatml_tokenizer: Tokenizer):
    renderer = ChatMLRenderer(chatml_tokenizer)
    with pytest.raises(ChatError):
        renderer.example([Message("user", "a"), Message("assistant", "b", thinking="x</think>y")])
