"""What a claim is, how its runs are chosen, and how two arms are compared.

A claim's module states hypothesis, measure and decision rule in its docstring, which was written
before it ran and is printed on its page. A claim is either computed at once (`measure`) or decided
by training runs (`plan` and `judge`).

In a plan every arm is tuned by equally many trials on seeds that no comparison uses. Comparisons
are over seeds: the difference of two arms is taken seed by seed, since runs of one seed share text
and first weights, and its 95 % interval is Student's t.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple, Self

from experiments.grin.study import StudyConfig
from matplotlib.figure import Figure
from pydantic import model_validator

from phikit.base.config import Config
from phikit.evals.plots import Palette

T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Two-sided 95 % quantiles of Student's t for 1 to 20 degrees of freedom."""
RATES = (0.02, 0.04, 0.08, 0.16)
"""Learning rates that arms are tried at, unless a claim says otherwise."""

Outcome = Mapping[str, Any]
"""What a run found; see `study.run`."""


class Sweep(Config):
    """One setting to be chosen for every arm, on the tuning seeds."""

    name: str
    trials: dict[str, tuple[str, ...]]
    """For each arm the values to try, as `setting=value`; as many for all arms."""
    measure: str = "loss"
    aim: float | None = None
    """The trial whose mean measure is nearest to this is taken; None takes the smallest."""

    def choose(self, means: Sequence[float]) -> int:
        """Number of the trial to take."""
        distances = [mean if self.aim is None else abs(mean - self.aim) for mean in means]
        return distances.index(min(distances))


class Plan(Config):
    """The training runs of a claim."""

    arms: dict[str, StudyConfig]
    sweeps: tuple[Sweep, ...]
    """One after another, each with what the ones before have chosen."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    test_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    @model_validator(mode="after")
    def _is_fair(self) -> Self:
        if set(self.tuning_seeds) & set(self.test_seeds):
            raise ValueError("tuning_seeds and test_seeds share a seed")
        for sweep in self.sweeps:
            if set(sweep.trials) != set(self.arms):
                raise ValueError(f"the sweep {sweep.name!r} is not over all arms")
            if len({len(trials) for trials in sweep.trials.values()}) != 1:
                raise ValueError(f"the sweep {sweep.name!r} tries some arms more often")
        return self

    @property
    def num_runs(self) -> int:
        """Runs in all, were none of them shared or done before."""
        trials = sum(len(t) for sweep in self.sweeps for t in sweep.trials.values())
        return trials * len(self.tuning_seeds) + len(self.arms) * len(self.test_seeds)


def rates(arms: Mapping[str, StudyConfig], values: Sequence[float] = RATES) -> Sweep:
    """The learning rate of every arm, by held-out loss."""
    trials = tuple(f"lr={value}" for value in values)
    return Sweep(name="learning rate", trials=dict.fromkeys(arms, trials))


class Comparison(NamedTuple):
    """Mean difference of two arms over paired seeds, with its 95 % interval."""

    name: str
    measure: str
    delta: float
    low: float
    high: float
    seeds: int

    @property
    def is_lower(self) -> bool:
        """Whether the interval lies below zero."""
        return self.high < 0

    @property
    def is_higher(self) -> bool:
        return self.low > 0


def compare(
    name: str, treated: Sequence[Outcome], control: Sequence[Outcome], *, measure: str = "loss"
) -> Comparison:
    """Treated minus control, seed by seed."""
    pairs = zip(treated, control, strict=True)
    return interval(name, [a[measure] - b[measure] for a, b in pairs], measure=measure)


def interval(name: str, differences: Sequence[float], *, measure: str = "loss") -> Comparison:
    """Mean ± t sd / sqrt(n); from two to 21 differences."""
    count, mean = len(differences), fmean(differences)
    assert 2 <= count <= len(T95) + 1, f"{count} seeds"
    half = T95[count - 2] * stdev(differences) / math.sqrt(count)
    return Comparison(name, measure, mean, mean - half, mean + half, count)


class Verdict(NamedTuple):
    """What the decision rule says, and the comparisons it says it from."""

    outcome: str
    """`reproduced`, `partly reproduced`, `null`, `contradicted`, or `reported` without a rule."""
    words: str
    comparisons: list[Comparison]


class Findings(NamedTuple):
    """All test runs of a plan, and how its arms were tuned."""

    runs: dict[str, list[Outcome]]
    """Of each arm, in the order of the test seeds."""
    tuning: dict[str, dict[str, dict[str, list[float]]]]
    """[sweep][arm][trial]: the measure of each tuning seed."""
    chosen: dict[str, list[str]]
    """Of each arm, the assignments that were taken."""


class Claim(NamedTuple):
    """One claim. Either `measure` or both `plan` and `judge` are given."""

    number: str
    title: str
    words: str
    """The module's docstring: hypothesis, measure, decision rule."""
    draw: Callable[[Figure, Palette, Mapping[str, Any]], None] | None = None
    """Draws a stored record."""
    measure: Callable[[], tuple[dict[str, Any], Verdict]] | None = None
    """Figures to keep, and the verdict."""
    plan: Plan | None = None
    judge: Callable[[Findings], Verdict] | None = None
    size: tuple[float, float] = (6.4, 3.0)
    """Of the picture in inches."""
