import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

import phikit
from phikit.base.config import Config
from phikit.base.errors import MissingExtraError, RunError, StorageError
from phikit.base.files import storage_errors, write_atomic
from phikit.base.run import Run


class Tiny(Config):
    steps: int = 3


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path):
    target = tmp_path / "a.txt"
    write_atomic(target, "one")
    write_atomic(target, b"two")
    assert target.read_text() == "two"
    assert list(tmp_path.iterdir()) == [target]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "a.txt"
    write_atomic(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ('IoError(Os { code: 28, kind: StorageFull, message: "..." })', "disk is full"),
        ("Error while serializing: I/O error: No space left (os error 28)", "disk is full"),
        ("Error while serializing: I/O error: Permission denied (os error 13)", "not allowed"),
    ],
)
def test_storage_errors_reads_safetensors_messages(tmp_path: Path, message: str, words: str):
    with pytest.raises(StorageError, match=words), storage_errors(tmp_path):
        raise SafetensorError(message)
    with pytest.raises(SafetensorError), storage_errors(tmp_path):
        raise SafetensorError("InvalidHeader")
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "absent").read_text()


@pytest.mark.parametrize("place", ["file/run", "absent/file.txt", "file", "x" * 300])
def test_a_place_where_nothing_can_be_is_a_storage_error(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("")
    path = tmp_path / place
    with pytest.raises(StorageError, match=f"cannot write {path}"), storage_errors(path):
        path.mkdir()


def test_run_round_trip(tmp_path: Path):
    made = Run.create(tmp_path / "deep" / "run", Tiny(), kind="train")
    opened = Run.open(made.path)
    assert opened.config == {"steps": 3} and opened.kind == "train"
    assert opened.checkpoints.is_dir() and opened.samples.is_dir()
    record = json.loads((made.path / "config.json").read_text())
    assert record["phikit"] == phikit.__version__


def test_run_is_never_overwritten(tmp_path: Path):
    Run.create(tmp_path / "run", Tiny(), kind="train")
    with pytest.raises(RunError, match="already holds") as caught:
        Run.create(tmp_path / "run", Tiny(), kind="train")
    assert "--resume" in str(caught.value)


def test_not_a_run_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(RunError, match=r"is not a run: looked for .*config\.json"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Phi3ForCausalLM"]}')
    with pytest.raises(RunError, match="lacks the fields"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(RunError, match="lacks the fields"):
        Run.open(tmp_path)


def test_errors_show_the_next_step():
    assert str(RunError("bad")) == "bad"
    assert str(RunError("bad", fix="do this")) == "bad\n  Next: do this"
    assert 'pip install "phikit[eval]"' in str(MissingExtraError("math_verify", "eval"))
