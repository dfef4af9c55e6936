"""`phikit serve` in a process of its own: whom it talks to, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from phikit.chat.render import renderer_for
from phikit.serve.keys import VARIABLE
from phikit.weights.load import Loaded
from phikit.weights.save import save

WATCHED = """
import json, os, sys

log = open(os.environ["SOCKET_LOG"], "a", buffering=1)
# Which argument of the audit event says whom it is about.
wanted = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.bind": 1,
          "socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.getnameinfo": 0}

def note(event, args):
    if event in wanted:
        print(json.dumps([event, repr(args[wanted[event]])]), file=log)

sys.addaudithook(note)
from phikit.cli import main

main()
"""
ASK: Any = [{"role": "user", "content": "What is 12 + 7?"}]


@pytest.fixture(scope="module")
def served(tiny_model, nano_tokenizer, tmp_path_factory) -> Iterator[Any]:
    """A server of a small model, every use of a socket of which is written down."""
    folder = tmp_path_factory.mktemp("served")
    save(
        folder / "tiny",
        Loaded(tiny_model(), nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini")),
    )
    log = folder / "sockets"
    environment = {
        **os.environ,
        "SOCKET_LOG": str(log),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        VARIABLE: "",
    }
    command = [sys.executable, "-c", WATCHED, "serve", str(folder / "tiny"), "--port", "0"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("tiny on http://127.0.0.1:"), process.communicate()
    yield process, line.split()[2].removesuffix("/v1"), log
    process.kill()
    process.wait()


def test_no_socket_leaves_this_machine_and_sigterm_lets_replies_finish(served):
    process, url, log = served
    with httpx2.Client(base_url=url, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        remote = [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/cat.png"}}]
        body = {"model": "tiny", "messages": [{"role": "user", "content": remote}]}
        assert client.post("/v1/chat/completions", json=body).status_code == 400
        for path in ("/metrics", "/openapi.json", "/api/tags", "/health"):
            assert client.get(path).status_code == 200
        embedding = client.post("/v1/embeddings", json={"model": "tiny", "input": "What is"})
        assert len(embedding.json()["data"][0]["embedding"]) == 48
        asked = {"model": "tiny", "messages": ASK, "stream": True, "max_tokens": 60, "n": 4}
        with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        ends = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest[:-1]]
        assert len([reason for reason in ends if reason]) == 4
    started = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert process.returncode == 0 and output == ""
    assert errors.strip() == "stopped"
    used = [json.loads(line) for line in log.read_text().splitlines()]
    assert ["socket.bind", repr(("127.0.0.1", 0))] in used
    elsewhere = [(event, what) for event, what in used if "127.0.0.1" not in what]
    assert not elsewhere


def test_other_machines_need_a_key_or_insistence(tmp_path, capfd):
    from phikit.base.errors import ConfigError
    from phikit.cli.serve import _policy
    from phikit.serve.keys import Keys

    with pytest.raises(ConfigError, match="no API keys"):
        _policy("0.0.0.0", Keys(), [], without_keys=False)
    assert _policy("0.0.0.0", Keys(["x" * 16]), [], without_keys=False).hosts is None
    assert capfd.readouterr().err == ""
    assert _policy("0.0.0.0", Keys(), [], without_keys=True).hosts is None
    assert "anybody" in capfd.readouterr().err
    assert "::1" in (_policy("::1", Keys(), [], without_keys=False).hosts or ())
