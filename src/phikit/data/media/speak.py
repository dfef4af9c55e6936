"""Text to speech without a network: espeak-ng, out of the package that bundles its library.

espeak-ng is a formant synthesiser: robotic, and fast (a few milliseconds a clip). A voice is a
speaker of its collection in one accent; pitch and pace vary from clip to clip. Speakers of the test
set are never heard in training.

The library breathes by random numbers, its own (which begin with the time of day) and the C
library's, and keeps state from clip to clip, so the same words never sound the same twice. Here
every clip is made by a freshly loaded library with both of them set: the same arguments give the
same samples, in any order, in any process and at any time.
"""

import _ctypes
import ctypes
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phikit.base.callbacks import out_of_reach
from phikit.base.errors import DataError, MissingExtraError
from phikit.chat.audio import RATE_HZ
from phikit.data.media.style import styles_of
from phikit.data.split import Split

Samples = NDArray[np.float32]
"""Mono, at 16 kHz, between -1 and 1."""

# fmt: off
SPEAKERS = (
    "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique", "Hugo",
    "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Nguyen", "Reed", "Storm", "adam",
    "anika", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "ed", "edward",
    "f1", "f2", "f3", "f4", "f5", "ian", "iven", "john", "linda", "m1", "m2", "m3", "m4", "m5",
    "m6", "m7", "m8", "marcelo", "max", "michel", "miguel", "norbert", "pablo", "paul", "pedro",
    "quincy", "rob", "robert", "sandro", "shelby", "steph", "travis", "victor", "zac",
)
"""Of the collection, those that people understand: no whispers, robots or demons."""
# fmt: on
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029")
"""As espeak-ng calls them; "en" is British."""

_SYNCHRONOUS, _UTF8, _CHARACTERS = 2, 1, 1
_RATE, _PITCH = 1, 3
_SEED = 1
_lock = threading.Lock()  # the library has one state for all
_Heard = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Voice(NamedTuple):
    """How one clip is spoken."""

    speaker: str
    accent: str
    pitch: int
    """0 to 99, 50 being the speaker's own."""
    words_per_minute: int

    @property
    def names(self) -> tuple[str, ...]:
        """What must not be shared between splits."""
        return (f"voice:{self.speaker}",)


def draw_voice(random: np.random.Generator, split: Split) -> Voice:
    """A speaker of the split, in any accent, at a pitch and a pace near the usual."""
    speakers = styles_of(split, "voice", SPEAKERS)
    return Voice(
        speaker=speakers[int(random.integers(len(speakers)))],
        accent=ACCENTS[int(random.integers(len(ACCENTS)))],
        pitch=int(random.integers(35, 66)),
        words_per_minute=int(random.integers(130, 201)),
    )


def speak(text: str, voice: Voice) -> Samples:
    """The text, spoken.

    Runs where there is `dlclose`, on Linux and macOS.

    Raises:
        DataError: the library does not know the voice, or the text has neither letter nor digit.
        MissingExtraError: `espeakng-loader` or `soxr` is not installed.
    """
    try:
        import soxr
    except ImportError as error:
        raise MissingExtraError("soxr", "synth") from error
    if not any(letter.isalnum() for letter in text):
        raise DataError(f"there is nothing to say in {text!r}", fix="give it words")

    def synthesised() -> tuple[NDArray[np.int16], int]:
        with _lock:
            return _synthesise(text.encode(), voice)

    samples, rate_hz = out_of_reach(synthesised)
    resampled = soxr.resample(samples.astype(np.float32) / 32768, rate_hz, RATE_HZ)
    return np.asarray(resampled, np.float32)


def _synthesise(text: bytes, voice: Voice) -> tuple[NDArray[np.int16], int]:
    """Samples, and how many make a second."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise MissingExtraError("espeakng-loader", "synth") from error
    name, data = f"{voice.accent}+{voice.speaker}", Path(espeakng_loader.get_data_path())
    if not (data / "voices" / "!v" / voice.speaker).is_file():  # it would take its default voice
        raise DataError(f"espeak-ng has no voice {name!r}")
    library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
    rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), 0)
    if rate_hz <= 0:
        raise DataError("espeak-ng does not start", fix="install espeakng-loader again")
    heard: list[bytes] = []

    @_Heard
    def hear(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    try:
        if library.espeak_SetVoiceByName(name.encode()):
            raise DataError(f"espeak-ng has no voice {name!r}")
        library.espeak_SetSynthCallback(hear)
        library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        library.espeak_SetParameter(_RATE, voice.words_per_minute, 0)
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint,
            ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        ctypes.CDLL(None).srand(_SEED)
        library.espeak_Synth(text, len(text) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)
    return np.frombuffer(b"".join(heard), np.int16), rate_hz
