"""The two sides of `benchmarks.train`: phikit, and TRL's trainers on transformers models.

Every function here runs in a side's own process and imports what that side needs, nothing more, so
that memory can be compared. Both sides get the same weights, token ids, batch sizes, optimiser and
number of updates, and start every round from the same weights. The clock runs from the start of
training to the end of the last update: setting up, tokenising and saving are not counted.
"""

import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.duel import Outcome, Play

LEARNING_RATE, BETAS = 1e-4, (0.9, 0.95)
QUESTIONS, EXAMPLES, MODEL = "questions.json", "examples.json", "model"


@dataclass(frozen=True, slots=True)
class Job:
    """What one round does, and on what."""

    folder: Path
    """Where `prepare` left weights and data."""
    threads: int
    dtype: str = "float32"
    steps: int = 1
    examples_per_step: int = 24
    prompts_per_step: int = 64
    group_size: int = 8
    max_new_tokens: int = 128
    micro_rows: int = 64
    """Replies of one forward pass of the policy update."""
    peer: str = ""
    """How TRL is set up: attention, precision and generation, by the words of `PEERS`."""


PEERS = {
    "float32": ("sdpa", "eager"),
    "bfloat16": ("sdpa weights", "eager weights", "sdpa autocast", "eager autocast"),
}
"""TRL's variants: attention, and bfloat16 as weights or as autocast over float32 weights."""


def coin(tokens: Sequence[int]) -> float:
    """A reward that costs nothing and that any model meets half the time: both signs in a group."""
    return 1.0 if sum(map(int, tokens)) % 2 == 0 else -1.0


def _round_of(job: Job, name: str) -> list[Any]:
    rows = json.loads((job.folder / name).read_text())
    count = job.steps * (job.examples_per_step if name == EXAMPLES else job.prompts_per_step)
    return rows[:count]


# --- phikit -------------------------------------------------------------------------------------


def prepare(job: Job, model: str | None) -> None:
    """Leave the model and the data in `job.folder`; None makes the nano model, weights random."""
    import torch

    from phikit.chat.render import NANO_SPECIALS, renderer_for
    from phikit.chat.tokenizer import train_tokenizer
    from phikit.data.procedural import generate
    from phikit.models.dense import DenseModel
    from phikit.recipes.nano_reasoner import model as nano_model
    from phikit.weights.load import Loaded, load
    from phikit.weights.save import save

    count = job.steps * job.examples_per_step
    lessons = generate(seed=0, count=max(1000, count), split="train")
    if model is None:
        texts = [f"{p.question}\n{p.thinking}\n{p.solution}" for p in lessons]
        config = nano_model()
        tokenizer = train_tokenizer(texts, size=config.vocab_size, specials=NANO_SPECIALS)
        fresh = DenseModel(config).initialise(torch.Generator().manual_seed(0))
        loaded = Loaded(fresh, tokenizer, renderer_for(tokenizer, "phi4-mini"))
    else:
        loaded = load(model)
    save(job.folder / MODEL, loaded, dtype=torch.float32)
    examples = [loaded.renderer.example(p.messages()) for p in lessons[:count]]
    rows = [[e.tokens.tolist(), e.loss_mask.astype(int).tolist()] for e in examples]
    (job.folder / EXAMPLES).write_text(json.dumps(rows))
    asked = generate(seed=0, count=job.steps * job.prompts_per_step, split="rl")
    (job.folder / QUESTIONS).write_text(json.dumps([p.question for p in asked]))


class _Clock:
    """A tracker that remembers when the last step ended."""

    def __init__(self) -> None:
        self.started = self.ended = time.perf_counter()

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        self.ended = time.perf_counter()

    def close(self) -> None: ...


def _phikit_model(job: Job) -> Any:
    from phikit.base.device import parse_dtype, set_threads
    from phikit.weights.load import load

    set_threads(job.threads)
    return load(job.folder / MODEL, dtype=parse_dtype(job.dtype))


def _phikit_train(job: Job, model: Any, objective: Any) -> tuple[float, Any]:
    """Train in a folder that is thrown away; returns the seconds and the totals."""
    from rich.console import Console

    from phikit.base.config import Config
    from phikit.base.progress import Progress
    from phikit.base.run import Run
    from phikit.train.loop import LoopConfig, train
    from phikit.train.optim import OptimConfig

    optim = OptimConfig(adam_lr=LEARNING_RATE, betas=BETAS, clip_norm=1.0)
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock()
        totals = train(
            model,
            objective,
            LoopConfig(steps=job.steps, optim=optim, checkpoint_every=job.steps),
            steps=job.steps,
            run=Run.create(Path(folder) / "run", Config(), kind="benchmark"),
            progress=Progress(console=Console(file=io.StringIO())),
            name="benchmark",
            trackers=[clock],
        )
    return clock.ended - clock.started, totals


def phikit_sft(job: Job) -> Play:
    """`SFTObjective` in the loop, one micro-batch a step."""
    import numpy as np

    from phikit.base.types import Example
    from phikit.train.sft import SFTConfig, SFTObjective

    rows = _round_of(job, EXAMPLES)
    examples = [Example(np.array(ids, np.int32), np.array(mask, np.bool_)) for ids, mask in rows]
    config = SFTConfig(
        examples_per_step=job.examples_per_step, micro_examples=job.examples_per_step
    )

    def play() -> Outcome:
        loaded = _phikit_model(job)
        objective = SFTObjective(examples, config, seed=0)
        seconds, totals = _phikit_train(job, loaded.model, objective)
        return Outcome(totals.trained_tokens / seconds, {"tokens": totals.trained_tokens})

    return play


def phikit_grpo(job: Job) -> Play:
    """`GRPOObjective` in the loop, with TRL's advantage: reward over the group's deviation."""
    from phikit.data.problem import Problem, Provenance
    from phikit.solve.solver import Reply
    from phikit.train.grpo import GRPOConfig, GRPOObjective

    nowhere = Provenance("benchmark", "", "", "rl", "", "", 0, 0)
    problems = [
        Problem(question, "0", None, None, None, question, nowhere)
        for question in _round_of(job, QUESTIONS)
    ]
    config = GRPOConfig(
        prompts_per_step=job.prompts_per_step,
        group_size=job.group_size,
        max_new_tokens=job.max_new_tokens,
        micro_rows=job.micro_rows,
        final_temperature=1.0,
        advantage="group_std",
    )

    def reward(pairs: Sequence[tuple[Problem, Reply]]) -> list[float]:
        return [coin(reply.tokens) for _, reply in pairs]

    def play() -> Outcome:
        loaded = _phikit_model(job)
        objective = GRPOObjective(
            loaded.model, loaded.renderer, problems, reward, config, steps=job.steps, seed=0
        )
        seconds, totals = _phikit_train(job, loaded.model, objective)
        sampled = totals.generated_tokens / job.steps
        return Outcome(3600 * job.steps / seconds, {"sampled_tokens": sampled})

    return play


# --- TRL ----------------------------------------------------------------------------------------


def _trl_model(job: Job) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    torch.set_num_threads(job.threads)
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    words = job.peer.split()
    folder = job.folder / MODEL
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if "weights" in words else torch.float32,
        attn_implementation=words[0],
    )
    return model, AutoTokenizer.from_pretrained(folder)


def _trl_options(job: Job) -> dict[str, Any]:
    """What SFTConfig and GRPOConfig share; whatever costs time and is not training is off."""
    return {
        "output_dir": str(job.folder / "trl"),
        "max_steps": job.steps,
        "learning_rate": LEARNING_RATE,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": "autocast" in job.peer.split(),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def _trl_train(trainer: Any) -> float:
    """Train and return the seconds from the start of training to the end of the last step."""
    from transformers import PrinterCallback, TrainerCallback

    class Clock(TrainerCallback):
        started = ended = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock.ended - clock.started


def trl_sft(job: Job) -> Play:
    """SFTTrainer on rows that are tokenised already, loss on the replies alone, no packing."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    rows = [{"input_ids": ids, "completion_mask": mask} for ids, mask in _round_of(job, EXAMPLES)]
    tokens = sum(len(row["input_ids"]) for row in rows)

    def play() -> Outcome:
        model, tokenizer = _trl_model(job)
        config = SFTConfig(
            **_trl_options(job),
            per_device_train_batch_size=job.examples_per_step,
            completion_only_loss=True,
            max_length=None,
        )
        trainer = SFTTrainer(
            model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        seconds = _trl_train(trainer)
        return Outcome(tokens / seconds, {"tokens": tokens})

    return play


def trl_grpo(job: Job) -> Play:
    """GRPOTrainer with its own sampling; one update per batch of rollouts, no KL term."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from datasets import Dataset, disable_progress_bars
    from trl import GRPOConfig, GRPOTrainer

    disable_progress_bars()
    rows = [
        {"prompt": [{"role": "user", "content": question}]}
        for question in _round_of(job, QUESTIONS)
    ]
    replies = job.prompts_per_step * job.group_size
    micro = min(job.micro_rows, replies)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [coin(ids) for ids in completion_ids]

    def play() -> Outcome:
        model, tokenizer = _trl_model(job)
        config = GRPOConfig(
            **_trl_options(job),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=replies // micro,
            steps_per_generation=replies // micro,
            num_generations=job.group_size,
            max_completion_length=job.max_new_tokens,
            temperature=1.0,
            use_transformers_continuous_batching="continuous" in job.peer.split(),
        )
        trainer = GRPOTrainer(
            model,
            args=config,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        seconds = _trl_train(trainer)
        lengths = [
            log["completions/mean_length"] for log in trainer.state.log_history if "loss" in log
        ]
        sampled = replies * sum(lengths) / len(lengths)
        return Outcome(3600 * job.steps / seconds, {"sampled_tokens": sampled})

    return play
