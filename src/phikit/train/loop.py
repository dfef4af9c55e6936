"""The one training loop.

Read it aloud: get the step's micro-batches, sum their losses, divide once by the weight of all of
them over all ranks, step, log, now and then save. What a step does is a function of (weights,
optimiser state, step), so a run killed at any moment goes on to the same result.
"""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch.distributed as dist
from pydantic import PositiveInt, model_validator
from safetensors.torch import load_file, save_file

from phikit.base.checkpoint import latest_checkpoint, save_checkpoint, verify_checkpoint
from phikit.base.config import Config
from phikit.base.device import keep_memory
from phikit.base.errors import Interrupted, NumericsError
from phikit.base.metrics import Tracker
from phikit.base.progress import Progress
from phikit.base.run import Run
from phikit.models.decoder import Decoder
from phikit.nn.moe.session import RouterSession, RoutingConfig
from phikit.train.objective import Objective
from phikit.train.optim import OptimConfig, Optimiser
from phikit.weights.quantised import refuse_quantised


class LoopConfig(Config):
    """How long to train and how often to save."""

    steps: int | None = None
    """Optimiser steps; give either this or `epochs`."""
    epochs: float | None = None
    """Passes over the data."""
    optim: OptimConfig
    routing: RoutingConfig = RoutingConfig()
    """Of a mixture of experts."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

    def num_steps(self, steps_per_epoch: float) -> int:
        """Optimiser steps in all, given how many make one pass over the data."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * steps_per_epoch))


class Totals(NamedTuple):
    """What training cost so far, carried through every resume."""

    step: int = 0
    seconds: float = 0.0
    trained_tokens: int = 0
    generated_tokens: int = 0


def train(
    model: Decoder,
    objective: Objective,
    config: LoopConfig,
    *,
    steps: int,
    run: Run,
    progress: Progress,
    name: str,
    trackers: list[Tracker] | None = None,
    seed: int = 0,
) -> Totals:
    """Train to the last step, from the newest checkpoint of `run` if there is one.

    `seed` is that of the routers, if the model has any.

    Raises NumericsError when the loss is not finite, CheckpointError for a damaged checkpoint,
    WeightsError for a quantised model, ConfigError for routing that the model has not, and
    Interrupted on Ctrl-C, after saving.
    """
    refuse_quantised(model, "training it")
    keep_memory()
    session = RouterSession(model, config.routing, seed=seed)
    optimiser = Optimiser(model.named_parameters(), config.optim)
    totals = _resume(optimiser, session, run)
    progress.task(name, steps)
    progress.advance(totals.step)
    model.train()
    with closing(session), _stop_request() as stop_requested:
        while totals.step < steps:
            started = time.perf_counter()
            rate = config.optim.rate(totals.step, steps)
            metrics, trained = _step(
                model, objective, optimiser, session, step=totals.step, rate=rate
            )
            elapsed = time.perf_counter() - started
            totals = Totals(
                totals.step + 1,
                totals.seconds + elapsed,
                totals.trained_tokens + trained,
                totals.generated_tokens + int(metrics.get("generated_tokens", 0)),
            )
            metrics |= {"tokens": trained, "seconds": elapsed}
            if _is_first():
                run.metrics.write(totals.step, metrics)
                for tracker in trackers or ():
                    tracker.write(totals.step, metrics)
            shown = {key: metrics[key] for key in ("loss", "solved", "length") if key in metrics}
            work = trained + metrics.get("generated_tokens", 0)
            progress.advance(1, **shown, tokens_per_s=work / elapsed)
            is_last, is_stopping = totals.step == steps, stop_requested()
            if is_last or is_stopping or totals.step % config.checkpoint_every == 0:
                _save(optimiser, session, totals, run, keep=config.keep_checkpoints)
            if is_stopping:  # after the last step too: what follows is not what was asked for
                raise Interrupted(f"stopped by request after step {totals.step} of {name}; saved")
    model.eval()
    return totals


def _step(
    model: Decoder,
    objective: Objective,
    optimiser: Optimiser,
    session: RouterSession,
    *,
    step: int,
    rate: float,
) -> tuple[dict[str, float], int]:
    """One optimiser step; returns its metrics and the number of tokens trained on."""
    batches, metrics = objective.step_data(step)
    sizes = _over_ranks(
        {
            "weight": sum(map(objective.weight, batches)),
            "tokens": sum(batch.num_tokens for batch in batches),
        }
    )
    weight = sizes["weight"]
    sums: dict[str, float] = {"loss": 0.0}
    session.begin(step, batches=len(batches), tokens=int(sizes["tokens"]))
    for batch in batches:
        with session.micro_batch(batch.is_text_BT):
            total, extra = objective.loss(model, batch)
        if total.requires_grad:  # rows of text teach nothing to a model that only learns to see
            (total / weight).backward()
        optimiser.accumulate()
        for key, value in {"loss": total.detach(), **extra}.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    metrics = metrics | session.end()
    if weight:
        metrics |= {key: value / weight for key, value in _over_ranks(sums).items()}
        metrics["grad_norm"] = optimiser.clip()
        _check_finite(metrics, step)
        optimiser.step(rate)
    metrics["rate"] = rate
    return metrics, int(sizes["tokens"])


def _check_finite(metrics: dict[str, float], step: int) -> None:
    for key in ("loss", "grad_norm"):
        if not math.isfinite(metrics[key]):
            raise NumericsError(
                f"{key} became {metrics[key]} at step {step}",
                fix="lower optim.adam_lr and optim.muon_lr; the last checkpoint is sound",
            )


def _over_ranks(sums: dict[str, float]) -> dict[str, float]:
    """Every entry summed over all processes; one that had no batch lacks some entries."""
    if not dist.is_initialized():
        return sums
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, sums)
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0.0) for part in parts) for key in keys}


def _is_first() -> bool:
    """Whether this process writes the run folder."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _save(
    optimiser: Optimiser, session: RouterSession, totals: Totals, run: Run, *, keep: int
) -> None:
    def write(folder: Path) -> None:
        save_file(optimiser.state() | session.state(), folder / "optimiser.safetensors")
        (folder / "state.json").write_text(json.dumps(totals._asdict()))

    if _is_first():
        save_checkpoint(run.checkpoints, totals.step, write, keep=keep)


def _resume(optimiser: Optimiser, session: RouterSession, run: Run) -> Totals:
    checkpoint = latest_checkpoint(run.checkpoints)
    totals = Totals()
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
        state = load_file(checkpoint / "optimiser.safetensors")
        optimiser.load(state)
        session.load(state)
        totals = Totals(**json.loads((checkpoint / "state.json").read_text()))
    if _is_first():
        run.metrics.truncate(after_step=totals.step)
    return totals


@contextmanager
def _stop_request() -> Iterator:
    """Turn the first Ctrl-C into a request to stop after the step; a second one stops at once."""
    requested = False

    def ask(signum: int, frame: object) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)
