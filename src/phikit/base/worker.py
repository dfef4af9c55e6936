"""Both ends of a worker process for work that may never end: a stranger's program, a hard sum.

The parent owns the wall clock: it sends a line, reads a line, and kills a worker that takes too
long. The worker limits its own memory and, in case its parent was killed, its processor time.
"""

import math
import subprocess
import threading
from typing import NamedTuple


class Answer(NamedTuple):
    """What a worker wrote: one line, empty if it ended or had to be killed."""

    line: str
    was_killed: bool


def exchange(process: subprocess.Popen[str], line: str, *, timeout_s: float) -> Answer:
    """Send a line and read one; a worker that takes longer than `timeout_s` is killed."""
    assert process.stdin is not None and process.stdout is not None
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout_s, expire)
    timer.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = ""
    finally:
        timer.cancel()
        timer.join()
    is_whole = reply.endswith("\n") and not expired.is_set()
    return Answer(reply if is_whole else "", expired.is_set())


def limit_memory(memory_bytes: int) -> None:
    """Bound this process's address space, and leave no core dumps; nothing on Windows."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_processor(timeout_s: float) -> None:
    """End this process after so many more seconds of processor time; nothing on Windows."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
