"""What quantisation costs: every way of it beside the original, on text and on problems.

    python -m benchmarks.quantise [--model smollm2] [--out docs/results/quantisation.json]

Runs `phikit quantize --report` once for each way and keeps what it wrote: minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WAYS = (
    ("--bits", "8"),
    ("--bits", "4"),
    ("--bits", "4", "--embedding-bits", "4"),
    ("--bits", "4", "--method", "gptq"),
)


OTHER_TEXT = Path(__file__).parents[1] / "LICENSE"
KEPT = ("accuracy", "stderr", "n", "statuses")


def main() -> None:
    """Quantise a model in every way, and gather the reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path("docs/results/quantisation.json"))
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, way in enumerate(WAYS):
            folder = Path(temporary) / str(number)
            command = [sys.executable, "-m", "phikit.cli", "quantize", options.model, str(folder)]
            subprocess.run([*command, *way, "--report"], check=True)
            runs.append(json.loads((folder / "quantisation.json").read_text(encoding="utf-8")))
            runs[-1]["other_text"] = on_other_text(options.model, folder)
    for run in runs:
        for side in ("original", "changed"):  # by family and by steps there are too few
            run["task"][side] = {key: run["task"][side][key] for key in KEPT}
    record = {"model": options.model, "threads": threads(), "runs": runs}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def on_other_text(model: str, folder: Path) -> dict[str, Any]:
    """The comparison on a text that is unlike those that GPTQ was calibrated on."""
    from phikit.data.passages import ROW_TOKENS, file_rows
    from phikit.evals.compare import compare_text
    from phikit.weights.load import load

    original, changed = load(model), load(folder)
    rows = file_rows(OTHER_TEXT, original.tokenizer, row_tokens=ROW_TOKENS)
    return compare_text(original.model, changed.model, rows).to_dict()


def threads() -> int:
    """Those of the processes that were measured."""
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
