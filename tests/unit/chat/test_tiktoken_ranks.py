"""Rank files against tiktoken itself, on the real vocabularies where they are at hand."""

import base64
import hashlib
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
from tests.unit.chat.vocabularies import PROSE, cl100k_ranks, random_texts, real_json

from phikit.base.errors import ChatError
from phikit.chat.tiktoken_ranks import _ALPHABET, PHI3_SMALL_SPECIALS, SPLITS, read_ranks
from phikit.chat.tokenizer import Tokenizer

O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
END = {"<|endoftext|>": 300_000}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank file of 400 tokens, made by tiktoken's rule: merge the commonest pair."""
    words = [bytes([b]) for b in "".join(PROSE).encode()]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 400:
        pairs = list(pairwise(words))
        left, right = max(sorted(set(pairs)), key=pairs.count)
        ranks[left + right] = len(ranks)
        joined: list[bytes] = []
        for word in words:
            if joined and joined[-1] == left and word == right:
                joined[-1] = left + right
            else:
                joined.append(word)
        words = joined
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    write(path, ranks)
    return path


def write(path: Path, ranks: dict[bytes, int]) -> None:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))


def reference(path: Path, encoding: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "reference", pat_str=SPLITS[encoding], mergeable_ranks=read_ranks(path), special_tokens={}
    )


def assert_equal(ours: Tokenizer, theirs: tiktoken.Encoding, count: int) -> None:
    for text in random_texts(random.Random(0), count):
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text), ascii(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("encoding", ["cl100k_base", "o200k_base"])
def test_a_small_file_gives_the_ids_of_tiktoken(trained: Path, encoding):
    ours = Tokenizer.from_tiktoken(trained, encoding=encoding, specials=END)
    assert_equal(ours, reference(trained, encoding), 2_000)
    assert ours.special("<|endoftext|>") == 300_000
    assert 300_000 not in ours.encode("<|endoftext|>")
    assert ours.size == 300_001


def test_cl100k_base_gives_the_ids_of_tiktoken(tmp_path: Path):
    path = cl100k_ranks()
    (tmp_path / "cl100k_base.tiktoken").symlink_to(path)
    ours = Tokenizer.load(tmp_path)  # a folder of Phi-3-small has no tokenizer.json
    assert ours.specials == dict(sorted(PHI3_SMALL_SPECIALS.items(), key=lambda pair: pair[1]))
    assert ours.size == 100_352
    assert_equal(ours, reference(path, "cl100k_base"), 10_000)


def test_o200k_base_gives_the_ids_of_tiktoken(tmp_path: Path):
    known = Tokenizer.load(real_json("o200k_base").parent)
    spelt = {character: byte for byte, character in enumerate(_ALPHABET)}
    vocabulary = json.loads(known.to_json())["model"]["vocab"]
    plain = {token: id_ for token, id_ in vocabulary.items() if token not in known.specials}
    path = tmp_path / "o200k_base.tiktoken"
    ordered = sorted(plain.items(), key=lambda pair: pair[1])
    write(path, {bytes(spelt[c] for c in token): id_ for token, id_ in ordered})
    assert hashlib.sha256(path.read_bytes()).hexdigest() == O200K_SHA256
    ours = Tokenizer.from_tiktoken(path, encoding="o200k_base", specials={"<|end|>": 200_020})
    assert_equal(ours, reference(path, "o200k_base"), 10_000)
    assert all(ours.encode(t) == known.encode(t) for t in random_texts(random.Random(1), 2_000))


def test_it_saves_as_any_tokenizer(trained: Path, tmp_path: Path):
    ours = Tokenizer.from_tiktoken(trained, encoding="o200k_base", specials=END)
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.specials == ours.specials
    assert again.encode("What is 12?\n\n") == ours.encode("What is 12?\n\n")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"!!!! 400", "line 401 .*does not begin with base64"),
        (b" 400", "line 401 .*holds no token"),
        (b"QUJD", "line 401 .*does not end with a rank"),
        (b"QUJD -1", "line 401 .*does not end with a rank"),
        (b"QUJD 99999999999", "line 401 .*does not end with a rank"),
        (b"QQ== 400", "line 401 .*repeats a token"),
        (b"cXF6cXF6 500", "not 0, 1, 2"),
        (b"cXF6cXF6 400", "rank 400 .*not a merge of two others"),
    ],
)
def test_a_damaged_line_is_named(trained: Path, tmp_path: Path, line: bytes, fault: str):
    path = tmp_path / "damaged.tiktoken"
    path.write_bytes(trained.read_bytes() + line + b"\n")
    with pytest.raises(ChatError, match=fault):
        Tokenizer.from_tiktoken(path, encoding="cl100k_base", specials={})


def test_what_cannot_be_a_rank_file(trained: Path, tmp_path: Path):
    def build(path: Path, **changes) -> None:
        Tokenizer.from_tiktoken(path, **{"encoding": "cl100k_base", "specials": {}, **changes})

    with pytest.raises(ChatError, match="does not exist"):
        build(tmp_path / "none.tiktoken")
    with pytest.raises(ChatError, match="unknown encoding 'gpt2'"):
        build(trained, encoding="gpt2")
    for specials in ({"<|a|>": 5}, {"a": 500}, {"<|a|>": -1}, {"<|a|>": 1 << 40}):
        with pytest.raises(ChatError, match="cannot have the id"):
            build(trained, specials=specials)
    path = tmp_path / "bad.tiktoken"
    write(path, {b"a": 0})
    with pytest.raises(ChatError, match="lacks some of the 256 bytes"):
        build(path)
    with path.open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(ChatError, match="larger than"):
        build(path)
    bytes_first = {bytes([byte]): byte for byte in range(256)}
    write(path, {**bytes_first, b"a" * 20_000: 256})
    with pytest.raises(ChatError, match="too long"):
        build(path)
