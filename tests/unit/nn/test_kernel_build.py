"""How the kernels' library is found, built once, shared with torch's threads, and switched off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phikit.nn.kernels import build

SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from phikit.nn import kernels
print("touched" if kernels.build.cache_folder().exists() else "untouched")
with torch.inference_mode():
    print(kernels.ready(torch.zeros(1)))
print(kernels.status())
maps = open("/proc/self/maps").read() if sys.platform == "linux" else "libgomp"
print(len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}))
"""


class Process:
    """A fresh interpreter that uses the kernels once."""

    def __init__(self, cache: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self) -> None:
        out, self.errors = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, self.errors
        self.after_import, self.ready, self.status, self.runtimes = out.splitlines()


@pytest.fixture
def quick(tmp_path: Path) -> str:
    """The compiler without its optimisations, which take most of its time."""
    try:
        command = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    script = tmp_path / "quick"
    script.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def test_two_processes_build_at_once(tmp_path: Path, quick: str):
    cache = tmp_path / "cache"
    processes = [Process(cache, CXX=quick) for _ in range(2)]
    for process in processes:
        process.finish()
        assert (process.ready, process.runtimes) == ("True", "1")
        assert "compiled the CPU kernels" in process.errors
    assert "untouched" in {process.after_import for process in processes}
    [library] = (cache / "phikit").iterdir()  # and no temporary file
    assert processes[0].status == f"native ({library})"
    assert (cache / "phikit").stat().st_mode & 0o777 == 0o700

    later = Process(cache, CXX=quick)
    later.finish()
    assert later.ready == "True" and not later.errors


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PATH": "", "CXX": ""}, "no C++ compiler was found"),
        ({"CXX": "false"}, "false failed"),
        ({"CXX": "false", "PHIKIT_KERNELS": "off"}, ""),
    ],
)
def test_without_kernels_torch_runs(tmp_path: Path, environment: dict[str, str], words: str):
    process = Process(tmp_path, **environment)
    process.finish()
    assert process.ready == "False" and process.status.startswith("off")
    assert words in process.status
    assert process.errors.count("\n") == (1 if words else 0) and words in process.errors


def test_a_folder_that_cannot_be_written(tmp_path: Path, quick: str):
    (tmp_path / "phikit").touch()
    process = Process(tmp_path, CXX=quick)
    process.finish()
    assert process.ready == "False" and "cannot write" in process.status


def test_an_unknown_choice_is_an_error(tmp_path: Path):
    process = Process(tmp_path, PHIKIT_KERNELS="fast")
    with pytest.raises(AssertionError, match="PHIKIT_KERNELS is 'fast'"):
        process.finish()
