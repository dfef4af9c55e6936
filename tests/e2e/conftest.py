"""The real commands, on a version of nano_reasoner that runs in seconds.

`shell` starts a process for each command, as a user does. Importing torch takes two seconds each
time, so most tests use `phikit`, which calls the same entry point within this process.
"""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.cli import main
from phikit.models.dense import DenseConfig, DenseModel
from phikit.weights.load import Loaded
from phikit.weights.save import save

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "phikit.cli")
ENVIRONMENT = {
    **os.environ,
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT / "src"),
    "COLUMNS": "200",
    "TERM": "dumb",
}

# One calculation with small numbers: after a hundred steps some rollouts are right by luck, which
# is all that the stages built on right and wrong rollouts need.
EASY = (
    '{"kind": "procedural", "count": %d, "families": ["arithmetic"], "steps": {"1": 1.0}, '
    '"level": {"max_result": 60, "max_factor": 4, "max_addend": 20}}'
)
SETTINGS = {
    "dtype": "float32",
    "threads": 1,
    "base.tokenizer_documents": 300,
    "base.tokenizer_traces": EASY % 40,
    "base.model": '{"vocab_size": 400, "d_model": 64, "num_layers": 2, "num_heads": 2, '
    '"num_kv_heads": 1, "head_dim": 32, "d_mlp": 128, "max_context": 160}',
    "stages.pretrain.documents": 300,
    "stages.pretrain.lm": '{"row_tokens": 64, "rows_per_step": 8, "micro_rows": 8}',
    "stages.pretrain.loop.steps": 12,
    "stages.pretrain.loop.checkpoint_every": 4,
    "stages.mid.source": EASY % 200,
    "stages.mid.lm": '{"row_tokens": 64, "rows_per_step": 8, "micro_rows": 4}',
    "stages.mid.loop.epochs": "null",
    "stages.mid.loop.steps": 120,
    "stages.mid.loop.checkpoint_every": 20,
    "stages.sft.source": EASY % 48,
    "stages.sft.sft": '{"examples_per_step": 16, "micro_examples": 8}',
    "stages.sft.loop.epochs": 4,
    "stages.sft.loop.checkpoint_every": 3,
    "stages.dpo.source": EASY % 40,
    "stages.dpo.max_new_tokens": 40,
    "stages.dpo.dpo.pairs_per_step": 4,
    "stages.dpo.dpo.micro_pairs": 2,
    "stages.dpo.loop.epochs": "null",
    "stages.dpo.loop.steps": 6,
    "stages.dpo.loop.checkpoint_every": 2,
    "stages.rl.source": EASY % 64,
    "stages.rl.grpo.prompts_per_step": 8,
    "stages.rl.grpo.group_size": 8,
    "stages.rl.grpo.max_new_tokens": 40,
    "stages.rl.grpo.micro_rows": 16,
    "stages.rl.grpo.selection": '{"candidates": 24, "samples": 4, "max_length_cv": null}',
    "stages.rl.loop.steps": 6,
    "stages.rl.loop.checkpoint_every": 2,
    "evaluation.source": EASY % 20,
    "evaluation.max_new_tokens": 40,
    "evaluation.samples": 2,
}


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Options that shrink nano_reasoner."""
    return tuple(part for path, value in SETTINGS.items() for part in ("--set", f"{path}={value}"))


@pytest.fixture
def phikit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one command in this process; `given` is its standard input."""

    def run(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
        line = ["phikit", *map(str, arguments)]
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", line)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return subprocess.CompletedProcess(line, int(end.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one command in a process of its own; `given` is its standard input."""

    def run(
        *arguments: object, given: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            input=given,
            capture_output=True,
            text=True,
            env={**ENVIRONMENT, **environment},
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process and returns at once; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT,
            # What a shell starts in the background ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def random_model(tmp_path: Path, nano_tokenizer: Tokenizer) -> Callable[[int], Path]:
    """Writes a model folder of random weights with a context of so many tokens."""

    def write(max_context: int) -> Path:
        config = DenseConfig(
            vocab_size=nano_tokenizer.size,
            d_model=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            d_mlp=32,
            max_context=max_context,
        )
        network = DenseModel(config).initialise(torch.Generator().manual_seed(0))
        loaded = Loaded(network, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
        save(tmp_path / "model", loaded)
        return tmp_path / "model"

    return write


@pytest.fixture(scope="session")
def finished(
    shell: Callable[..., subprocess.CompletedProcess[str]],
    tiny: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a tiny run that went through all stages unbroken."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = shell("run", "nano_reasoner", "--out", out, *tiny)
    assert done.returncode == 0, done.stdout + done.stderr
    return out
