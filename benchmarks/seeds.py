"""A pipeline over several seeds: what every stage gained, with its spread.

    python -m benchmarks.seeds nano_reasoner --seeds 0 1 2

Runs `phikit run` once per seed, in its own process, and writes `docs/results/NAME.json`, from which
`make docs` prints the tables of the pages. Finished runs in `--out` are used again. Settings make a
variant, with a name and a file of its own:

    python -m benchmarks.seeds see_and_hear --seeds 0 --variant shared --set tuning=shared
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from phikit.evals.senses import ERROR_RATES
from phikit.evals.stats import pooled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
LEFT_OUT = ("transcripts", "metrics")
"""Parts of results.json too long to keep in the repository."""


def main() -> None:
    """Run every seed and keep the results together."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pipeline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variant", default="", help="name of the settings below")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seeds")
    options = parser.parse_args()
    name = "-".join(filter(None, (options.pipeline, options.variant)))
    settings = [part for each in options.set for part in ("--set", each)]
    runs = [run(options.pipeline, seed, options.out / name, settings) for seed in options.seeds]
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "pipeline": options.pipeline,
        "settings": options.set,
        "machine": machine(),
        "runs": runs,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {target}; `make docs` puts it into README.md")


def run(pipeline: str, seed: int, stem: Path, settings: list[str]) -> dict[str, Any]:
    """One seed's results, with the whole command's wall time if it began here."""
    folder = stem.with_name(f"{stem.name}-{seed}")
    wall = folder / "wall_seconds"
    is_new = not folder.exists()
    started = time.perf_counter()
    command = ["run", pipeline, "--set", f"seed={seed}", *settings, "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "phikit.cli", *command], check=True)
    if is_new:
        wall.write_text(f"{time.perf_counter() - started:.0f}")
    results = json.loads((folder / "results.json").read_text())
    stages = [
        {key: value for key, value in stage.items() if key not in LEFT_OUT}
        for stage in results["stages"]
    ]
    seconds = int(wall.read_text()) if wall.exists() else None
    kept = {"seed": seed, "wall_seconds": seconds, "stages": stages}
    return kept | {key: results[key] for key in ("chance",) if key in results}


def senses_markdown(record: dict[str, Any]) -> str:
    """What a model sees and hears at the end: families in lines, beside chance and text alone."""
    runs = record["runs"]
    first = [next(s["senses"] for s in run["stages"] if s["senses"]) for run in runs]
    last = [_last(run)["senses"] for run in runs]
    lines = ["| Family | Measure | Chance | Text alone | Seen and heard |", "|:--|:--|--:|--:|--:|"]
    for family, of in last[0].items():
        less = ", less is better" if of["measure"] in ERROR_RATES else ""
        found = [family, of["measure"] + less]
        for cells in ([run["chance"] for run in runs], first, last):
            found.append(spread([cell[family]["value"] for cell in cells if family in cell]))
        lines.append("| " + " | ".join(found) + " |")
    losses = [abs(s["text"]["loss"] - run["stages"][0]["text"]["loss"]) for run in runs
              for s in run["stages"] if s["senses"]]  # fmt: skip
    same = all(s["is_text_same"] for run in runs for s in run["stages"])
    minutes = [run["wall_seconds"] / 60 for run in runs if run["wall_seconds"]]
    seeds = "One seed." if len(runs) == 1 else f"Mean ± standard deviation of {len(runs)} seeds."
    told = "bit-identical after every stage" if same else f"changed by up to {max(losses):.3f} nats"
    took = f" Minutes of a run: {', '.join(f'{each:.0f}' for each in minutes)}." if minutes else ""
    count = next(iter(last[0].values()))["n"]
    return "\n".join(
        [*lines, "", f"{seeds} {count} problems a family. The text model: {told}.{took}", ""]
    )


def variants_markdown(record: dict[str, Any]) -> str:
    """A recipe for senses beside its variants: what every family came to, and the text model."""
    stem = f"{record['pipeline']}-"
    shown = {"as it is": record}
    for file in sorted(RESULTS.glob(f"{stem}*.json")):
        variant = file.stem.removeprefix(stem).replace("-", " ")
        shown[variant] = json.loads(file.read_text(encoding="utf-8"))
    families = _last(record["runs"][0])["senses"]
    heads = [
        family + (" (less is better)" if of["measure"] in ERROR_RATES else "")
        for family, of in families.items()
    ]
    lines = [
        "| Variant | " + " | ".join(heads) + " | text model's loss |",
        "|:--|" + "--:|" * (len(heads) + 1),
    ]
    for variant, found in shown.items():
        runs = found["runs"]
        last = [_last(run) for run in runs]
        cells = [
            spread([end["senses"][f]["value"] for end in last if f in end["senses"]])
            for f in families
        ]
        drift = [
            end["text"]["loss"] - run["stages"][0]["text"]["loss"]
            for run, end in zip(runs, last, strict=True)
        ]
        same = all(stage["is_text_same"] for run in runs for stage in run["stages"])
        cells.append("the same bits" if same else f"{max(drift, key=abs):+.3f}")
        seeds = f", {len(runs)} seeds" if len(runs) > 1 else ""
        lines.append(f"| {variant}{seeds} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _last(run: dict[str, Any]) -> dict[str, Any]:
    """The last stage of a run that was asked anything."""
    return next(stage for stage in reversed(run["stages"]) if stage["senses"])


def spread(values: list[float]) -> str:
    """Mean and standard deviation between seeds, in percent; a dash for nothing."""
    if not values:
        return "–"
    over = pooled([100 * value for value in values])
    return f"{over.mean:.1f}" + ("" if over.spread is None else f" ± {over.spread:.1f}") + " %"


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
