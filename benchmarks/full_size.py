"""A model of Phi-4-mini's full geometry on this machine, beside transformers.

    python -m benchmarks.full_size [--scale small] [--folder DIR]

3.84 B random weights in bfloat16 (7.7 GB) are written in shards, one tensor in memory at a time;
then phikit and transformers take turns in processes of their own: load, generate greedily, report.
Disk: 8 GB in DIR, or in a temporary folder. Memory: what the larger side needs, about 9 GB.
`--scale small` does the same with 0.1 B weights in a minute.

Peaks are of resident memory, as the kernel counts it: after loading, and at the end. transformers
maps the files, so its weights come into memory while it generates. The bound is that of the
project: 1.15 times the bytes of the weights and 300 MB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHARD_BYTES = {"full": 2_000_000_000, "small": 50_000_000}
NEW_TOKENS = 16
PROMPT = list(range(1000, 1032))
BOUND_FACTOR, BOUND_EXTRA = 1.15, 300e6
SIDES = ("phikit", "transformers")


def main() -> None:
    """Make the weights, let the sides take turns, print their figures side by side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SHARD_BYTES, default="full")
    parser.add_argument("--folder", type=Path, help="keep the weights here; used again if there")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--role", choices=("create", *SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is not None:
        print(json.dumps(ROLES[options.role](options.folder, options.scale)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        run(folder, scale=options.scale, rounds=options.rounds, out=options.out)


def run(folder: Path, *, scale: str, rounds: int, out: Path | None) -> None:
    """All roles, each in a process of its own, one at a time."""
    console = Console()
    figures: dict[str, Any] = {"scale": scale, "rounds": []}
    if not (folder / "model.safetensors.index.json").exists():
        figures["create"] = in_process("create", folder, scale)
        console.print(f"written: {figures['create']}")
    for _ in range(rounds):
        figures["rounds"].append({side: in_process(side, folder, scale) for side in SIDES})
        show(figures["rounds"][-1], console)
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def in_process(role: str, folder: Path, scale: str) -> dict[str, Any]:
    """What one role printed, as the last line of its own process."""
    command = [sys.executable, "-m", "benchmarks.full_size", "--role", role]
    done = subprocess.run(
        [*command, "--folder", str(folder), "--scale", scale],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def show(sides: Mapping[str, dict[str, Any]], console: Console) -> None:
    """One column a side, and phikit's ratio to its peer."""
    ours, theirs = (sides[side] for side in SIDES)
    table = Table("", *SIDES, "ratio", title="load and generate", title_justify="left")
    for key in ("load_seconds", "peak_gb", "peak_over_bound", "peak_gb_at_the_end", "tokens_per_s"):
        ratio = ours[key] / theirs[key]
        table.add_row(key, f"{ours[key]:.2f}", f"{theirs[key]:.2f}", f"{ratio:.2f}x")
    console.print(table)
    pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
    same = sum(a == b for a, b in pairs)
    console.print(f"{same} of {NEW_TOKENS} greedy tokens agree (bfloat16, random weights)")


def create(folder: Path, scale: str) -> dict[str, Any]:
    """Write random weights of the geometry in shards, holding one shard's tensors at a time."""
    import torch

    from phikit.base.device import peak_memory_bytes
    from phikit.chat.render import NANO_SPECIALS
    from phikit.chat.tokenizer import train_tokenizer
    from phikit.models.registry import build, checkpoint_parts, config_to_hf
    from phikit.weights.load import RENDERER_KEY
    from phikit.weights.safetensors_files import INDEX, write_tensors
    from phikit.weights.save import write_json

    started = time.perf_counter()
    config = geometry(scale)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_to_hf(config) | {"eos_token_id": None})
    train_tokenizer(["tokens"], size=256 + len(NANO_SPECIALS), specials=NANO_SPECIALS).save(folder)
    write_json(folder / "tokenizer_config.json", {RENDERER_KEY: "phi4-mini"})

    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = build(config)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    room = SHARD_BYTES[scale]

    def flush() -> None:
        name = f"model-{len(set(files.values())) + 1:05}.safetensors"
        write_tensors(folder / name, shard)
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    total = 0
    for key, parameter in model.named_parameters():
        [(name, _)] = checkpoint_parts(config, key)
        size = 2 * parameter.numel()
        if shard and size > room:
            flush()
            room = SHARD_BYTES[scale]
        drawn = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            drawn.normal_(0.0, config.init_std, generator=generator)
        shard[name] = drawn
        room -= size
        total += size
    flush()
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    return {
        "seconds": time.perf_counter() - started,
        "peak_gb": peak_memory_bytes() / 1e9,
        "gb": total / 1e9,
        "shards": len(set(files.values())),
    }


def geometry(scale: str) -> Any:
    """Phi-4-mini; "small" keeps its shape with 0.1 B parameters."""
    from phikit.models.catalogue import PHI_4_MINI

    if scale == "full":
        return PHI_4_MINI
    smaller = {"vocab_size": 50_000, "d_model": 768, "num_layers": 8, "num_heads": 6}
    return PHI_4_MINI.model_copy(update={**smaller, "num_kv_heads": 2, "d_mlp": 2048})


def phikit_side(folder: Path, scale: str) -> dict[str, Any]:
    """Load and generate with phikit."""
    import phikit
    from phikit.generate.request import Request

    started = time.perf_counter()
    loaded = phikit.load(folder)
    load_seconds = time.perf_counter() - started
    after_load = peaks(folder)
    request = Request(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0.0)
    started = time.perf_counter()
    [[completion]] = loaded.engine.generate([request])
    return figures_of(load_seconds, after_load, time.perf_counter() - started, completion.tokens)


def transformers_side(folder: Path, scale: str) -> dict[str, Any]:
    """Load and generate with transformers, as its documentation says."""
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    load_seconds = time.perf_counter() - started
    after_load = peaks(folder)
    prompt = torch.tensor([PROMPT])
    started = time.perf_counter()
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    tokens = made[0, len(PROMPT) :].tolist()
    return figures_of(load_seconds, after_load, time.perf_counter() - started, tokens)


def peaks(folder: Path) -> dict[str, float]:
    """Peak memory so far, and its share of the bound."""
    from phikit.base.device import peak_memory_bytes

    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    peak = peak_memory_bytes()
    return {
        "peak_gb": peak / 1e9,
        "peak_over_bound": peak / (BOUND_FACTOR * stored + BOUND_EXTRA),
    }


def figures_of(
    load_seconds: float, after_load: dict[str, float], seconds: float, tokens: list[int]
) -> dict[str, Any]:
    """The figures of one side."""
    from phikit.base.device import peak_memory_bytes

    return {
        "load_seconds": load_seconds,
        **after_load,
        "tokens_per_s": len(tokens) / seconds,
        "peak_gb_at_the_end": peak_memory_bytes() / 1e9,
        "tokens": tokens,
    }


ROLES = {"create": create, "phikit": phikit_side, "transformers": transformers_side}

if __name__ == "__main__":
    main()
