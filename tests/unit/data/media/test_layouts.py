import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phikit.base.errors import DataError
from phikit.data.media.layouts import Layout, read_layout
from phikit.data.source import MediaFileSource, load_problems


def test_llava(tmp_path: Path):
    rows = [
        {
            "id": "1",
            "image": "a/x.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
            ],
        },
        {
            "id": "2",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}],
        },
    ]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(rows))
    [problem] = read_layout("llava", file)
    assert (problem.question, problem.answer) == ("<|image_1|>What is it?", "A cat.")
    assert problem.media == {"vision": (tmp_path / "a/x.png",)}

    rows[0]["image"] = "../../etc/passwd"
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match="leads out of"):
        read_layout("llava", file)
    file.write_text(json.dumps([{"image": "x.png", "conversations": []}]))
    with pytest.raises(DataError, match="row 0: no conversation"):
        read_layout("llava", file)
    file.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_layout("llava", file)


def test_llava_with_several_pictures_or_what_cannot_be_one(tmp_path: Path):
    file = tmp_path / "data.json"

    def read(image: object, said: object = "Yes."):
        turns = [{"from": "human", "value": "<image>Same?"}, {"from": "gpt", "value": said}]
        file.write_text(json.dumps([{"image": image, "conversations": turns}]))
        return read_layout("llava", file)

    [problem] = read(["a.png", "b.png"])
    assert problem.question == "<|image_1|><|image_2|>Same?"
    assert problem.media == {"vision": (tmp_path / "a.png", tmp_path / "b.png")}
    for image in (None, [], 7, ["a.png", None]):
        with pytest.raises(DataError, match="row 0: no picture"):
            read(image)
    for said in (None, 3):
        with pytest.raises(DataError, match="row 0: no conversation"):
            read("a.png", said)
    with pytest.raises(DataError, match="row 0: gpt says nothing"):
        read("a.png", " ")
    with pytest.raises(DataError, match="is no path"):
        read("a\0b.png")
    with pytest.raises(DataError, match="surrogates not allowed"):
        read("a.png", "half a \ud83d")


def test_all_that_is_asked_about_an_item_is_in_one_split(tmp_path: Path):
    """Else a test picture, or a test speaker, is trained on under another question."""
    said = {"from": "gpt", "value": "x"}
    rows = [
        {"image": f"{k}.png", "conversations": [{"from": "human", "value": f"{q}?"}, said]}
        for k in range(60)
        for q in range(3)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    lines = [f"speaker{k % 40}\t{k}.mp3\tsentence {k}" for k in range(200)]
    (tmp_path / "all.tsv").write_text("\n".join(("client_id\tpath\tsentence", *lines)))
    cases: list[tuple[Layout, str, Callable[[Any], Any]]] = [
        ("llava", "data.json", lambda p: p.media["vision"]),
        ("common_voice", "all.tsv", lambda p: p.styles),
    ]
    for layout, name, key in cases:
        found = read_layout(layout, tmp_path / name)
        splits: dict[Any, set[str]] = {}
        for problem in found:
            splits.setdefault(key(problem), set()).add(problem.provenance.split)
        assert len(splits) in (40, 60) and all(len(of) == 1 for of in splits.values())
        assert {"train", "test"} <= set.union(*splits.values())
        source = MediaFileSource(layout=layout, path=str(tmp_path / name))
        train = {key(problem) for problem in load_problems(source, split="train", seed=0)}
        assert not train & {key(p) for p in load_problems(source, split="test", seed=0)}


def test_text_that_is_none(tmp_path: Path):
    (tmp_path / "1-2.trans.txt").write_bytes(b"1-2-0 \xff\xfe\n")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_layout("librispeech", tmp_path)
    for name in ("../../../etc/x", "/etc/passwd"):
        (tmp_path / "1-2.trans.txt").write_text(f"{name} HELLO")
        with pytest.raises(DataError, match="leads out of"):
            read_layout("librispeech", tmp_path)
    voice = tmp_path / "train.tsv"
    voice.write_text("path\tsentence\n../../x.mp3\tYes.")
    with pytest.raises(DataError, match="leads out of"):
        read_layout("common_voice", voice)
    voice.write_bytes(b"path\tsentence\n\xff\t\xff\n")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_layout("common_voice", voice)
    voice.write_text("path\tsentence\nx.mp3\t" + "word " * 40_000)
    with pytest.raises(DataError, match="field larger"):
        read_layout("common_voice", voice)
    voice.write_text("path\tsentence\nx.mp3\tYes.\ny.mp3\t\n")
    with pytest.raises(DataError, match="row 2 has no path or no sentence"):
        read_layout("common_voice", voice)


def test_recordings(tmp_path: Path):
    libri = tmp_path / "libri/19/198"
    libri.mkdir(parents=True)
    (libri / "19-198.trans.txt").write_text("19-198-0000 HELLO THERE\n19-198-0001 GOOD DAY\n")
    found = read_layout("librispeech", tmp_path / "libri")
    assert [p.answer for p in found] == ["hello there", "good day"]
    assert found[0].media == {"speech": (libri / "19-198-0000.flac",)}
    assert found[0].styles == ("voice:19",)

    voice = tmp_path / "train.tsv"
    voice.write_text("client_id\tpath\tsentence\nabc\tone.mp3\tGood morning.\n")
    [problem] = read_layout("common_voice", voice)
    assert problem.media == {"speech": (tmp_path / "clips/one.mp3",)}
    assert problem.answer == "Good morning." and problem.styles == ("voice:abc",)

    with pytest.raises(DataError, match="holds nothing"):
        read_layout("spoken_digits", tmp_path)
    with pytest.raises(DataError, match="there is no"):
        read_layout("llava", tmp_path / "absent.json")


def test_one_speaker_is_left_out(tmp_path: Path):
    for name in ("0_ann_0", "1_ann_0", "0_bob_0", "1_bob_1", "2_eve_0"):
        (tmp_path / f"{name}.wav").touch()
    source = MediaFileSource(layout="spoken_digits", path=str(tmp_path), held_out="bob")
    train, test = (load_problems(source, split=split, seed=0) for split in ("train", "test"))
    assert [p.answer for p in train] == ["zero", "one", "two"]
    assert sorted(p.answer for p in test) == ["one", "zero"]
    assert {p.content_hash for p in train}.isdisjoint(p.content_hash for p in test)
    few = source.model_copy(update={"count": 2})
    assert len(load_problems(few, split="train", seed=0)) == 2
    nobody = source.model_copy(update={"held_out": "zoe"})
    with pytest.raises(DataError, match="check held_out"):
        load_problems(nobody, split="test", seed=0)
