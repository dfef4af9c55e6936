"""Runs claims: tunes, trains, judges, and stores what was found.

Every run is a folder under `runs`, named by its config: claims share runs that are the same, and a
claim that was stopped goes on where it was. Runs are spread over processes of one thread each.
"""

import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.grin import data as texts
from experiments.grin.claim import Claim, Findings, Outcome, Plan
from experiments.grin.study import StudyConfig, outcome, run, seconds_of

import phikit
from phikit.base.device import set_threads

Tell = Callable[[str], None]


class Lab:
    """A place for runs.

    Args:
        runs: folder of the runs and of the text.
        jobs: processes at a time.
        tell: takes a line of progress.
    """

    def __init__(self, runs: Path, *, jobs: int = 1, tell: Tell = print) -> None:
        self.runs, self.jobs, self.tell = runs, jobs, tell
        self.data = texts.load(runs / "data")

    def estimate(self, plan: Plan) -> str:
        """How many runs are to be done, and about how long they take here and now."""
        known = {arm: self._known(plan, arm) for arm in plan.arms}
        left = {
            arm: plan.num_runs // len(plan.arms) - sum(self._is_done(c) for c in configs)
            for arm, configs in known.items()
        }
        seconds = sum(
            count * seconds_of(plan.arms[arm], self.data) for arm, count in left.items() if count
        )
        starts = {c.start for configs in known.values() for c in configs if c.start is not None}
        seconds += sum(seconds_of(c, self.data) for c in starts if not self._is_done(c))
        return (
            f"at most {sum(left.values())} of {plan.num_runs} runs to do: "
            f"about {seconds / self.jobs / 60:.0f} minutes in {self.jobs} processes"
        )

    def findings(self, plan: Plan) -> Findings:
        """Tune every arm, then run it on the test seeds."""
        tuning: dict[str, Any] = {}
        chosen: dict[str, list[str]] = {arm: [] for arm in plan.arms}
        for sweep in plan.sweeps:
            wanted = {
                (arm, trial): seeded(plan.arms[arm], [*chosen[arm], trial], plan.tuning_seeds)
                for arm, trials in sweep.trials.items()
                for trial in trials
            }
            self.tell(f"tuning of the {sweep.name}")
            self.run_all(config for configs in wanted.values() for config in configs)
            found = {
                arm: {
                    trial: [self._outcome(c)[sweep.measure] for c in wanted[arm, trial]]
                    for trial in trials
                }
                for arm, trials in sweep.trials.items()
            }
            for arm, trials in found.items():
                best = sweep.choose([fmean(values) for values in trials.values()])
                chosen[arm].append(list(trials)[best])
            tuning[sweep.name] = found
        tests = {
            arm: seeded(config, chosen[arm], plan.test_seeds) for arm, config in plan.arms.items()
        }
        self.tell("test")
        self.run_all(config for configs in tests.values() for config in configs)
        runs = {arm: [self._outcome(c) for c in configs] for arm, configs in tests.items()}
        return Findings(runs, tuning, chosen)

    def run_all(self, configs: Iterable[StudyConfig]) -> None:
        """Do what of these runs is not done yet, first those that others go on from."""
        wanted = list(configs)
        starts = [config.start for config in wanted if config.start is not None]
        if starts:
            self.run_all(starts)
        left = list(dict.fromkeys(c for c in wanted if not self._is_done(c)))
        if not left:
            return
        tasks, started = [(config, self.runs) for config in left], time.perf_counter()
        with _workers(min(self.jobs, len(left))) as work:
            for done, loss in enumerate(work(_run, tasks), 1):
                each = (time.perf_counter() - started) / done
                rest = each * (len(left) - done) / 60
                self.tell(f"  {done} of {len(left)}: loss {loss:.4f}, {rest:.0f} minutes left")

    def _outcome(self, config: StudyConfig) -> Outcome:
        found = outcome(config, self.runs)
        assert found is not None
        return found

    def _is_done(self, config: StudyConfig) -> bool:
        return outcome(config, self.runs) is not None

    def _known(self, plan: Plan, arm: str) -> list[StudyConfig]:
        """The runs of an arm that can be named before anything is chosen."""
        config = plan.arms[arm]
        return [
            run
            for trial in plan.sweeps[0].trials[arm]
            for run in seeded(config, [trial], plan.tuning_seeds)
        ]


def settle(claim: Claim, lab: Lab) -> dict[str, Any]:
    """The record of a claim: everything that its page shows."""
    record: dict[str, Any] = {"claim": claim.number, "title": claim.title, "machine": machine()}
    if claim.measure is not None:
        figures, verdict = claim.measure()
        record["figures"] = figures
    else:
        assert claim.plan is not None and claim.judge is not None
        findings = lab.findings(claim.plan)
        verdict = claim.judge(findings)
        record |= {
            "text": lab.data.digest,
            "plan": claim.plan.model_dump(mode="json", exclude_defaults=True),
            "tuning": findings.tuning,
            "chosen": findings.chosen,
            "runs": {arm: list(map(_short, runs)) for arm, runs in findings.runs.items()},
        }
    comparisons = [comparison._asdict() for comparison in verdict.comparisons]
    return record | {"verdict": verdict._asdict() | {"comparisons": comparisons}}


def _short(found: Outcome) -> dict[str, Any]:
    """A run without its loads, which are too long to keep with the documentation."""
    return {key: value for key, value in found.items() if key != "load"}


def machine() -> dict[str, Any]:
    """What the figures were computed with."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "phikit": phikit.__version__,
    }


def seeded(
    config: StudyConfig, assignments: Sequence[str], seeds: Sequence[int]
) -> list[StudyConfig]:
    """The runs of an arm; what it goes on from has the same seed."""
    settings = config.override(assignments) if assignments else config
    made = []
    for seed in seeds:
        start = settings.start and settings.start.model_copy(update={"seed": seed})
        made.append(settings.model_copy(update={"seed": seed, "start": start}))
    return made


@contextmanager
def _workers(count: int) -> Iterator[Callable]:
    """A `map` over so many processes of one thread; one worker is this process."""
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, set_threads, initargs=(1,)) as pool:
        yield pool.map


def _run(task: tuple[StudyConfig, Path]) -> float:
    """In a process of the pool."""
    config, runs = task
    return run(config, runs, texts.load(runs / "data"))["loss"]
