"""One block of experts beside transformers' PhimoeSparseMoeBlock: forward, backward, memory.

    python -m benchmarks.moe [--quick] [--rounds 5] [--threads 2]

16 experts of 2,048 hidden units on a width of 1,024, two a token, 512 tokens, in training: routers
draw on both sides. Every side has a process of its own, and they take turns. Transformers runs as
it comes (a loop over experts), and with its `grouped_mm`; phikit as its training loop sets up a
process (`keep_memory`), and with its own loop over experts, which it takes where torch's grouped
product cannot run. Then every side is tried on hidden widths whose rows are no multiples of 16
bytes. Writes `docs/results/moe.json`.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.duel import MIB, Outcome, Play, Seat, Side, comparison, machine, table, take_turns
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
EXPERTS, CHOICES, TOKENS = 16, 2, 512
WIDTH, HIDDEN = 1024, 2048
PACKAGES = ("torch", "transformers")
DTYPES = ("float32", "bfloat16")
UNALIGNED = {"float32": 50, "bfloat16": 52}
"""Hidden widths of which a row is no multiple of 16 bytes."""
TARGETS = {"transformers": 8.0, "transformers, grouped_mm": 1.0}
"""How many times as fast as these phikit is wanted to be, forward and backward."""


class Job(NamedTuple):
    """What one side computes."""

    side: str
    dtype: str
    hidden: int
    backward: bool
    threads: int


def main() -> None:
    """Measure, print tables, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="one round, for a look")
    options = parser.parse_args()
    rounds, console = 1 if options.quick else options.rounds, Console()
    rows, targets = {}, []
    for dtype in DTYPES:
        for backward in (True, False):
            name = f"{dtype}, {'forward and backward' if backward else 'forward'}"
            console.print(name)
            jobs = [Job(side, dtype, HIDDEN, backward, options.threads) for side in MAKERS]
            sides = [Side(job.side, make, job) for job in jobs]
            ours, *others = take_turns(sides, rounds=rounds, console=console)
            found = {peer.name: comparison(ours, peer) for peer in others}
            console.print(table(f"{name}: blocks a second", found))
            rows[name] = found
            if backward:
                targets += [target(dtype, peer, found[peer]) for peer in TARGETS]
    record = {
        "machine": machine(PACKAGES),
        "threads": options.threads,
        "rounds": rounds,
        "comparisons": rows,
        "targets": targets,
        "unaligned": {side: unaligned(side, options.threads) for side in MAKERS},
    }
    for line in targets:
        console.print(line)
    console.print(record["unaligned"])
    if not options.quick:
        path = ROOT / "docs" / "results" / "moe.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {path}; `make docs` puts it into docs/benchmarks.md")


def markdown(results: Path) -> str:
    """The stored results as docs/benchmarks.md shows them."""
    if not results.exists():
        return "Not measured yet; `python -m benchmarks.moe` does.\n"
    record = json.loads(results.read_text(encoding="utf-8"))
    lines = [
        "| | side | ms, median | phikit is faster by | in rounds | peak memory, MiB |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for name, row in record["comparisons"].items():
        lines.append(_line(name, next(iter(row.values()))["sides"][0], ["", ""]))
        for found in row.values():
            low, high = found["ratios_of_rounds"]
            ratios = [f"{found['ratio_of_medians']:.2f}", f"{low:.2f}–{high:.2f}"]
            lines.append(_line("", found["sides"][1], ratios))
    wanted = ", ".join(
        f"{target['wanted']:.0f} times {target['peer']} in {target['dtype']} "
        f"({'met' if target['met'] else 'missed'})"
        for target in record["targets"]
    )
    failing = [
        f"{side} in {dtype}: `{words}`"
        for side, found in record["unaligned"].items()
        for dtype, words in found.items()
        if words != "runs"
    ]
    versions = ", ".join(f"{name} {record['machine'][name]}" for name in PACKAGES)
    words = f"Wanted, forward and backward: at least {wanted}. {record['rounds']} rounds, "
    words += f"{record['threads']} threads, {versions}. With hidden widths whose rows are no "
    words += f"multiples of 16 bytes these fail: {'; '.join(failing) or 'none'}."
    return "\n".join([*lines, "", words, ""])


def _line(name: str, side: dict[str, Any], ratios: list[str]) -> str:
    cells = [name, side["name"], f"{side['facts']['milliseconds']:.0f}", *ratios]
    return "| " + " | ".join([*cells, f"{side['peak_bytes'] / MIB:,.0f}"]) + " |"


def target(dtype: str, peer: str, row: dict[str, Any]) -> dict[str, Any]:
    """One wanted ratio and the measured one."""
    ratio = row["ratio_of_medians"]
    wanted = TARGETS[peer]
    return {"dtype": dtype, "peer": peer, "ratio": ratio, "wanted": wanted, "met": ratio >= wanted}


def unaligned(side: str, threads: int) -> dict[str, str]:
    """For each dtype whether the side runs, or how it fails."""
    found = {}
    for dtype, hidden in UNALIGNED.items():
        job = Job(side, dtype, hidden, backward=True, threads=threads)
        try:
            with Seat(Side(side, make, job)) as seat:
                seat.play()
            found[dtype] = "runs"
        except RuntimeError as error:
            found[dtype] = str(error).strip().splitlines()[-1]
    return found


def make(job: Job) -> Play:
    """A round: the block once, on the same input and weights on all sides."""
    import torch

    from phikit.base.device import parse_dtype

    torch.set_num_threads(job.threads)
    dtype = parse_dtype(job.dtype)
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_(job.backward)
    block, run = MAKERS[job.side](job)
    block.to(dtype).train().requires_grad_(job.backward)

    def play() -> Outcome:
        x.grad = None
        block.zero_grad()
        started = time.perf_counter()
        with torch.set_grad_enabled(job.backward):
            y = run(x)
            if job.backward:
                y.sum().backward()
        seconds = time.perf_counter() - started
        return Outcome(1 / seconds, {"milliseconds": 1e3 * seconds})

    return play


def fill(block: Any) -> Any:
    """The same weights on all sides, in the order of their shapes."""
    import torch

    for parameter in sorted(block.parameters(), key=lambda p: tuple(p.shape)):
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data.normal_(0, 0.02, generator=generator)
    return block


def phikit(job: Job) -> tuple[Any, Callable]:
    """Our block, its router in a session as in training."""
    import torch

    from phikit.base.device import keep_memory
    from phikit.nn.moe.block import MoE
    from phikit.nn.moe.experts import Experts
    from phikit.nn.moe.router import SparseMixerConfig, build_router
    from phikit.nn.moe.session import RouterSession, RoutingConfig

    keep_memory()
    router = build_router(SparseMixerConfig(), WIDTH, EXPERTS, top_k=CHOICES)
    block = fill(MoE(router, Experts(EXPERTS, WIDTH, job.hidden)))
    session = RouterSession(block, RoutingConfig())
    is_text = torch.ones(1, TOKENS, dtype=torch.bool)

    def run(x: Any) -> Any:
        session.begin(0, batches=1, tokens=TOKENS)
        with session.micro_batch(is_text):
            return block(x)

    return block, run


def phikit_loop(job: Job) -> tuple[Any, Callable]:
    """Ours with the loop that stands in for the grouped product."""
    from phikit.nn.moe import experts

    experts.can_group = lambda _: False  # this process measures nothing else
    return phikit(job)


def transformers(job: Job, implementation: str | None = None) -> tuple[Any, Callable]:
    """Theirs as `PhimoeConfig` sets it up for a block by itself."""
    from transformers import PhimoeConfig
    from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

    config = PhimoeConfig(
        hidden_size=WIDTH,
        intermediate_size=job.hidden,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOICES,
    )
    config._experts_implementation = implementation
    block = fill(PhimoeSparseMoeBlock(config))
    return block, block


def transformers_grouped(job: Job) -> tuple[Any, Callable]:
    """Theirs with torch's grouped product."""
    return transformers(job, "grouped_mm")


MAKERS: dict[str, Callable[[Job], tuple[Any, Callable]]] = {
    "phikit": phikit,
    "phikit, loop": phikit_loop,
    "transformers": transformers,
    "transformers, grouped_mm": transformers_grouped,
}

if __name__ == "__main__":
    main()
