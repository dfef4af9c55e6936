"""A tiny model, one objective of every kind, and the real loop: what the laws of training run."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from phikit.base.checkpoint import latest_checkpoint
from phikit.base.config import Config
from phikit.base.device import Rank
from phikit.base.metrics import Tracker
from phikit.base.progress import Progress
from phikit.base.run import Run
from phikit.base.types import Example
from phikit.chat.render import NANO_SPECIALS, PhiRenderer, Renderer
from phikit.chat.tokenizer import train_tokenizer
from phikit.data.problem import Problem, Provenance
from phikit.models.decoder import Decoder
from phikit.models.dense import DenseConfig, DenseModel
from phikit.solve.solver import Reply
from phikit.train.dpo import DPOConfig, DPOObjective, add_reference
from phikit.train.grpo import GRPOConfig, GRPOObjective
from phikit.train.lm import LMConfig, LMObjective
from phikit.train.loop import LoopConfig, Totals, train
from phikit.train.objective import Objective
from phikit.train.optim import OptimConfig
from phikit.train.sft import SFTConfig, SFTObjective

Kind = Literal["lm", "sft", "dpo", "grpo"]
KINDS: tuple[Kind, ...] = ("lm", "sft", "dpo", "grpo")
VOCABULARY = 256 + len(NANO_SPECIALS)
ROWS = 8
"""Rows, examples or pairs of one optimiser step; GRPO samples as many replies."""


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> DenseModel:
    """Two layers, shared key/value heads, random weights."""
    config = DenseConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        d_mlp=48,
        max_context=128,
        init_std=0.1,
    )
    return DenseModel(config).initialise(torch.Generator().manual_seed(seed)).to(dtype)


def examples(count: int, *, seed: int = 0) -> list[Example]:
    """Random tokens of random lengths; a random part at the end of each is learnt."""
    random = np.random.default_rng(seed)
    made = []
    for length in random.integers(4, 20, size=count):
        tokens = random.integers(7, VOCABULARY, size=length).astype(np.int32)
        made.append(Example(tokens=tokens, loss_mask=np.arange(length) >= random.integers(1, 4)))
    return made


def pairs(count: int, *, seed: int = 0) -> list[tuple[Example, Example]]:
    """Random chosen and rejected replies."""
    made = examples(2 * count, seed=seed)
    return list(zip(made[::2], made[1::2], strict=True))


def problems(count: int) -> list[Problem]:
    """Short questions."""
    nowhere = Provenance("test", "", "", "rl", "test", "1", 0, 0)
    return [
        Problem(f"{n} + {n}?", str(2 * n), None, None, None, f"sum {n}", nowhere)
        for n in range(count)
    ]


def coin(rated: Sequence[tuple[Problem, Reply]]) -> list[float]:
    """A reward that a random model meets half the time: +1 for an even sum of ids, else -1.

    Any reply to the first problem will do, so one group has nothing to teach.
    """
    return [
        1.0 if sum(reply.tokens) % 2 == 0 or problem.answer == "0" else -1.0
        for problem, reply in rated
    ]


def nano_renderer() -> Renderer:
    """Renders with a tokenizer of single bytes."""
    return PhiRenderer(train_tokenizer(["1"], size=VOCABULARY, specials=NANO_SPECIALS))


def grpo_config(**changes: object) -> GRPOConfig:
    """Two prompts a step, short replies."""
    values = {
        "prompts_per_step": 2,
        "group_size": ROWS // 2,
        "max_new_tokens": 16,
        "micro_rows": ROWS,
        "advantage": "group_mean",
    }
    return GRPOConfig.model_validate(values | changes)


def make_objective(
    kind: Kind, model: DenseModel, *, micro: int = ROWS, steps: int = 5, rank: Rank = Rank()
) -> Objective:
    """An objective of `ROWS` items a step, `micro` of them a forward pass."""
    if kind == "lm":
        lm = LMConfig(row_tokens=24, rows_per_step=ROWS, micro_rows=micro)
        return LMObjective(examples(40), lm, seed=1, rank=rank)
    if kind == "sft":
        sft = SFTConfig(examples_per_step=ROWS, micro_examples=micro)
        return SFTObjective(examples(20), sft, seed=1, rank=rank)
    if kind == "dpo":
        dpo = DPOConfig(pairs_per_step=ROWS, micro_pairs=micro)
        reference = add_reference(tiny_model(seed=9), pairs(12), micro_pairs=5)
        return DPOObjective(reference, dpo, seed=1, rank=rank)
    config = grpo_config(micro_rows=micro)
    return GRPOObjective(
        model, nano_renderer(), problems(6), coin, config, steps=steps, seed=1, rank=rank
    )


class Plan(Config):
    """What a law's run records as its config."""

    name: str = "law"


def start_run(folder: Path) -> Path:
    """Make an empty run there."""
    Run.create(folder, Plan(), kind="law")
    return folder


def train_in(
    folder: Path,
    model: Decoder,
    objective: Objective,
    *,
    optim: OptimConfig,
    steps: int,
    checkpoint_every: int = 100,
    trackers: list[Tracker] | None = None,
) -> Totals:
    """Train with the real loop in a new run folder, or go on in one that exists."""
    if not (folder / "config.json").exists():
        start_run(folder)
    return train(
        model,
        objective,
        LoopConfig(steps=steps, optim=optim, checkpoint_every=checkpoint_every),
        steps=steps,
        run=Run.open(folder),
        progress=Progress(console=Console(file=io.StringIO())),
        name="law",
        trackers=trackers,
    )


def gradient_of_step(folder: Path, model: DenseModel, objective: Objective) -> dict[str, Tensor]:
    """The gradient that the loop hands its optimiser in step 0; the weights stay as they are.

    With beta1 = 0 Adam's first moment is the gradient, and the checkpoint keeps it.
    """
    optim = OptimConfig(adam_lr=0.0, betas=(0.0, 0.95), clip_norm=None)
    train_in(folder, model, objective, optim=optim, steps=1)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    state = load_file(checkpoint / "optimiser.safetensors")
    prefix = "first/adam."
    return {k.removeprefix(prefix): v[0] for k, v in state.items() if k.startswith(prefix)}


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The run's metrics without the wall clock."""
    rows = Run.open(folder).metrics.read()
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


def assert_equal_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-6
) -> None:
    """Every tensor within `tolerance` of its expected value, which is not 0."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"{name} has no gradient: the comparison says nothing"
        off = float((found[name] - gradient).abs().max())
        assert off <= tolerance * max(1.0, scale), (name, off, scale)
