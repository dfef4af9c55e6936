import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from phikit.base.places import cache_folder, data_folder
from phikit.base.servers import announced, running


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_server_is_listed_while_it_lives():
    assert running() == []
    with announced("http://127.0.0.1:1", ["a", "b"]):
        [server] = running()
        assert (server.pid, server.url, server.models) == (
            os.getpid(),
            "http://127.0.0.1:1",
            ["a", "b"],
        )
    assert running() == []


def test_files_of_dead_servers_and_strangers_are_removed():
    ended = subprocess.Popen(["true"])
    ended.wait()
    with announced("http://127.0.0.1:1", []):
        folder = cache_folder() / "servers"
        gone = {"pid": ended.pid, "url": "u", "models": [], "started": 0.0}
        (folder / "1.json").write_text(json.dumps(gone))
        (folder / "2.json").write_text("no JSON")
        (folder / "3.json").write_text('{"pid": 1}')
        assert [server.pid for server in running()] == [os.getpid()]
        assert len(list(folder.iterdir())) == 1


def test_a_folder_that_cannot_be_written_stops_no_server(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with announced("http://127.0.0.1:1", []):
        pass


def test_folders_are_the_owners_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_DATA_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".local/share/phikit"
    assert stat.S_IMODE(data_folder().stat().st_mode) == 0o700
