from pathlib import Path

import pytest

from phikit.base.errors import StorageError
from phikit.cli.output import fresh


def test_it_appears_whole(tmp_path: Path):
    with fresh(tmp_path / "a" / "model") as place:
        place.mkdir()
        (place / "file").write_text("1")
        assert not (tmp_path / "a" / "model").exists()
    assert (tmp_path / "a" / "model" / "file").read_text() == "1"
    with fresh(tmp_path / "b.gguf") as place:
        place.write_text("2")
    assert (tmp_path / "b.gguf").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.gguf"]


def write_half(out: Path) -> None:
    with fresh(out) as place:
        place.mkdir()
        (place / "file").write_text("1")
        raise ZeroDivisionError


def test_a_failure_leaves_nothing(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path: Path):
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("2")
    for name in ("file", "folder"):
        with pytest.raises(StorageError, match="nothing is overwritten"), fresh(tmp_path / name):
            pytest.fail("must not begin")
    with pytest.raises(StorageError), fresh(tmp_path / "file" / "below"):
        pytest.fail("must not begin")


def test_an_empty_folder_and_leftovers_are_taken(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "old").write_text("1")
    with fresh(tmp_path / "model") as place:
        assert not place.exists()
        place.mkdir()
    assert (tmp_path / "model").is_dir()
    assert len(list(tmp_path.iterdir())) == 1
