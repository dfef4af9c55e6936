"""`phikit pull` against a hub on this machine, which counts what it is asked for."""

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Shell = Callable[..., subprocess.CompletedProcess[str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the model `ID`.

    Attributes:
        sent: names of the files whose content was asked for, in order.
        cut: the name of a file whose next transfer breaks off in the middle.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.sent: list[str] = []
        self.cut: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class Answer(BaseHTTPRequestHandler):
    """The four requests that a download makes."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.removeprefix(f"/{ID}/resolve/{COMMIT}/")
        file = self.server.folder / name
        if path.startswith(f"/api/models/{ID}/revision/"):
            self._json({"id": ID, "sha": COMMIT, "siblings": []})
        elif path.startswith(f"/api/models/{ID}/tree/"):
            self._json([self._entry(file) for file in self.server.files()])
        elif name != path and file.is_file():
            self._file(file, name, with_body=with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _entry(self, file: Path) -> dict[str, Any]:
        path = file.relative_to(self.server.folder).as_posix()
        content = file.read_bytes()
        return {"type": "file", "path": path, "size": len(content), "oid": etag(content)}

    def _file(self, file: Path, name: str, *, with_body: bool) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not with_body:
            self._send(200, b"", headers | {"Content-Length": str(len(content))})
            return
        self.server.sent.append(name)
        first = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        body = content[first:]
        headers["Content-Length"] = str(len(body))
        if self.server.cut == name:
            body = body[: len(body) // 2]
            self.close_connection = True
        self._send(206 if first else 200, body, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(random_model: Callable[[int], Path]) -> Iterator[Hub]:
    folder = random_model(160)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a stranger')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    (folder / "README.md").write_text("# tiny")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "small.gguf").write_bytes(b"GGUF")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def phikit(hub: Hub, shell: Shell, tmp_path: Path) -> Shell:
    """Runs a command whose hub is ours and whose cache is empty."""

    def run(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        return shell(*arguments, **places, **more)

    return run


def test_pull_fetches_what_a_model_needs_and_says_where_it_is(phikit: Shell, hub: Hub):
    before = phikit("pull", ID, "--offline")
    assert before.returncode == 1
    assert f"{ID} is not on this machine" in before.stderr
    assert hub.sent == []

    done = phikit("pull", ID)
    assert done.returncode == 0, done.stderr
    wanted = {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model.safetensors"),
    }
    assert set(hub.sent) == wanted
    assert "6 files to fetch" in done.stderr
    place = Path(done.stdout.strip())
    assert {path.name for path in place.iterdir()} == wanted

    again = phikit("pull", ID)
    assert again.returncode == 0 and len(hub.sent) == len(wanted)
    assert "0 files to fetch" in again.stderr
    offline = phikit("pull", ID, "--offline")
    assert offline.stdout == again.stdout == done.stdout
    said = phikit("generate", ID, "Hello", "--max-new-tokens", 3)
    assert said.returncode == 0, said.stderr


def test_an_interrupted_fetch_goes_on(phikit: Shell, hub: Hub):
    hub.cut = "model.safetensors"
    stopped = phikit("pull", ID, HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith("  Next: run the same command again")
    partial = phikit("pull", ID, "--offline")
    assert partial.returncode == 1 and "only a part" in partial.stderr
    hub.cut = None
    hub.sent.clear()
    done = phikit("pull", ID)
    assert done.returncode == 0, done.stderr
    assert set(hub.sent) == {"model.safetensors"}
    assert phikit("show", ID).returncode == 0


def test_one_file_alone(phikit: Shell, hub: Hub):
    done = phikit("pull", ID, "--file", "small.gguf")
    assert done.returncode == 0, done.stderr
    assert hub.sent == ["small.gguf"]
    assert Path(done.stdout.strip()).read_bytes() == b"GGUF"
    absent = phikit("pull", ID, "--file", "large.gguf")
    assert absent.returncode == 1 and "no file large.gguf" in absent.stderr


def test_what_the_hub_does_not_have(phikit: Shell):
    for name, words in (("someone/else", "the hub has no model"), ("a b/c", "neither a folder")):
        failed = phikit("pull", name)
        assert failed.returncode == 1, failed.stdout
        assert words in failed.stderr and "  Next: " in failed.stderr
        assert "Traceback" not in failed.stderr


def test_no_hub_at_all(shell: Shell, tmp_path: Path):
    failed = shell("pull", ID, HF_ENDPOINT="http://127.0.0.1:1", HF_HOME=str(tmp_path))
    assert failed.returncode == 1 and f"could not fetch {ID}" in failed.stderr
