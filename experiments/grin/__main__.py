"""Test claims: `python -m experiments.grin C4`. A command that was stopped goes on if repeated."""

import argparse
import json
import os
from pathlib import Path

from experiments.grin import NUMBERS, claim
from experiments.grin.claim import Claim
from experiments.grin.lab import Lab, settle
from experiments.grin.page import write_pages

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Estimate, run, store, and draw."""
    parser = argparse.ArgumentParser(prog="experiments.grin", description=__doc__)
    parser.add_argument("claims", nargs="+", choices=NUMBERS, metavar="CLAIM")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "grin")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--estimate", action="store_true", help="say how long, and do nothing")
    parser.add_argument("--wider", type=int, default=1, help="times the width of all models")
    parser.add_argument("--longer", type=int, default=1, help="times the steps of all runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where results go")
    options = parser.parse_args()
    lab = Lab(options.runs, jobs=options.jobs)
    for number in options.claims:
        chosen = resized(claim(number), wider=options.wider, longer=options.longer)
        print(f"{number}: {chosen.title}")
        if chosen.plan is not None:
            print(f"  {lab.estimate(chosen.plan)}")
        if options.estimate:
            continue
        record = settle(chosen, lab)
        results = options.out / "results" / "grin"
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{number}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{number}: {record['verdict']['outcome']}. {record['verdict']['words']}")
        write_pages(options.out)


def resized(chosen: Claim, *, wider: int, longer: int) -> Claim:
    """The claim with larger models or longer runs; give such results an `--out` of their own."""
    if chosen.plan is None or (wider, longer) == (1, 1):
        return chosen
    arms = {arm: run.resized(wider=wider, longer=longer) for arm, run in chosen.plan.arms.items()}
    return chosen._replace(plan=chosen.plan.model_copy(update={"arms": arms}))


if __name__ == "__main__":
    main()
