"""Training side by side with TRL: the same weights, data, batches, updates, and threads.

    python -m benchmarks.train [--quick] [--rounds 5] [--threads 2] [--model FOLDER]
    python -m benchmarks.train --attention

SFT in tokens a second and GRPO in optimiser steps an hour (sampling, reward, update), in bfloat16
and in float32. TRL's variants (attention, kind of bfloat16) are tried first and the fastest enters
the rounds; its continuous batching is tried on request, as on a CPU it takes several times as long
and the memory of ten. The nano model has random weights unless `--model` names
a folder: its replies then nearly all run to the limit, the same work for both sides.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.attention import measure_attention
from benchmarks.duel import Side, comparison, fastest, in_a_process, machine, table, take_turns
from benchmarks.train_sides import (
    PEERS,
    Job,
    phikit_grpo,
    phikit_sft,
    prepare,
    trl_grpo,
    trl_sft,
)
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "trl", "accelerate")
UNITS = {"sft": "tokens / s", "grpo": "steps / hour"}
MAKERS = {"sft": (phikit_sft, trl_sft), "grpo": (phikit_grpo, trl_grpo)}


def main() -> None:
    """Run what was asked for, print the table, write the record."""
    options = _options()
    if options.attention:
        measure_attention(threads=options.threads, quick=options.quick)
        return
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="phikit-benchmark-") as folder:
        jobs = _jobs(Path(folder), options)
        longest = replace(jobs["grpo"], steps=max(job.steps for job in jobs.values()))
        in_a_process(prepare, longest, options.model)
        record: dict[str, Any] = {"machine": machine(PACKAGES), "threads": options.threads}
        for kind in options.only:
            rows = {}
            for dtype in options.dtypes:
                console.print(f"{kind}, {dtype}, {UNITS[kind]}")
                job = replace(jobs[kind], dtype=dtype)
                rows[dtype] = compare(
                    kind,
                    job,
                    rounds=options.rounds,
                    continuous=options.continuous,
                    console=console,
                )
            record[kind] = {"unit": UNITS[kind], "job": _plain(jobs[kind]), "rows": rows}
            console.print(table(f"{kind}: {UNITS[kind]}", rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {options.out}")


def compare(
    kind: str, job: Job, *, rounds: int, continuous: bool, console: Console
) -> dict[str, Any]:
    """phikit against the fastest variant of TRL."""
    ours, theirs = MAKERS[kind]
    trial = replace(
        job, steps=min(job.steps, 5), prompts_per_step=max(8, job.prompts_per_step // 4)
    )
    variants = [*PEERS[job.dtype]]
    if kind == "grpo" and continuous:
        variants += [f"{variant} continuous" for variant in variants if "sdpa" in variant]
    peers = [Side(f"TRL ({v})", theirs, replace(trial, peer=v)) for v in variants]
    best = fastest(peers, console=console)
    peer = best._replace(job=replace(job, peer=best.job.peer))
    results = take_turns([Side("phikit", ours, job), peer], rounds=rounds, console=console)
    return comparison(*results)


def _jobs(folder: Path, options: argparse.Namespace) -> dict[str, Job]:
    """The sizes of nano_reasoner's stages."""
    base = Job(folder, options.threads)
    if options.quick:
        small = {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 32, "micro_rows": 32}
        return {"sft": replace(base, steps=4), "grpo": replace(base, **small)}
    return {"sft": replace(base, steps=20), "grpo": base}


def _plain(job: Job) -> dict[str, Any]:
    left_out = ("folder", "dtype", "peer", "threads")
    return {key: getattr(job, key) for key in job.__slots__ if key not in left_out}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="counted rounds a side (5; 2 if quick)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", help="a model folder in place of the random nano model")
    parser.add_argument("--only", nargs="+", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--dtypes", nargs="+", choices=list(PEERS), default=["bfloat16", "float32"])
    parser.add_argument("--continuous", action="store_true", help="try TRL's continuous batching")
    parser.add_argument("--attention", action="store_true", help="explicit attention against SDPA")
    parser.add_argument("--out", type=Path, help="where the JSON record goes")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    folder = ROOT / ("bench-results" if options.quick else "docs/results")
    options.out = options.out or folder / "benchmark_train.json"
    return options


if __name__ == "__main__":
    main()
