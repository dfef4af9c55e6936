"""The hybrid router between two models of different strength: accuracy against cloud calls.

    python -m benchmarks.router --local runs/nano_reasoner --cloud runs/nano_long

The cloud is `phikit serve` in a second process, asked over HTTP. Problems are of the local run's
own kind, and no training has seen them. The signal is chosen on validation problems. A threshold is
the one that sends half of the problems away, which takes no right answers to find. Writes
`docs/results/router.json` and `docs/images/router.png`; docs/hybrid.md says how the runs are made.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.seeds import machine

from phikit.cli.locate import locate, stage_name
from phikit.data.problem import Problem, assert_disjoint
from phikit.data.source import ProceduralSource, load_problems
from phikit.data.split import Split, split_of
from phikit.evals import routing
from phikit.evals.routing_plot import routing_chart
from phikit.evals.scorer import math_scorer
from phikit.evals.stats import paired_difference
from phikit.generate.chat import ChatOptions
from phikit.generate.language_model import LanguageModel, load
from phikit.generate.remote import Remote, RemoteConfig
from phikit.serve.router import boxed_or_whole
from phikit.solve.asked import asked
from phikit.solve.confidence import SIGNALS
from phikit.solve.plain import SamplingConfig, plain
from phikit.solve.solver import Reply

ROOT = Path(__file__).resolve().parent.parent
TARGET_SHARE, TARGET_KEPT = 0.5, 0.9
VOTES = {"num_samples": 8, "temperature": 0.8}
MAX_POINTS = 200
SEED = 32
"""No evaluation of a pipeline draws with it."""

Sides = tuple[list[list[Reply]], list[list[Reply]], list[list[Reply]]]
"""Local greedy replies, local votes, cloud replies."""


def main() -> None:
    """Measure, write the figures and the picture, and say whether the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--local", default="runs/nano_reasoner")
    parser.add_argument("--cloud", default="runs/nano_long")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    place = locate(options.local)
    assert place.config is not None, f"{options.local} is no run"
    source = ProceduralSource.resolve(place.config["evaluation"]["source"])
    validation = draw(source, "validation", options.validation)
    test = draw(source, "test", options.problems)
    assert_disjoint(validation=validation, test=test)
    length = place.config["evaluation"]["max_new_tokens"]
    model = load(place.model)
    with served(str(locate(options.cloud).model)) as config, Remote(config) as cloud:
        sides = [ask(problems, model, cloud, length) for problems in (validation, test)]
    judged = {
        signal: [
            judge(signal, problems, *side)
            for problems, side in zip((validation, test), sides, strict=True)
        ]
        for signal in SIGNALS
    }
    rows = {signal: row(*both) for signal, both in judged.items()}
    best = max(rows, key=lambda signal: rows[signal]["validation"]["kept"])
    record = {
        "machine": machine(),
        "local": side(options.local),
        "cloud": side(options.cloud),
        "target": {"share": TARGET_SHARE, "kept": TARGET_KEPT},
        "chosen": best,
        "met": rows[best]["share"] <= TARGET_SHARE and rows[best]["kept"] >= TARGET_KEPT,
        "signals": rows,
    }
    write(record, options.out)
    tell(record)


def side(run: str) -> dict[str, Any]:
    """Which model it was, and what it was trained on."""
    place = locate(run)
    assert place.stage is not None and place.config is not None
    stages = [
        {"name": stage["name"], "steps": stage["loop"]["steps"], "problems": count_of(stage)}
        for stage in place.config["stages"]
    ]
    run_folder = place.stage.resolve().parent.parent
    return {"run": run_folder.name, "stage": stage_name(place.stage), "stages": stages}


def count_of(stage: dict[str, Any]) -> int | None:
    """The problems a stage draws, if it draws any."""
    return stage["source"]["count"] if "source" in stage else None


def draw(source: ProceduralSource, split: Split, count: int) -> list[Problem]:
    """Problems of one split, of the kind the run is evaluated on."""
    wanted = source.model_copy(update={"count": count})
    problems = load_problems(wanted, split=split, seed=SEED)
    assert all(split_of(problem.signature) == split for problem in problems)
    return problems


@contextmanager
def served(model: str) -> Iterator[RemoteConfig]:
    """The model in a server of its own."""
    command = [sys.executable, "-m", "phikit.cli", "serve", f"cloud={model}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert "http://" in line, line
            url = line.split(" on ")[1].split()[0]
            yield RemoteConfig(base_url=url, model="cloud", max_concurrent=32, timeout_s=600)
        finally:
            process.terminate()


def ask(problems: Sequence[Problem], model: LanguageModel, cloud: Remote, length: int) -> Sides:
    """Everything that is asked about these problems."""

    def timed(name: str, solve: Callable[[Sequence[Problem]], list[list[Reply]]]) -> Any:
        started = time.perf_counter()
        replies = solve(problems)
        print(f"{name}: {len(problems)} problems in {time.perf_counter() - started:.0f} s")
        return replies

    greedy = SamplingConfig(max_new_tokens=length, temperature=0.0)
    votes = SamplingConfig(max_new_tokens=length, **VOTES)
    over_http = ChatOptions(max_new_tokens=length)
    return (
        timed("local", plain(model.engine, model.renderer, greedy)),
        timed("local votes", plain(model.engine, model.renderer, votes)),
        timed("cloud", asked(cloud, over_http, at_once=32)),
    )


def judge(
    signal: str,
    problems: Sequence[Problem],
    greedy: list[list[Reply]],
    votes: list[list[Reply]],
    cloud: list[list[Reply]],
) -> list[routing.Case]:
    """The problems by one signal."""
    return routing.cases(
        problems,
        votes if signal == "agreement" else greedy,
        cloud,
        scorer=math_scorer(),
        signal=SIGNALS[signal],
        answer_of=boxed_or_whole,
    )


def row(validation: list[routing.Case], test: list[routing.Case]) -> dict[str, Any]:
    """One signal's figures at the target's share of calls, and its whole curve."""
    before = at_target(validation)
    point = at_target(test)
    interval = routing.kept_interval(test, point.threshold)
    gap = paired_difference(
        [(case.content_hash, float(case.local)) for case in test],
        [(case.content_hash, float(case.cloud)) for case in test],
    )
    return {
        "validation": {"share": before.share, "kept": before.kept, "n": len(validation)},
        "threshold": point.threshold,
        "share": point.share,
        "accuracy": point.accuracy.mean,
        "stderr": point.accuracy.stderr,
        "kept": point.kept,
        "kept_low": interval.low,
        "kept_high": interval.high,
        "gap": gap._asdict(),
        **thinned(routing.to_dict(test)),
    }


def thinned(record: dict[str, Any]) -> dict[str, Any]:
    """With no more points than a picture shows."""
    step = -(-len(record["curve"]) // MAX_POINTS)
    *most, last = record["curve"]
    return record | {"curve": [*most[::step], last]}


def at_target(judged: list[routing.Case]) -> routing.Point:
    """The threshold that sends no more problems away than the target allows."""
    return routing.at(judged, routing.threshold_for(judged, share=TARGET_SHARE))


def write(record: dict[str, Any], out: Path) -> None:
    """The figures and the picture, the chosen signal first."""
    for folder in ("results", "images"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "results" / "router.json").write_text(json.dumps(record, indent=1) + "\n")
    rows, best = record["signals"], record["chosen"]
    picture = {best: rows[best]} | rows
    chosen = rows[best]["share"], rows[best]["accuracy"]
    routing_chart(picture, out / "images" / "router.png", chosen=chosen)


def tell(record: dict[str, Any]) -> None:
    """A line for each signal, and whether the target is met."""
    for signal, figures in record["signals"].items():
        low, high = 100 * figures["kept_low"], 100 * figures["kept_high"]
        print(
            f"{signal}: {100 * figures['share']:.1f} % of the calls, "
            f"{100 * figures['accuracy']:.1f} % right, "
            f"{100 * figures['kept']:.0f} [{low:.0f}, {high:.0f}] % of the gap"
        )
    verdict = "met" if record["met"] else "missed"
    print(f"target {verdict} with {record['chosen']}, the best on validation")


if __name__ == "__main__":
    main()
