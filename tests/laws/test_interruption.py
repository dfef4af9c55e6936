"""Ctrl-C among C libraries that call back into Python: it stops the work, and damages none."""

import io
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from phikit.base.callbacks import out_of_reach
from phikit.chat.audio import read_samples
from phikit.data.media.speak import Voice, speak

ENOUGH, MOST_TRIALS = 20, 1000
WORDS = "how many circles are there, and how many squares are below them"


def spoken() -> np.ndarray:
    pytest.importorskip("espeakng_loader", reason="pip install phikit[synth]")
    return speak(WORDS, Voice("ed", "en", 50, 150))


def heard(form: str) -> Callable[[], np.ndarray]:
    soundfile = pytest.importorskip("soundfile", reason="pip install phikit[media]")
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 120_000)
    soundfile.write(file, noise, 22_050, format=form)
    return lambda: read_samples(file.getvalue())


@pytest.mark.parametrize("source", ["speech", "WAV", "FLAC", "OGG"])
def test_it_is_raised_or_the_samples_are_the_same(source: str):
    """At whatever moment it comes; an alarm stands for the key."""
    work = spoken if source == "speech" else heard(source)
    expected = work()
    started = time.perf_counter()
    work()
    lasts = time.perf_counter() - started
    times, raised = random.Random(0), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(MOST_TRIALS):
            try:
                signal.setitimer(signal.ITIMER_REAL, times.uniform(1e-4, lasts))
                found = work()
                if not signal.setitimer(signal.ITIMER_REAL, 0)[0]:
                    time.sleep(0.2)  # it has come, or another thread is about to pass it on
                    raise AssertionError("the interruption was lost")
                np.testing.assert_array_equal(found, expected)
            except KeyboardInterrupt:
                raised += 1
                if raised == ENOUGH:
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert raised == ENOUGH
    np.testing.assert_array_equal(work(), expected)


def test_errors_come_through():
    def fail() -> Any:
        raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        out_of_reach(fail)
    assert out_of_reach(lambda: out_of_reach(lambda: 7)) == 7
