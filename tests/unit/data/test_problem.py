import json
from dataclasses import replace
from pathlib import Path

import pytest

from phikit.base.errors import DataError
from phikit.chat.message import Message
from phikit.data.problem import (
    Problem,
    Provenance,
    assert_disjoint,
    normalise,
    read_problems,
)
from phikit.data.rows import MAX_LINE_BYTES
from phikit.data.split import split_of

ROW = {"question": "What is 2 + 3?", "answer": "5"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def problem(signature: str) -> Problem:
    provenance = Provenance("test", "", "CC0-1.0", "train", "test", "1", 0, 0)
    return Problem("How many?", "3", "total: 1 + 2 = 3", "3", 1, signature, provenance)


def test_reads_rows_in_order_with_provenance(tmp_path: Path):
    full = {**ROW, "question": "Two?", "thinking": "1 + 1 = 2", "solution": "It is 2."}
    path = write(tmp_path / "own.jsonl", ROW, {**full, "answer": 2}, {**ROW, "id": 7})
    first, second, third = read_problems(path, license="MIT")
    assert (first.question, first.answer, first.thinking) == ("What is 2 + 3?", "5", None)
    assert (second.answer, second.thinking, second.solution) == ("2", "1 + 1 = 2", "It is 2.")
    assert first.signature == "what is 2 + 3?" == third.signature
    assert first.provenance.split == split_of(first.signature)
    assert (second.provenance.index, second.provenance.source) == (2, "own.jsonl")
    assert second.provenance.license == "MIT"


def test_split_may_be_given(tmp_path: Path):
    path = write(tmp_path / "exam.jsonl", ROW)
    assert read_problems(path, split="test")[0].provenance.split == "test"


def test_byte_order_mark_blank_lines_and_windows_ends_are_no_fault(tmp_path: Path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n \n")
    assert [p.question for p in read_problems(path)] == ["What is 2 + 3?"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'["question"]', "expected a JSON object, found list"),
        (b'{"answer": "1"}', "no 'question' (keys found: answer)"),
        (b'{"question": "q", "answer": null}', "no 'answer'"),
        (b'{"question": "  ", "answer": "1"}', "'question' is empty"),
        (b'{"question": "q", "answer": true}', "'answer' is bool, not text"),
        (b'{"question": "q", "answer": NaN}', "'answer' is float, not text"),
        (b'{"question": "q", "answer": ["1"]}', "'answer' is list, not text"),
        (b'{"question": "\\ud800", "answer": "1"}', "surrogate"),
        (b'{"question": "q", "answer": "1", "thinkng": "t"}', "did you mean 'thinking'?"),
        (b'{"question": "q\xff", "answer": "1"}', "not UTF-8 at byte 15"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 at byte 0"),
        (b'{"question": "' + b"q" * MAX_LINE_BYTES + b'"}', "line longer than 1048576 bytes"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: bytes, reason: str):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_problems(path)
    assert f"{path}:2:" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no problems in the file"):
        read_problems(path)


def test_a_path_that_cannot_be_read_is_an_error(tmp_path: Path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            read_problems(path)


def test_normalise_ignores_what_readers_ignore():
    assert normalise("What  IS\t2 + 2？\n") == normalise("what is 2 + 2?")
    assert normalise("2 + 2") != normalise("2 + 3")


def test_disjoint_sets_pass_and_overlaps_are_named():
    assert_disjoint(train=[problem("a"), problem("b")], test=[problem("c")], rl=[])
    renamed = replace(problem("b"), question="Other words?")
    with pytest.raises(DataError, match=r"'train' and 'test' share 1 problems.*How many"):
        assert_disjoint(train=[problem("a"), problem("b")], rl=[], test=[renamed])


def test_messages_are_the_finished_conversation():
    assert problem("a").messages() == [
        Message("user", "How many?"),
        Message("assistant", "3", thinking="total: 1 + 2 = 3"),
    ]
    with pytest.raises(DataError, match="no solution"):
        replace(problem("a"), solution=None).messages()
