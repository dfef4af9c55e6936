"""A pipeline over several seeds: what every stage gained, with its spread.

    python -m benchmarks.seeds nano_reasoner --seeds 0 1 2

Runs `phikit run` once per seed, in its own process, and writes `docs/results/NAME.json`, from which
`make docs` prints the table in README. Finished runs in `--out` are used again.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("transcripts", "metrics")
"""Parts of results.json too long to keep in the repository."""


def main() -> None:
    """Run every seed and keep the results together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "seeds")
    options = parser.parse_args()
    runs = [run(options.pipeline, seed, options.out) for seed in options.seeds]
    target = ROOT / "docs" / "results" / f"{options.pipeline}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {"pipeline": options.pipeline, "machine": machine(), "runs": runs}
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {target}; `make docs` puts it into README.md")


def run(pipeline: str, seed: int, out: Path) -> dict[str, Any]:
    """One seed's results, with the whole command's wall time if it began here."""
    folder = out / f"{pipeline}-{seed}"
    wall = folder / "wall_seconds"
    is_new = not folder.exists()
    started = time.perf_counter()
    command = ["run", pipeline, "--set", f"seed={seed}", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "phikit.cli", *command], check=True)
    if is_new:
        wall.write_text(f"{time.perf_counter() - started:.0f}")
    results = json.loads((folder / "results.json").read_text())
    stages = [
        {key: value for key, value in stage.items() if key not in LEFT_OUT}
        for stage in results["stages"]
    ]
    seconds = int(wall.read_text()) if wall.exists() else None
    return {"seed": seed, "wall_seconds": seconds, "stages": stages}


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
