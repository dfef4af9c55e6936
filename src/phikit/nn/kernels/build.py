"""Compiles `kernels.cpp` for this CPU, once, into the user's cache folder.

The library is named after everything that decides its contents (sources, flags, compiler, CPU), so
that an update or another machine on the same home compiles anew. It is written under another name
and then renamed: two processes that compile at once do the work twice and do not meet.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from phikit.base.errors import PhikitError, StorageError
from phikit.base.files import replacing

SOURCES = Path(__file__).parent
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w"),
    "-ffp-contract=fast",  # a * b + c in one instruction, which -std=c++17 turns off
    "-fno-math-errno",  # square roots in line; nobody reads errno
    "-fno-trapping-math",  # branches become selects; nobody traps
    # Two libraries in one process, native and portable, must not share their static variables, as
    # those of templates otherwise are.
    "-fvisibility=hidden",
)
"""Never -ffast-math: infinities and NaN keep their meaning and sums their order."""
TIMEOUT_S = 300

_log = logging.getLogger("phikit.nn.kernels")


class BuildError(PhikitError):
    """The kernels cannot be compiled here; says why."""


def cache_folder() -> Path:
    """Where compiled kernels lie, `$XDG_CACHE_HOME` or `~/.cache` followed by `phikit`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "phikit"


def find_library(*, portable: bool = False) -> tuple[Path, float]:
    """The compiled kernels for this machine, and the seconds it took to make them (0 if cached).

    `portable` leaves out the instructions that C++ has no words for.

    Raises:
        BuildError: there is no compiler, it fails, or the cache folder cannot be written.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *(["-DPHIKIT_PORTABLE"] if portable else []))
    library = cache_folder() / f"kernels-{_fingerprint(compiler, flags)}.so"
    if library.exists():
        return library, 0.0
    started = time.monotonic()
    _log.info("compiling the CPU kernels with %s, once; this takes about ten seconds", compiler[0])
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(library) as temporary:
            _run([*compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", str(temporary)])
    except (OSError, StorageError) as error:
        raise BuildError(f"cannot write {library}: {error}") from error
    return library, time.monotonic() - started


def find_compiler() -> list[str]:
    """The command of the C++ compiler: `$CXX`, or else g++ or clang++ of the path."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (command := shlex.split(name)) and shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler was found (looked for $CXX, g++, clang++)")


def _fingerprint(compiler: list[str], flags: tuple[str, ...]) -> str:
    sources = sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")))
    command = " ".join((*compiler, *flags)).encode()
    version = _run([*compiler, "--version"])
    parts = [*(path.read_bytes() for path in sources), command, version, _cpu().encode()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """What tells CPUs of different instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _run(command: list[str]) -> bytes:
    """Standard output of the command; BuildError with its last words if it fails."""
    try:
        done = subprocess.run(  # noqa: S603  (the user's own compiler, no shell)
            command, capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise BuildError(f"{command[0]} failed: {words[-1] if words else done.returncode}")
    return done.stdout
