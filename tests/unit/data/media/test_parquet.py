"""Parquet files of others, and those that are none."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phikit.base.errors import DataError
from phikit.data.media import parquet, rows
from phikit.data.media.layouts import read_layout
from phikit.data.media.parquet import write_parquet
from phikit.data.media.problem import MediaProblem, Stored
from phikit.data.media.rows import Columns
from phikit.data.problem import Provenance
from phikit.data.source import MediaFileSource, load_problems

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def foreign(path: Path) -> Path:
    rows = [
        {"image": {"bytes": b"one", "path": "a.png"}, "caption": "A cat.", "n": 1},
        {"image": {"bytes": None, "path": "b.png"}, "caption": "A dog.", "n": 2},
        {"image": {"bytes": None, "path": "../b.png"}, "caption": "A cow.", "n": 3},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_columns_are_named(tmp_path: Path):
    file = foreign(tmp_path / "x.parquet")
    columns = Columns(answer="caption", media={"vision": "image"})
    found = read_layout("parquet", file, columns=columns)
    assert [p.answer for p in found] == ["A cat.", "A dog.", "A cow."]
    assert found[0].question == "<|image_1|>Describe the picture."
    items = [source for p in found for source in p.media["vision"] if isinstance(source, Stored)]
    assert items[0].name == "x.parquet, row 0, image"
    assert items[0].load() == b"one" and items[1].load() == tmp_path / "b.png"
    with pytest.raises(DataError, match="leads out"):
        items[2].load()
    source = MediaFileSource(layout="parquet", path=str(tmp_path), columns=columns)
    split: Any = found[0].provenance.split
    here = load_problems(source, split=split, seed=0)
    assert [p.answer for p in here] == [p.answer for p in found if p.provenance.split == split]


def test_a_row_without_an_item_is_a_fault(tmp_path: Path):
    """Trained on as text it would teach to describe what nobody has seen."""
    cells = [None, [], [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": None}]]
    rows = [{"image": cell, "caption": "A cat."} for cell in cells]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    columns = Columns(answer="caption", media={"vision": "image"})
    found = read_layout("parquet", tmp_path / "x.parquet", columns=columns)
    for problem in found[:2]:
        [item] = problem.media["vision"]
        assert isinstance(item, Stored)
        with pytest.raises(DataError, match="empty"):
            item.load()
    names = [item.name for item in found[2].media["vision"] if isinstance(item, Stored)]
    assert names == ["x.parquet, row 2, image 1", "x.parquet, row 2, image 2"]


@pytest.mark.parametrize(
    "path",
    [
        "file:///etc/hostname::hf://x",
        "local:///etc/hostname::hf://x",
        "simplecache::file:///etc/hostname::hf://x",
        "http://127.0.0.1:1/::hf://x",
        "http://127.0.0.1:1/",
        "hf://a::file:///etc/hostname",
        "zip://a::file:///etc/hostname::hf://x",
    ],
)
def test_a_cell_reaches_nothing_but_the_hub(path: str):
    [item] = rows.stored_items(
        [{"bytes": None, "path": path}], "cell", modality="vision", root=None
    )
    with pytest.raises(DataError, match="neither bytes nor a file"):
        item.load()


@pytest.mark.parametrize("path", ["hf://datasets/a/b@main/x.png", "zip://x/y.png::hf://a/b.zip"])
def test_but_that_it_does(path: str, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def opened(path: str, mode: str):
        asked.append(path)
        return io.BytesIO(b"0123456789")

    monkeypatch.setitem(sys.modules, "fsspec", SimpleNamespace(open=opened))
    [item] = rows.stored_items([{"path": path}], "cell", modality="vision", root=None)
    assert item.load() == b"0123456789" and asked == [path]
    monkeypatch.setattr(rows, "MAX_ITEM_BYTES", 9)
    with pytest.raises(DataError, match="larger than 9"):
        item.load()


def test_one_value_that_many_rows_share_is_counted_for_each(tmp_path, monkeypatch):
    """Stored once, it would fill the memory."""
    cells = [{"bytes": b"0" * 100_000, "path": None}] * 64
    table = pa.table({"image": cells, "caption": ["A cat."] * 64, "other": [b"1" * 100_000] * 64})
    pq.write_table(table, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 100_000
    columns = Columns(answer="caption", media={"vision": "image"})
    monkeypatch.setattr(parquet, "MAX_BYTES", 7_000_000)  # half of what there is, other included
    assert len(read_layout("parquet", tmp_path / "x.parquet", columns=columns)) == 64
    monkeypatch.setattr(parquet, "MAX_BYTES", 3_000_000)
    with pytest.raises(DataError, match="more than 3000000 bytes decoded"):
        read_layout("parquet", tmp_path / "x.parquet", columns=columns)


def test_mistakes_are_typed(tmp_path: Path):
    file = foreign(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="does not say which columns"):
        read_layout("parquet", file)
    with pytest.raises(DataError, match="row 0: there is no column 'picture'"):
        read_layout("parquet", file, columns=Columns(answer="caption", media={"vision": "picture"}))
    with pytest.raises(DataError, match="row 0: no text in the column 'n'"):
        read_layout("parquet", file, columns=Columns(answer="n", media={"vision": "image"}))
    for data in (b"hello", b"", file.read_bytes()[:-20]):
        (tmp_path / "y.parquet").write_bytes(data)
        with pytest.raises(DataError, match="no Parquet file, or damaged"):
            read_layout("parquet", tmp_path / "y.parquet")


def test_a_large_row_group_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    with pytest.raises(DataError, match="row group 0"):
        read_layout("parquet", foreign(tmp_path / "x.parquet"))


def test_an_array_of_no_format_is_refused(tmp_path: Path):
    where = Provenance("album", "", "", "train", "test", "1", 0, 3)
    media = {"smell": (np.zeros((2, 2)),)}
    problem = MediaProblem("?", "a", None, "a", None, "s", where, media=media)
    with pytest.raises(DataError, match="album, item 3: no file format"):
        write_parquet([problem], tmp_path / "x.parquet")
    assert not any(tmp_path.iterdir())
