"""Runs a checkpoint's chat template in a process of its own, with limits.

Jinja's sandbox bounds a single `range` at 100,000 steps but neither loops within loops nor memory,
so a template can hang or fill whoever renders it. Here a kernel limit bounds its memory and a timer
kills it; measured: 0.1 s to start a process, 0.3 ms for a render after that.
"""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phikit.base.errors import ChatError
from phikit.base.worker import exchange
from phikit.chat.message import Message

_WORKER = Path(__file__).with_name("template_worker.py")
_START_S = 20.0
_MEMORY_BYTES = 512 << 20
MAX_TEMPLATE_CHARS = 1 << 20


class TemplateProcess:
    """One template, ready to render. The process starts when it is first needed.

    Args:
        template: jinja text.
        timeout_s: for one call of `render`.
        max_chars: of each rendered text.

    Raises:
        ChatError: the template is unreasonably long.
    """

    def __init__(
        self, template: str, *, timeout_s: float = 5.0, max_chars: int = 16_000_000
    ) -> None:
        if len(template) > MAX_TEMPLATE_CHARS:
            raise ChatError(
                f"the chat template has {len(template)} characters, at most {MAX_TEMPLATE_CHARS} "
                "are run",
                fix="name the renderer to use instead",
            )
        self.template = template
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    @property
    def running(self) -> bool:
        """Whether a process waits for work; none does before the first, and after a fatal one."""
        return self._process is not None and self._process.poll() is None

    def render(self, renders: Sequence[Mapping[str, Any]]) -> list[str]:
        """The template's text for each set of variables.

        Raises:
            ChatError: it fails, takes too long, or needs or writes too much.
        """
        request = json.dumps({"template": self.template, "renders": list(renders)}) + "\n"
        with self._lock:
            process = self._process
            if process is None or not self.running:
                process = self._start()
            line = exchange(process, request, timeout_s=self._timeout_s).line
        if not line:
            self.close()
            raise self._failed("it takes too long, or needs too much memory")
        reply = json.loads(line)
        if reply["error"] is not None:
            raise self._failed(reply["error"])
        return reply["texts"]

    def close(self) -> None:
        """End the process; another call of `render` starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _start(self) -> subprocess.Popen[str]:
        limits = [str(_MEMORY_BYTES), str(self._timeout_s), str(self._max_chars)]
        process = subprocess.Popen(  # noqa: S603 - our own script, no shell
            [sys.executable, "-P", str(_WORKER), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._process = process
        weakref.finalize(self, _end, process)
        if not exchange(process, "", timeout_s=_START_S).line:
            self.close()
            raise self._failed("the process for it does not start")
        return process

    def _failed(self, why: str) -> ChatError:
        return ChatError(
            f"the chat template cannot be rendered: {why}",
            fix="check the messages against the template, or name the renderer to use instead",
        )


def variables(messages: Sequence[Message], *, ask: bool, **given: str) -> dict[str, Any]:
    """What a chat template is given: plain messages, and whether the assistant is to speak next."""
    plain = [{"role": message.role, "content": message.content} for message in messages]
    defaults = {"bos_token": "", "eos_token": ""}
    return {"messages": plain, "add_generation_prompt": ask, **defaults, **given}


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with process:
        process.wait()
