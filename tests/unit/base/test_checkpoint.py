from pathlib import Path

import pytest

from phikit.base.checkpoint import latest_checkpoint, save_checkpoint, verify_checkpoint
from phikit.base.errors import CheckpointError


def fill(text: str):
    def write(folder: Path) -> None:
        (folder / "model.bin").write_text(text)
        (folder / "state").mkdir()
        (folder / "state" / "rank-0.bin").write_text(text)

    return write


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_newest_is_found_by_number_and_older_ones_pruned(tmp_path: Path):
    for step in (8, 9, 10):
        saved = save_checkpoint(tmp_path, step, fill(str(step)), keep=2)
        verify_checkpoint(saved)
    assert names(tmp_path) == {"step-9", "step-10"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step-10"


def test_no_checkpoint_yet(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_interrupted_save_is_ignored_and_swept_up(tmp_path: Path):
    save_checkpoint(tmp_path, 1, fill("one"))
    (tmp_path / "step-2.tmp").mkdir()
    (tmp_path / "step-2.tmp" / "model.bin").write_text("par")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1"
    save_checkpoint(tmp_path, 2, fill("two"))
    assert names(tmp_path) == {"step-2"}


def test_failing_writer_leaves_the_old_checkpoint(tmp_path: Path):
    save_checkpoint(tmp_path, 1, fill("one"))

    def fail(folder: Path) -> None:
        (folder / "model.bin").write_text("par")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        save_checkpoint(tmp_path, 2, fail)
    assert names(tmp_path) == {"step-1"}


def test_same_step_can_be_saved_again(tmp_path: Path):
    save_checkpoint(tmp_path, 1, fill("one"))
    saved = save_checkpoint(tmp_path, 1, fill("again"))
    verify_checkpoint(saved)
    assert (saved / "model.bin").read_text() == "again"


def test_damage_is_named_with_both_hashes(tmp_path: Path):
    saved = save_checkpoint(tmp_path, 1, fill("one"))
    (saved / "state" / "rank-0.bin").write_text("onf")
    with pytest.raises(CheckpointError, match=r"rank-0\.bin is damaged") as caught:
        verify_checkpoint(saved)
    assert "sha256 is" in str(caught.value) and "manifest says" in str(caught.value)
    assert "fall back" in str(caught.value)


def test_missing_file_and_missing_manifest(tmp_path: Path):
    saved = save_checkpoint(tmp_path, 1, fill("one"))
    (saved / "model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"model\.bin is missing"):
        verify_checkpoint(saved)
    (saved / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable"):
        verify_checkpoint(saved)
