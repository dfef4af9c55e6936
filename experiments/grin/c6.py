"""**Hypothesis.** Dropless experts cost little beside a dense model of the same active parameters:
GRIN reports 82 to 87 % of its throughput on 64 H100.

**Measure.** Whole training steps on this machine's CPU, all its cores, both models in processes
of their own that take turns: tokens a second of a mixture of 8 experts (two a token, half as
wide) over those of the dense model. Two sizes, each with 2,048 tokens a step: the nano line in
bfloat16, and twice its width in float32.

**Decision.** None: a CPU with two cores says nothing about an H100 with large matrices. The
ratio of medians and the ratios of single rounds are reported.
"""

import os
import time
from typing import Any, NamedTuple

from experiments.grin.claim import Claim, Verdict

ROUNDS, STEPS, ROWS, ROW_TOKENS = 7, 4, 16, 128


class Job(NamedTuple):
    """A model to train and how."""

    config: dict[str, Any]
    family: str
    dtype: str
    threads: int


def make(job: Job) -> Any:
    """A round: a few optimiser steps on random tokens."""
    import torch
    from benchmarks.duel import Outcome

    from phikit.base.device import parse_dtype
    from phikit.models.dense import DenseConfig
    from phikit.models.moe import MoEConfig
    from phikit.models.registry import build
    from phikit.nn.moe.session import RouterSession, RoutingConfig
    from phikit.train.lm import cross_entropy
    from phikit.train.optim import OptimConfig, Optimiser

    torch.set_num_threads(job.threads)
    kind = MoEConfig if job.family == "moe" else DenseConfig
    generator = torch.Generator().manual_seed(0)
    config = kind.resolve(job.config)
    model = build(config).initialise(generator).to(parse_dtype(job.dtype)).train()
    optimiser = Optimiser(model.named_parameters(), OptimConfig(adam_lr=1e-3, muon_lr=0.01))
    balanced = RoutingConfig(balance="global") if job.family == "moe" else RoutingConfig()
    session = RouterSession(model, balanced)
    tokens = torch.randint(config.vocab_size, (ROWS, ROW_TOKENS), generator=generator)
    batch = _batch(tokens)

    def play() -> Outcome:
        started = time.perf_counter()
        for step in range(STEPS):
            session.begin(step, batches=1, tokens=tokens.numel())
            with session.micro_batch(batch.is_text_BT):
                loss = cross_entropy(model, batch).total / tokens.numel()
            loss.backward()
            optimiser.accumulate()
            session.end()
            optimiser.clip()
            optimiser.step(1.0)
        return Outcome(STEPS * tokens.numel() / (time.perf_counter() - started), {})

    return play


def _batch(tokens: Any) -> Any:
    from experiments.grin.study import batch_of

    return batch_of(tokens.numpy())


def shapes(width: int) -> dict[str, dict[str, Any]]:
    """A dense config and one with experts, as plain data."""
    from phikit.recipes.grin_nano import beside, model

    moe, dense = model().model_dump(), beside().model_dump()
    factor = width // dense["d_model"]
    for config in (moe, dense):
        for key in ("d_model", "d_mlp", "num_heads", "num_kv_heads"):
            config[key] *= factor
    return {"moe": moe, "dense": dense}


def measure() -> tuple[dict[str, Any], Verdict]:
    from benchmarks.duel import Side, comparison, take_turns
    from rich.console import Console

    threads, figures = os.cpu_count() or 1, {}
    for width, dtype in ((192, "bfloat16"), (384, "float32")):
        console = Console()
        console.print(f"width {width}, {dtype}")
        sides = [
            Side(family, make, Job(config, family, dtype, threads))
            for family, config in shapes(width).items()
        ]
        moe, dense = take_turns(sides, rounds=ROUNDS, console=console)
        figures[f"width {width}, {dtype}"] = comparison(moe, dense)
    ratios = [f"{100 * row['ratio_of_medians']:.0f} % ({name})" for name, row in figures.items()]
    words = f"Experts train at {', '.join(ratios)} of the dense model's tokens a second."
    return {"threads": threads, "sizes": figures}, Verdict("reported", words, [])


CLAIM = Claim(
    number="C6",
    title="What dropless experts cost beside a dense model",
    words=__doc__ or "",
    measure=measure,
)
