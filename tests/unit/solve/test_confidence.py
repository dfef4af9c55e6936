import math
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from phikit.base.errors import RemoteError
from phikit.chat.message import Message
from phikit.data.procedural import generate
from phikit.generate.chat import ChatOptions, ChatReply
from phikit.generate.reply import Piece
from phikit.solve.asked import asked
from phikit.solve.confidence import Opinion, agreement, log_prob, weakest


def reply(text: str, mean: float | None = -1.0, least: float | None = -2.0) -> ChatReply:
    return ChatReply(Message("assistant", text), "stop", 1, 1, mean, least)


def answer_of(reply: ChatReply) -> str | None:
    return reply.message.content or None


def test_agreement_takes_the_likeliest_of_the_commonest():
    replies = [reply("8", -0.1), reply("7", -0.9), reply("", -0.01), reply("7", -0.2)]
    assert agreement(replies, answer_of) == Opinion(3, 0.5)
    assert agreement([reply("8", -0.3), reply("7", -0.2)], answer_of) == Opinion(1, 0.5)
    assert agreement([reply("", -0.3), reply("", -0.2)], answer_of).confidence == 0.0
    assert agreement([reply("7", None)], answer_of) == Opinion(0, 1.0)


def test_likelihood():
    replies = [reply("a", -0.5, -0.9), reply("b", -0.2, -3.0), reply("c", None, None)]
    assert log_prob(replies, answer_of) == Opinion(1, -0.2)
    assert weakest(replies, answer_of) == Opinion(0, -0.9)
    assert weakest(replies[2:], answer_of) == Opinion(0, -math.inf)


@given(st.lists(st.sampled_from(["1", "2", "3", ""]), min_size=1, max_size=9), st.randoms())
def test_agreement_does_not_depend_on_the_order(texts: list[str], random):
    replies = [reply(text, -float(i)) for i, text in enumerate(texts)]
    shuffled = random.sample(replies, len(replies))
    one, other = agreement(replies, answer_of), agreement(shuffled, answer_of)
    assert one.confidence == other.confidence
    assert replies[one.choice] == shuffled[other.choice]
    assert 0 <= one.confidence <= 1 and round(one.confidence * len(texts), 9) % 1 == 0


class Parrot:
    """Says the last word of the question; knows no commas."""

    def answer(self, messages: Sequence[Message], options: ChatOptions) -> list[ChatReply]:
        [question] = messages
        if "," in question.content:
            raise RemoteError("a comma")
        return [reply(f"{question.content.split()[-1]} {options.seed}")]

    def stream(
        self, messages: Sequence[Message], options: ChatOptions
    ) -> Iterator[Piece | ChatReply]:
        raise NotImplementedError


def test_problems_are_asked_in_order_with_seeds_of_their_own():
    problems = generate(seed=0, count=20, split="test")
    done: list[int] = []
    replies = asked(Parrot(), ChatOptions(), at_once=3, on_progress=done.append)(problems)
    assert len(done) == 20
    backwards = asked(Parrot(), ChatOptions())(problems[::-1])[::-1]
    assert replies == backwards
    for problem, [one] in zip(problems, replies, strict=True):
        if "," in problem.question:
            assert one.error == "a comma" and not one.finished
        else:
            assert one.text.startswith(problem.question.split()[-1]) and one.finished
    assert len({one.text for [one] in replies if one.error is None}) > 1
