import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tests.unit.chat.vocabularies import PROSE, llama_bpe, random_texts, real_json, small

from phikit.base.errors import ChatError, DataError
from phikit.chat.render import NANO_SPECIALS
from phikit.chat.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["one two three 123 one two", "the cat sat on the mat, then the other one", "a\n\nb"]
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


def test_special_ids_come_first_in_order(nano_tokenizer: Tokenizer):
    assert list(nano_tokenizer.specials.values()) == list(range(7))
    assert tuple(nano_tokenizer.specials) == NANO_SPECIALS
    assert nano_tokenizer.special("<|end|>") == 4
    assert nano_tokenizer.size == 300
    with pytest.raises(ChatError, match=r"no special token '<\|im_end\|>'"):
        nano_tokenizer.special("<|im_end|>")


@given(text=TEXT)
def test_decode_inverts_encode(nano_tokenizer: Tokenizer, text: str):
    assert nano_tokenizer.decode(nano_tokenizer.encode(text)) == text


@given(parts=st.lists(st.one_of(st.sampled_from(NANO_SPECIALS), TEXT), max_size=6))
def test_text_never_becomes_special(nano_tokenizer: Tokenizer, parts: list[str]):
    text = "".join(parts)
    ids = nano_tokenizer.encode(text)
    assert not set(ids) & set(nano_tokenizer.specials.values())
    assert nano_tokenizer.decode(ids) == text


def test_plain_added_markers_become_special_on_load(tmp_path: Path, nano_tokenizer: Tokenizer):
    inner = tokenizers.Tokenizer.from_str(nano_tokenizer.to_json())
    inner.add_tokens(["<tool_call>"])
    inner.enable_truncation(2)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    marker = loaded.special("<tool_call>")
    assert marker == 300
    assert marker not in loaded.encode("<tool_call>")
    assert len(loaded.encode("a longer text than two tokens")) > 2


def test_digits_stand_alone(nano_tokenizer: Tokenizer):
    pieces = [nano_tokenizer.decode([id_]) for id_ in nano_tokenizer.encode("12 + 7")]
    assert [piece for piece in pieces if piece.strip().isdigit()] == ["1", "2", " 7"]


def test_save_and_load(tmp_path: Path, nano_tokenizer: Tokenizer):
    nano_tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.to_json() == nano_tokenizer.to_json()
    assert loaded.encode("Anna has 12") == nano_tokenizer.encode("Anna has 12")


def test_load_names_what_is_wrong(tmp_path: Path):
    with pytest.raises(ChatError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ChatError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_training_is_deterministic_across_processes():
    script = (
        "from phikit.chat.tokenizer import train_tokenizer\n"
        f"print(train_tokenizer({TEXTS!r}, size=280, specials=['<|e|>']).to_json())"
    )
    outputs = set()
    for threads in ("1", "2"):
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "true",
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": threads,
        }
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        )
        outputs.add(json.dumps(json.loads(run.stdout)))
    shuffled = train_tokenizer(reversed(TEXTS), size=280, specials=["<|e|>"])
    outputs.add(json.dumps(json.loads(shuffled.to_json())))
    assert len(outputs) == 1


def test_training_refuses_impossible_sizes():
    with pytest.raises(DataError, match="too small"):
        train_tokenizer(TEXTS, size=200, specials=[])
    with pytest.raises(DataError, match="the texts give only"):
        train_tokenizer(["a"], size=300, specials=[])


@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_stream_decoder_equals_decode(nano_tokenizer: Tokenizer, ids: list[int]):
    decoder = nano_tokenizer.decoder()
    pieces = [decoder.push(id_) for id_ in ids]
    assert "".join(pieces) + decoder.flush() == nano_tokenizer.decode(ids)


@given(text=TEXT)
def test_stream_decoder_never_shows_half_a_character(nano_tokenizer: Tokenizer, text: str):
    decoder = nano_tokenizer.decoder()
    pieces = [decoder.push(id_) for id_ in nano_tokenizer.encode(text)]
    assert ("\ufffd" in "".join(pieces)) <= ("\ufffd" in text)


def test_lone_surrogates_are_refused(nano_tokenizer: Tokenizer):
    with pytest.raises(ChatError, match="not valid Unicode"):
        nano_tokenizer.encode("a\ud800")


def assert_llama(ours: Tokenizer, theirs: tokenizers.Tokenizer, count: int) -> None:
    """Ids as the library gives them, and every text back; U+2581 is the spelling of a space."""
    theirs.encode_special_tokens = True
    for text in random_texts(random.Random(0), count):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text.replace("\u2581", " ")


def test_llama_bpe():
    specials = ["<|end|>", "<think>"]
    ours = Tokenizer(llama_bpe(PROSE, specials=specials, rstrip=True))
    assert_llama(ours, llama_bpe(PROSE, specials=specials, rstrip=True), 2_000)
    assert ours.byte_ids == frozenset(range(3, 259))
    assert not set(ours.encode("<s></s><unk><|end|><think><0x0A>")) & set(ours.specials.values())


def test_llama_bpe_on_its_real_vocabulary():
    path = real_json("llama_bpe")
    ours = Tokenizer.load(path.parent)
    assert_llama(ours, tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")), 10_000)
    assert ours.size == 32_000
    assert not set(ours.encode("<s></s><unk>")) & set(ours.specials.values())


@given(ids=st.lists(st.integers(0, 420), max_size=30))
@example(ids=[3, 0, 131])  # a special token between two bytes
def test_stream_decoder_equals_decode_with_byte_pieces(ids: list[int]):
    tokenizer = small("phi3")
    decoder = tokenizer.decoder()
    pieces = [decoder.push(id_) for id_ in ids]
    assert "".join([*pieces, decoder.flush()]) == tokenizer.decode(ids)


@given(text=TEXT)
def test_the_stream_of_a_text_is_the_text(text: str):
    for tokenizer in (small("phi3"), small("phi4-mini")):
        decoder = tokenizer.decoder()
        pieces = [decoder.push(id_) for id_ in tokenizer.encode(text)]
        assert "".join([*pieces, decoder.flush()]) == text.replace("\u2581", " ") or (
            tokenizer is small("phi4-mini") and "".join(pieces) == text
        )


def test_special_tokens_swallow_white_space_where_their_entry_says_so():
    tokenizer = small("phi4")
    start, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
    parts = ["a ", start, "\u3000 b", " c\n", end, " \t", start]
    assert tokenizer.stretches(parts) == ["a", start, "b c", end, start]
    # U+001C is white space to Python, and not to the tokenizers library.
    assert tokenizer.stretches([start, "\x1c"]) == [start, "\x1c"]
    assert tokenizer.mark("a<|im_end|>b") == ["a", end, "b"]


def test_encode_after_never_changes_what_stands_before(nano_tokenizer: Tokenizer):
    alone = nano_tokenizer.encode("\n\nx")
    assert nano_tokenizer.encode_after("assistant\n", "\n\nx") == alone
    assert nano_tokenizer.decode_after("assistant\n", alone) == "\n\nx"
    tokenizer = Tokenizer(llama_bpe(PROSE, specials=[], rstrip=False))
    ids = tokenizer.encode_after("\n", " x")
    assert tokenizer.decode_after("\n", ids) == " x"
