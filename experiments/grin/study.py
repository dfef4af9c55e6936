"""One run of a study: a tiny language model, one seed, one rate, in a folder of its own.

A run is a run folder of phikit: the loop saves checkpoints, and a run that was killed goes on to
the result of an unbroken one. Runs that differ in their seed alone draw other weights and another
order of the text; runs of one seed share both as far as their models allow, which is what makes
differences paired. What a finished run found is one file, `outcome.json`.

Every step trains on as many rows of each of the four domains. Losses are those of the deterministic
routing of evaluation, on held-out rows, in nats a token, every domain with the same weight.
"""

import io
import json
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from experiments.grin.data import DOMAINS, Data
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from phikit.base.config import Config, fingerprint
from phikit.base.files import write_atomic
from phikit.base.progress import Progress
from phikit.base.run import Run
from phikit.base.types import IGNORE, Batch
from phikit.data.loader import Loader, LoaderState
from phikit.evals.experts import routed
from phikit.models.decoder import Decoder
from phikit.models.dense import DenseModel
from phikit.models.registry import build
from phikit.nn.moe.balance import max_violation
from phikit.nn.moe.router import Routing
from phikit.nn.moe.session import RouterSession, RoutingConfig
from phikit.recipes.config import Architecture
from phikit.train.lm import cross_entropy
from phikit.train.loop import LoopConfig, train
from phikit.train.objective import LossOutput, StepData
from phikit.train.optim import OptimConfig
from phikit.weights.upcycle import UpcycleConfig, upcycle

LOOKS = 8
"""How often a run is measured on its way, at even distances."""
CHECKPOINTS = 4
"""How often a run is saved on its way."""
SAMPLED_PASSES = 4
"""Passes over the held-out rows with drawn routing, whose mean is the loss with sampling."""


class StudyConfig(Config):
    """A run, complete but for the folder."""

    model: Architecture
    routing: RoutingConfig = RoutingConfig()
    lr: float = 0.02
    """Muon's, which trains the matrices; Adam has the rest, routers included, at a fifth of it."""
    steps: int = 300
    rows_per_domain: int = 4
    """Rows of a step; four domains of 128 tokens make 2,048."""
    counts: Literal["step", "domain"] = "step"
    """Whether a micro-batch holds all domains, or each domain is a micro-batch, as on four ranks
    that see a domain each."""
    seed: int = 0
    start: "StudyConfig | None" = None
    """The run that this one goes on from; None starts from random weights."""
    upcycle: UpcycleConfig | None = None
    """How the start's dense model becomes the `model` of this run."""

    def resized(self, *, wider: int, longer: int) -> Self:
        """The run, and what it goes on from, so many times as wide and as long."""
        sizes = ("d_model", "d_mlp", "num_heads", "num_kv_heads")
        model = {size: wider * getattr(self.model, size) for size in sizes}
        changes = {
            "model": self.model.model_copy(update=model),
            "steps": longer * self.steps,
            "start": self.start and self.start.resized(wider=wider, longer=longer),
        }
        return self.model_copy(update=changes)


class Measured(NamedTuple):
    """One look at a model: loss by domain, and where its routers send what."""

    losses: list[float]
    load: list[list[list[float]]]
    """[layer][domain][expert], shares of the domain's assignments; empty for a dense model."""


class Domains:
    """The objective of a study: cross-entropy on rows of all domains, and looks at the held-out."""

    def __init__(self, config: StudyConfig, data: Data, model: Decoder) -> None:
        self.config, self.data, self.model = config, data, model
        self.loaders = [
            Loader(len(rows), seed=100 * config.seed + k) for k, rows in enumerate(data.train)
        ]
        self.first_step = config.start.steps if config.start else 0
        """Where in the text this run goes on."""
        self.look_steps = {round(k * config.steps / LOOKS) for k in range(LOOKS)}

    def step_data(self, step: int) -> StepData:
        count = self.config.rows_per_domain
        state = LoaderState((self.first_step + step) * count)
        parts = [
            rows[loader.take(state, count)[0]]
            for rows, loader in zip(self.data.train, self.loaders, strict=True)
        ]
        batches = [np.concatenate(parts)] if self.config.counts == "step" else parts
        metrics = {}
        if step in self.look_steps:
            metrics["held_out"] = float(np.mean(measure(self.model, self.data).losses))
            self.model.train()
        return StepData([batch_of(rows) for rows in batches], metrics)

    def weight(self, batch: Batch) -> float:
        return float((batch.targets_BT != IGNORE).sum())

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        return cross_entropy(model, batch)


def batch_of(rows: np.ndarray) -> Batch:
    """Full rows of one text each."""
    tokens_BT = torch.from_numpy(rows.astype(np.int64))
    ends_B1 = tokens_BT.new_full((len(tokens_BT), 1), IGNORE)
    return Batch(
        tokens_BT=tokens_BT,
        targets_BT=torch.cat([tokens_BT[:, 1:], ends_B1], 1),
        positions_BT=torch.arange(rows.shape[1]).expand(rows.shape),
        documents_BT=None,
        num_tokens=rows.size,
        extras={},
    )


def run(config: StudyConfig, runs: Path, data: Data) -> dict[str, Any]:
    """The outcome of a run in its folder under `runs`, which is trained if it has none yet."""
    folder = folder_of(config, runs)
    finished = outcome(config, runs)
    if finished is not None:
        return finished
    record = Run.open(folder) if (folder / "config.json").exists() else None
    record = record or Run.create(folder, config, kind="study")
    model, before = begin(config, runs, data)
    objective = Domains(config, data, model)
    optim = OptimConfig(
        adam_lr=config.lr / 5,
        muon_lr=config.lr,
        weight_decay=0.1,
        warmup=0.05,
        decay=0.5,
        final=0.05,
    )
    loop = LoopConfig(
        steps=config.steps,
        optim=optim,
        routing=config.routing,
        checkpoint_every=max(1, config.steps // CHECKPOINTS),
        keep_checkpoints=1,
    )
    progress = Progress(console=Console(file=io.StringIO()))
    totals = train(
        model, objective, loop, steps=config.steps, run=record, progress=progress,
        name="study", seed=config.seed,
    )  # fmt: skip
    found = measure(model, data)
    rows = record.metrics.read()
    looks = [[row["step"] - 1, row["held_out"]] for row in rows if "held_out" in row]
    result = {
        "loss": float(np.mean(found.losses)),
        "loss_sampled": sampled_loss(model, config, data),
        "losses": dict(zip(DOMAINS, found.losses, strict=True)),
        "curve": [*looks, [config.steps, float(np.mean(found.losses))]],
        "before": before,
        **balance_of(found),
        "single": _mean([row["router.single"] for row in rows if "router.single" in row]),
        "seconds": totals.seconds,
        "tokens": totals.trained_tokens,
    }
    # A tied head is the embedding under a second name, which a file would hold twice.
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    write_atomic(folder / "outcome.json", json.dumps(result) + "\n")
    shutil.rmtree(record.checkpoints)
    return result


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def folder_of(config: StudyConfig, runs: Path) -> Path:
    """Where a run lives: its fingerprint decides."""
    return runs / fingerprint(config)[:16]


def outcome(config: StudyConfig, runs: Path) -> dict[str, Any] | None:
    """What a finished run found."""
    path = folder_of(config, runs) / "outcome.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def begin(config: StudyConfig, runs: Path, data: Data) -> tuple[Decoder, dict[str, float] | None]:
    """The model before its first step, and what it was made of scored before and after."""
    generator = torch.Generator().manual_seed(config.seed)
    if config.start is None:
        return build(config.model).initialise(generator), None
    run(config.start, runs, data)
    start = build(config.start.model)
    weights = load_file(folder_of(config.start, runs) / "model.safetensors")
    missing, unknown = start.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}
    model = start
    if config.upcycle is not None:
        assert isinstance(start, DenseModel)
        model = upcycle(start, config.upcycle, generator=generator)
        assert model.config == config.model, "the plan states what upcycling makes"
    sides = {"start": start, "made": model}
    return model, {k: float(np.mean(measure(m, data).losses)) for k, m in sides.items()}


@torch.inference_mode()
def measure(model: Decoder, data: Data) -> Measured:
    """Loss and loads on the held-out rows, in evaluation mode."""
    model.eval()
    losses, load = [], []
    for rows in data.held_out:
        batch = batch_of(rows)
        with routed(model) as layers:
            losses.append(float(cross_entropy(model, batch).total) / rows[:, 1:].size)
        load.append([_shares(seen) for seen in layers])
    return Measured(losses, [list(of_layer) for of_layer in zip(*load, strict=True)])


@torch.no_grad()
def sampled_loss(model: Decoder, config: StudyConfig, data: Data) -> float | None:
    """The held-out loss with the drawn routing of training; None for a model that draws nothing."""
    session = RouterSession(model, config.routing, seed=config.seed)
    if not any(hasattr(router, "jitter_eps") for router in session.routers):
        return None
    losses = []
    for number in range(SAMPLED_PASSES):
        for rows in data.held_out:
            batch = batch_of(rows)
            session.begin(config.steps + number, batches=1, tokens=rows.size)
            with session.micro_batch(batch.is_text_BT):
                losses.append(float(cross_entropy(model, batch).total) / rows[:, 1:].size)
            session.end()
    session.close()
    return float(np.mean(losses))


def balance_of(found: Measured) -> dict[str, Any]:
    """MaxVio over all domains, mean of layers, and how alike the domains are routed.

    `similarity` is the mean cosine between the loads of two domains, over pairs and layers: 1 when
    all domains use experts alike.
    """
    if not found.load:
        return {"load": [], "max_vio": None, "similarity": None}
    loads_LGE = torch.tensor(found.load, dtype=torch.float64)
    worst = [float(max_violation(load_GE.mean(0))) for load_GE in loads_LGE]
    unit_LGE = torch.nn.functional.normalize(loads_LGE, dim=-1)
    cosines_LGG = unit_LGE @ unit_LGE.mT
    above = torch.ones(len(DOMAINS), len(DOMAINS)).triu(1).bool()
    return {
        "load": [[[round(x, 4) for x in e] for e in g] for g in found.load],
        "max_vio": float(np.mean(worst)),
        "similarity": float(cosines_LGG[:, above].mean()),
    }


def _shares(seen: list[Routing]) -> list[float]:
    """Shares of a layer's assignments that went to each expert."""
    load_E = sum(routing.stats.load_E() for routing in seen)
    assert isinstance(load_E, Tensor)
    return (load_E / load_E.sum()).tolist()


def seconds_of(config: StudyConfig, data: Data, *, steps: int = 12) -> float:
    """About what the run would take here and now by itself, from two short ones.

    Both look and save as often as a long run; so what they differ in is steps.
    """
    short, long = (_seconds(config, data, steps=count) for count in (steps, 2 * steps))
    return short + (long - short) * (config.steps - steps) / steps


def _seconds(config: StudyConfig, data: Data, *, steps: int) -> float:
    trial = config.model_copy(update={"steps": steps, "start": None, "upcycle": None})
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        run(trial, Path(folder), data)
        return time.perf_counter() - started
