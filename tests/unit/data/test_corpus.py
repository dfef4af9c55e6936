import re
from collections import Counter
from itertools import islice

import pytest
from pydantic import ValidationError

from phikit.base.errors import DataError
from phikit.chat.message import Message
from phikit.data import prose
from phikit.data.corpus import CorpusMixture, Document, Kind, pretraining_documents
from phikit.data.problem import assert_disjoint
from phikit.data.procedural import generate, stream


def of_kind(kind: Kind, count: int = 300) -> list[Document]:
    mixture = CorpusMixture(weights={kind: 1.0})
    return list(pretraining_documents(seed=0, count=count, mixture=mixture))


def texts(kind: Kind, count: int = 300) -> list[str]:
    return [
        document.content for document in of_kind(kind, count) if isinstance(document.content, str)
    ]


def test_the_mixture_is_followed_and_the_corpus_reproducible():
    documents = list(pretraining_documents(seed=0, count=2000))
    kinds = Counter(document.kind for document in documents)
    for kind, share in CorpusMixture().weights.items():
        assert kinds[kind] / 2000 == pytest.approx(share, abs=0.04)
    assert list(pretraining_documents(seed=0, count=50)) == documents[:50]
    assert list(pretraining_documents(seed=1, count=50)) != documents[:50]


def test_facts_are_true():
    operations = {"plus": "+", "minus": "-", "times": "*", "divided by": "//", "/": "//"}
    pattern = re.compile(r"(\d+) (\+|-|\*|/|plus|minus|times|divided by) (\d+) (?:=|is) (\d+)\.?")
    seen = set()
    for text in texts("fact"):
        facts = text.split("\n") if "\n" in text else re.split(r"(?<=\.) ", text)
        assert 4 <= len(facts) <= 7
        for fact in facts:
            match = pattern.fullmatch(fact)
            assert match is not None, fact
            left, operation, right, result = match.groups()
            expression = f"{left} {operations.get(operation, operation)} {right}"
            assert eval(expression) == int(result) <= 150, fact
            seen.add(operation)
    assert len(seen) == 8


def test_copies_repeat_a_text_with_numbers():
    for text in texts("copy"):
        original, _, copy = text.partition(" Again: ")
        assert original == copy
        assert original.endswith(".")


def test_stories_end_in_their_equation():
    for text in texts("story"):
        assert re.search(r"[.?] \d+ [-+*/] \d+ = \d+\.$", text), text


def test_chats_answer_without_thinking():
    for document in of_kind("chat"):
        question, reply = document.content
        assert isinstance(question, Message) and isinstance(reply, Message)
        assert (question.role, reply.role) == ("user", "assistant")
        assert reply.thinking is None
        assert re.fullmatch(r"Answer: \\boxed\{\d+\}", reply.content)


def test_no_document_shows_a_trace():
    """Mid-training is measured by what the base model cannot do, so it must not see traces."""
    for document in pretraining_documents(seed=0, count=1500):
        parts = (
            [document.content]
            if isinstance(document.content, str)
            else [message.content for message in document.content]
        )
        for text in parts:
            assert not re.search(r"[a-z]: \d+ [-+*/] \d+ = ", text), text
            assert "think>" not in text


def test_every_question_of_the_corpus_is_in_the_train_split():
    asked = {
        document.content[0].content
        for document in of_kind("chat", 1000)
        if not isinstance(document.content, str)
    }
    for split in ("rl", "validation", "test"):
        held_out = list(islice(stream(seed=0, split=split, steps={1: 1}), 500))
        assert not asked & {problem.question for problem in held_out}


def test_the_corpus_does_not_repeat_a_training_stage_of_the_same_seed():
    asked = {
        document.content[0].content
        for document in of_kind("chat", 500)
        if not isinstance(document.content, str)
    }
    stage = generate(seed=0, count=500, split="train")
    assert len(asked & {problem.question for problem in stage}) < 5
    assert_disjoint(stage=stage, test=generate(seed=0, count=200, split="test"))


def test_definitions_and_prose_are_plain_text():
    for text in (*texts("definition"), *texts("prose")):
        assert text.isascii() and text[0].isalnum() and text[-1] in ".!?\"')", text


def test_prose_is_plentiful_deterministic_and_licensed():
    paragraphs = prose.paragraphs()
    assert len(paragraphs) == len(set(paragraphs)) > 500
    document = of_kind("prose", 1)[0]
    assert document.provenance.license == "PSF-2.0"
    assert document.provenance.source.startswith("cpython-3.")
    assert of_kind("fact", 1)[0].provenance.license == "Apache-2.0"


def test_prose_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prose, "paragraphs", lambda: ())
    with pytest.raises(DataError, match="no documentation"):
        of_kind("prose", 1)
    assert of_kind("fact", 1)


@pytest.mark.parametrize("weights", [{}, {"fact": 0.0}, {"fact": -1.0, "copy": 2.0}, {"poem": 1.0}])
def test_impossible_mixtures_are_refused(weights: dict):
    with pytest.raises(ValidationError):
        CorpusMixture(weights=weights)
