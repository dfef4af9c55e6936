"""Problems with media as they lie on disks: nothing is lost on the way, and a fault is one item's.

Every layout is given every fault that a file of its kind can have. The work stops and names the
item, or goes on without it and counts it; a good item is never lost.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.bad_media import BAD, picture, wav
from tests.modalities import HEARS, SEES

from phikit.base.errors import DataError
from phikit.base.media import SPEECH, VISION, MediaItem
from phikit.chat.render import renderer_for
from phikit.data.media.encode import file_bytes
from phikit.data.media.generate import generate
from phikit.data.media.layouts import Layout, read_layout
from phikit.data.media.parquet import read_parquet, write_parquet
from phikit.data.media.problem import MediaProblem, Stored, media_of, prepare
from phikit.data.media.rows import record_of
from phikit.data.media.shards import read_shards, write_shards
from phikit.data.problem import Provenance
from phikit.data.source import HubSource, load_problems
from phikit.models.senses import SpeechModality, VisionModality

IDS = {"image": 900, "audio": 901}
MODALITIES: dict[str, Callable[[Any], MediaItem]] = {
    VISION: VisionModality(encoder=SEES, max_crops=4).prepare,
    SPEECH: SpeechModality(encoder=HEARS, max_seconds=60).prepare,
}
WORDS = {VISION: "image", SPEECH: "audio"}
GOOD = {VISION: picture(40, 40), SPEECH: wav(np.zeros(8000), 8000)}
MISSING = "missing"


def generated() -> list[MediaProblem]:
    families = ("text", "shapes", "spoken_digits", "spoken_scene")
    return [p for f in families for p in generate(family=f, seed=0, count=3, split="train")]


def written(problems: Sequence[MediaProblem], kind: str, folder: Path) -> list[MediaProblem]:
    if kind == "parquet":
        write_parquet(problems, folder / "data.parquet")
        return [*read_parquet(folder / "data.parquet")]
    write_shards(problems, folder / "shards", shard_bytes=100_000)
    return [*read_shards(folder / "shards")]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.*") if f.is_file()}


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_what_is_written_is_what_is_read(kind: str, tmp_path: Path):
    given = generated()
    (tmp_path / "x.png").write_bytes(GOOD[VISION])
    given.append(problem("a file", VISION, tmp_path / "x.png"))
    given.append(problem("bytes", SPEECH, GOOD[SPEECH]))
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
    once = written(given, kind, tmp_path / "once")
    again = written(once, kind, tmp_path / "again")
    assert [record_of(p) for p in once] == [record_of(p) for p in given]
    for before, after in zip(given, once, strict=True):
        ours, theirs = (media_of(p, MODALITIES) for p in (before, after))
        assert ours is not None and theirs is not None and ours.digest() == theirs.digest()
        for modality, sources in before.media.items():
            for source, kept in zip(sources, after.media[modality], strict=True):
                assert isinstance(kept, Stored)
                assert kept.load() == file_bytes(source, where="")
    assert len(again) == len(given)
    assert all_bytes(tmp_path / "once") == all_bytes(tmp_path / "again")


def problem(name: str, modality: str, *sources: Any) -> MediaProblem:
    where = Provenance("album", "family", "", "train", "test", "1", 0, 0)
    asked = f"<|{WORDS[modality]}_1|>What?"
    return MediaProblem(asked, name, None, name, None, name, where, media={modality: sources})


Items = Mapping[str, tuple[str, bytes | None]]
"""By name: the modality, and the bytes; None for a file that is not there."""


def files_of(items: Items, folder: Path, modality: str, name: Callable[[int], str]) -> list[Path]:
    """The items of one modality as files."""
    files = []
    for index, (of, data) in enumerate(items.values()):
        if of == modality:
            files.append(folder / name(index))
            if data is not None:
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                files[-1].write_bytes(data)
    return files


def llava(items: Items, folder: Path) -> Path:
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]
    files = files_of(items, folder, VISION, lambda k: f"{k}.png")
    rows = [{"image": file.name, "conversations": turns} for file in files]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def librispeech(items: Items, folder: Path) -> Path:
    files = files_of(items, folder, SPEECH, lambda k: f"7/1/7-1-{k}.flac")
    lines = [f"{file.stem} HELLO" for file in files]
    (folder / "7/1/7-1.trans.txt").write_text("\n".join(lines))
    return folder


def common_voice(items: Items, folder: Path) -> Path:
    files = files_of(items, folder, SPEECH, lambda k: f"clips/{k}.wav")
    lines = ["client_id\tpath\tsentence", *(f"a\t{file.name}\thello" for file in files)]
    (folder / "all.tsv").write_text("\n".join(lines))
    return folder / "all.tsv"


def spoken_digits(items: Items, folder: Path) -> Path:
    here = {name: item for name, item in items.items() if item[1] is not None}
    files_of(here, folder, SPEECH, lambda k: f"{k % 10}_ann_{k}.wav")
    return folder


def parquet(items: Items, folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    problems = [problem(name, of, data or b"") for name, (of, data) in items.items()]
    write_parquet(problems, folder / "whole.parquet")
    table = pq.read_table(folder / "whole.parquet")
    rows = table.to_pylist()
    for row, (of, data) in zip(rows, items.values(), strict=True):
        if data is None:
            row[of] = [{"bytes": None, "path": "gone.png"}]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "data.parquet")
    return folder / "data.parquet"


def webdataset(items: Items, folder: Path) -> Path:
    """As others write it: a file beside its text, or a list of files of which one is absent."""
    import io
    import tarfile

    with tarfile.open(folder / "data.tar", "w") as tar:
        for index, (name, (of, data)) in enumerate(items.items()):
            whole = record_of(problem(name, of)) | {"media": {of: ["0.bin"]}}
            members = {"json": json.dumps(whole).encode()} | ({"0.bin": data} if data else {})
            if data is not None and index % 2:
                members = {"txt": b"x", "png" if of == VISION else "wav": data}
            for ending, body in members.items():
                member = tarfile.TarInfo(f"album/{index}.{ending}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    return folder / "data.tar"


WRITERS: dict[Layout, tuple[Callable[[Items, Path], Path], tuple[str, ...]]] = {
    "llava": (llava, (VISION,)),
    "librispeech": (librispeech, (SPEECH,)),
    "common_voice": (common_voice, (SPEECH,)),
    "spoken_digits": (spoken_digits, (SPEECH,)),
    "parquet": (parquet, (VISION, SPEECH)),
    "webdataset": (webdataset, (VISION, SPEECH)),
}


def every_item(modalities: Sequence[str], *, is_listed: bool = True) -> dict[str, Any]:
    """A good item of each modality, every fault, and the good ones once more."""
    items: dict[str, Any] = {f"first {name}": (name, GOOD[name]) for name in modalities}
    for name, (modality, source, _) in BAD.items():
        if modality in modalities and isinstance(source, bytes):
            items[name] = (modality, source)
    if is_listed:
        items |= {f"{MISSING} {name}": (name, None) for name in modalities}
    return items | {f"last {name}": (name, GOOD[name]) for name in modalities}


def check(found: Sequence[MediaProblem], items: Mapping[str, Any], renderer: Any) -> None:
    good = [k for k, name in enumerate(items) if name.startswith(("first", "last"))]
    made = prepare(found, renderer, modalities=MODALITIES, ids=IDS, on_fault="skip")
    assert len(found) == len(items)
    assert len(made.examples) == len(good) and len(made.faults) == len(items) - len(good)
    assert len({fault.item for fault in made.faults}) == len(made.faults)
    for fault in made.faults:
        alone = [p for p in found if name_of(p) == fault.item]
        with pytest.raises(DataError, match=re.escape(fault.item)):
            prepare(alone, renderer, modalities=MODALITIES, ids=IDS)
    reasons = {reason for m, s, reason in BAD.values() if isinstance(s, bytes) and (m, s) in
               [*items.values()]}  # fmt: skip
    said = " ".join(fault.reason for fault in made.faults)
    assert all(reason in said for reason in reasons), said


def name_of(problem: MediaProblem) -> str:
    [source] = (source for of in problem.media.values() for source in of)
    return source.name if isinstance(source, Stored) else str(source)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_fault_is_named_or_counted(layout: Layout, tmp_path: Path, nano_tokenizer):
    write, modalities = WRITERS[layout]
    items = every_item(modalities, is_listed=layout != "spoken_digits")
    path = write(items, tmp_path)
    found = read_layout(layout, path)
    check(found, items, renderer_for(nano_tokenizer, "phi4-mini"))


def test_a_fault_in_a_column_of_the_hub(
    nano_tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Cells as they are stored, and as the library decodes them."""
    from PIL import Image

    items = every_item((VISION,))
    rows = [
        {"image": {"bytes": data, "path": None}, "question": f"What is {name}?", "answer": "x"}
        for name, (_, data) in items.items()
    ]
    items |= {
        "first decoded": (VISION, None), "first pixels": (VISION, None), "text": (VISION, "no"),
        "last two": (VISION, None), "deep": (VISION, None), "outside": (VISION, None),
    }  # fmt: skip
    decoded = [
        Image.new("L", (30, 30)),
        np.zeros((30, 30, 3), np.uint8),
        "no",
        [Image.new("RGB", (9, 30))],
        Image.new("I;16", (30, 30)),
        {"bytes": None, "path": "../../etc/passwd"},
    ]
    rows += [{"image": c, "question": f"And {k}?", "answer": "x"} for k, c in enumerate(decoded)]
    hub = SimpleNamespace(load_dataset=lambda *_, **__: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    source = HubSource(id=str(tmp_path), media={VISION: "image"}, is_benchmark=True)
    found = [p for p in load_problems(source, split="test", seed=0) if isinstance(p, MediaProblem)]
    check(found, items, renderer_for(nano_tokenizer, "phi4-mini"))


def test_any_rate_in_a_column_is_resampled(nano_tokenizer, monkeypatch: pytest.MonkeyPatch):
    rows = []
    for rate_hz in (8000, 16_000, 44_100, 48_000):
        tone = 0.2 * np.sin(2 * np.pi * 300 * np.arange(rate_hz) / rate_hz)
        for cell in (
            {"array": tone, "sampling_rate": rate_hz},
            {"array": np.stack([tone, tone]), "sampling_rate": rate_hz},
            {"bytes": wav(tone, rate_hz), "path": "x.wav"},
        ):
            rows.append({"sound": cell, "words": f"tone {len(rows)}"})
    rows += [{"sound": {"array": np.zeros(9), "sampling_rate": r}, "words": "x"} for r in (0, "8")]
    rows.append({"sound": {"array": ["a"], "sampling_rate": 8000}, "words": "x"})
    hub = SimpleNamespace(load_dataset=lambda *_, **__: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    source = HubSource(
        id="a/b", media={SPEECH: "sound"}, prompt="Hear.", answer="words", is_benchmark=True
    )
    found = [p for p in load_problems(source, split="test", seed=0) if isinstance(p, MediaProblem)]
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    made = prepare(found, renderer, modalities=MODALITIES, ids=IDS, on_fault="skip")
    assert found[0].question == "<|audio_1|>Hear."
    clips = [clip for e in made.examples if e.media for clip in e.media.clips]
    assert [clip.num_tokens for clip in clips] == [13] * 12
    assert [fault.item for fault in made.faults] == [f"a/b, row {k}, sound" for k in (12, 13, 14)]
