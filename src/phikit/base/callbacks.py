"""C libraries that call back into Python, where Ctrl-C must not arrive.

Python raises KeyboardInterrupt in the main thread, wherever that is. In a function that C code has
called, the exception is printed and forgotten, and the C code goes on without what the function was
to do: a sound loses samples, a sound file seems damaged, and nobody stops.
"""

import threading
import time
from _thread import start_new_thread
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.001


def out_of_reach(work: Callable[[], T]) -> T:
    """What `work` returns or raises, done in a thread that no signal reaches.

    Ctrl-C in the meantime is raised here, once the work has ended: C code is not to be cut off by
    the end of the process. The locks of `threading.Thread` are Python's own, in which an
    interruption does harm as well; those used here are C's.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    ended: list[tuple[Any, BaseException | None]] = []
    bell: SimpleQueue[None] = SimpleQueue()

    def run() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:
            ended.append((None, error))
        bell.put(None)

    start_new_thread(run, ())
    try:
        bell.get()
    except BaseException:
        while not ended:
            time.sleep(POLL_SECONDS)
        raise
    [(made, error)] = ended
    if error is not None:
        raise error
    return made
