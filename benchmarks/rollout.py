"""Rollouts of reinforcement learning side by side with transformers' `generate`.

    python -m benchmarks.rollout [--rounds 5] [--threads 2] [--quick]

8 prompts of 128 tokens, 8 samples of each, 128 new tokens a sample, drawn at temperature 1 from
SmolLM2-135M in bfloat16. The sides take turns. What part of its time each spends on drawing tokens
is found by Python's profiler in a round of its own. Writes docs/results/rollout.json.
"""

import argparse
import cProfile
import json
import os
import pstats
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.duel import (
    Outcome,
    Play,
    Seat,
    Side,
    comparison,
    in_a_process,
    machine,
    table,
    take_turns,
)
from benchmarks.peers import ENVIRONMENT, transformers_model
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
TARGET = 2.5


@dataclass(frozen=True, slots=True)
class Job:
    """What a side does in each round; a profiled round tells the share of the sampler."""

    folder: Path
    threads: int
    prompts: int = 8
    samples: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 128
    is_profiled: bool = False

    @property
    def tokens(self) -> int:
        return self.prompts * self.samples * self.new_tokens


def main() -> None:
    """Take turns, profile once, print the table, write the record."""
    options = _options()
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="phikit-benchmark-") as folder:
        in_a_process(prepare, Path(folder))
        job = Job(Path(folder), options.threads)
        if options.quick:
            job = replace(job, prompts=2, samples=2, new_tokens=8)
        sides = [
            Side("phikit", phikit, job),
            Side("transformers", transformers, job, ENVIRONMENT),
        ]
        row = comparison(*take_turns(sides, rounds=options.rounds, console=console))
        row["sampler_shares"] = [sampler_share(side) for side in sides]
    console.print(table("rollout, bfloat16: tokens / s", {"": row}))
    ours, theirs = (f"{100 * share:.1f} %" for share in row["sampler_shares"])
    console.print(f"drawing tokens takes {ours} of phikit's time, {theirs} of transformers'")
    work = {key: value for key, value in asdict(job).items() if key not in ("folder", "threads")}
    about = {"machine": machine(("torch", "transformers")), "threads": options.threads}
    record = {**about, "job": work, "target": TARGET, "row": row}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {options.out}")


def prepare(folder: Path) -> None:
    """SmolLM2-135M in bfloat16 as a model folder."""
    import phikit as library
    from phikit.weights.save import save

    save(folder / "bf16", library.load("smollm2", dtype="bfloat16"))


def sampler_share(side: Side) -> float:
    """The part of a round that drawing tokens takes."""
    with Seat(side._replace(job=replace(side.job, is_profiled=True))) as seat:
        seat.play()
        return seat.play().facts["sampler_share"]


def phikit(job: Job) -> Play:
    """One call of the engine."""
    import phikit as library
    from phikit.base.device import set_threads
    from phikit.generate.request import Request

    set_threads(job.threads)
    engine = library.load(job.folder / "bf16").engine

    def roll_out(prompts: list[list[int]], seed: int) -> None:
        requests = [
            Request(prompt, job.new_tokens, num_samples=job.samples, seed=seed)
            for prompt in prompts
        ]
        replies = engine.generate(requests)
        assert sum(len(sample.tokens) for samples in replies for sample in samples) == job.tokens

    return _rounds(job, roll_out, sampler="generate/sample.py:sample")


def transformers(job: Job) -> Play:
    """One call of `generate`, which repeats each prompt for its samples."""
    import torch

    torch.set_num_threads(job.threads)
    model = transformers_model(job.folder / "bf16")

    def roll_out(prompts: list[list[int]], seed: int) -> None:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            num_return_sequences=job.samples,
            pad_token_id=0,
        )

    return _rounds(job, roll_out, sampler="torch.multinomial")


def _rounds(job: Job, roll_out: Callable[[list[list[int]], int], None], *, sampler: str) -> Play:
    """A `Play` with new prompts for each round, the same for both sides."""
    import numpy as np

    numbers = iter(range(1_000_000))

    def play() -> Outcome:
        number = next(numbers)
        draw = np.random.default_rng(number)
        prompts = draw.integers(1000, 40_000, (job.prompts, job.prompt_tokens)).tolist()
        if job.is_profiled:
            profile = cProfile.Profile()
            profile.runcall(roll_out, prompts, number)
            return Outcome(0.0, {"sampler_share": _share(profile, sampler)})
        started = time.perf_counter()
        roll_out(prompts, number)
        return Outcome(job.tokens / (time.perf_counter() - started), {})

    return play


def _share(profile: cProfile.Profile, function: str) -> float:
    """The part of all time that a function and what it calls took; "FILE:NAME" or "NAME"."""
    file, _, name = function.rpartition(":")
    stats: Any = pstats.Stats(profile)
    found = [
        cumulative
        for (path, _, known), (_, _, _, cumulative, _) in stats.stats.items()
        if path.endswith(file) and (known == name if file else name in known)
    ]
    assert found, f"{function} was never called"
    return sum(found) / stats.total_tt


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="counted rounds a side (5; 1 if quick)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the JSON record goes")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    folder = ROOT / ("bench-results" if options.quick else "docs/results")
    options.out = options.out or folder / "rollout.json"
    return options


if __name__ == "__main__":
    main()
