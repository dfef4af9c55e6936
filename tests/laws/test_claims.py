"""The machinery of experiments/grin: fair plans, honest intervals, runs resumed exactly."""

import json
import math
import os
import signal
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
import torch
from experiments.grin import NUMBERS, claim, data, study
from experiments.grin.claim import T95, Findings, Plan, Sweep, interval, rates
from experiments.grin.data import Data
from experiments.grin.lab import Lab, seeded, settle
from experiments.grin.page import page, write_pages
from experiments.grin.shapes import BALANCED, dense, moe
from experiments.grin.study import StudyConfig, run
from pydantic import ValidationError

from phikit.base.errors import Interrupted
from phikit.models.registry import active_parameter_count
from phikit.nn.moe.router import SparseMixerConfig
from phikit.train import loop

TRAINED = [number for number in NUMBERS if claim(number).plan is not None]
TINY = StudyConfig(
    model=moe(SparseMixerConfig(jitter_eps=0.3)).model_copy(update={"num_layers": 1}),
    routing=BALANCED,
    steps=8,
    rows_per_domain=1,
)
PLAIN = StudyConfig(model=dense().model_copy(update={"num_layers": 1}), steps=8, rows_per_domain=1)
ARMS = {
    "moe": TINY,
    "dense": PLAIN.model_copy(update={"routing": StudyConfig(model=dense()).routing}),
}


@pytest.fixture(scope="module")
def text() -> Data:
    """Random rows in the place of the text."""
    random = np.random.default_rng(0)

    def rows(count: int) -> list[np.ndarray]:
        sizes = [(count, data.ROW_TOKENS)] * len(data.DOMAINS)
        return [random.integers(data.VOCABULARY, size=size, dtype=np.int32) for size in sizes]

    return Data(rows(12), rows(2))


@pytest.fixture
def lab(tmp_path: Path, text: Data, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(data, "make", lambda: text)
    return Lab(tmp_path / "runs", tell=lambda _: None)


# --- Plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", TRAINED)
def test_no_seed_both_tunes_and_tests(number: str):
    plan = claim(number).plan
    assert plan is not None and not set(plan.tuning_seeds) & set(plan.test_seeds)
    assert len(plan.test_seeds) >= 5
    for sweep in plan.sweeps:
        assert len({len(trials) for trials in sweep.trials.values()}) == 1
    for arm, config in plan.arms.items():
        for sweep in plan.sweeps:
            for trial in sweep.trials[arm]:
                assert config.override([trial])  # every trial is a setting that exists


def test_unfair_plans_are_refused():
    sweeps = (rates(ARMS),)
    with pytest.raises(ValidationError, match="share a seed"):
        Plan(arms=ARMS, sweeps=sweeps, tuning_seeds=(1, 2), test_seeds=(2, 3))
    trials = {"moe": ("lr=0.1", "lr=0.2"), "dense": ("lr=0.1",)}
    with pytest.raises(ValidationError, match="more often"):
        Plan(arms=ARMS, sweeps=(Sweep(name="rate", trials=trials),))
    with pytest.raises(ValidationError, match="not over all arms"):
        Plan(arms=ARMS, sweeps=(rates({"moe": TINY}),))


@pytest.mark.parametrize("number", NUMBERS)
def test_claims_state_their_rule_before(number: str):
    words = claim(number).words
    assert claim(number).number == number
    for part in ("**Hypothesis.**", "**Measure.**", "**Decision"):
        assert part in words
    assert (claim(number).measure is None) == (number in TRAINED)


def test_active_parameters_are_equal():
    routers = moe().num_layers * 8 * 64
    assert active_parameter_count(moe()) == active_parameter_count(dense()) + routers


# --- Statistics -----------------------------------------------------------------------------------


def test_intervals_are_student_s():
    values = [0.3, -0.1, 0.4, 0.2, 0.0]
    found = interval("x", values)
    half = 2.776 * stdev(values) / math.sqrt(5)  # 4 degrees of freedom
    assert found.delta == pytest.approx(0.16)
    assert (found.low, found.high) == pytest.approx((0.16 - half, 0.16 + half))
    assert not found.is_lower and not found.is_higher
    assert interval("x", [-1.0, -1.1, -0.9]).is_lower


@pytest.mark.parametrize("degrees", range(1, len(T95) + 1))
def test_quantiles(degrees: int):
    """95 % of Student's density lies between them; with x = sqrt(n) tan(u) it is cos(u)^(n - 1)."""
    u = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(u) ** (degrees - 1)
    inside = u <= math.atan(T95[degrees - 1] / math.sqrt(degrees))
    assert density[inside].sum() / density.sum() == pytest.approx(0.95, abs=5e-5)


def test_intervals_cover():
    """95 of 100 samples of five have the truth inside; 2000 samples, four standard errors."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(2000, 5)).tolist()
    inside = sum(found.low <= 0 <= found.high for found in (interval("x", row) for row in rows))
    assert abs(inside / 2000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


# --- Runs -----------------------------------------------------------------------------------------


def test_a_killed_run_ends_like_an_unbroken_one(
    text: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unbroken = run(TINY, tmp_path / "a", text)

    class Killed(Exception):
        pass

    step, calls = loop._step, iter(range(5))

    def dying(*arguments, **named):
        if next(calls, None) is None:
            raise Killed
        return step(*arguments, **named)

    monkeypatch.setattr(study, "CHECKPOINTS", 4)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", dying)
        with pytest.raises(Killed):
            run(TINY, tmp_path / "b", text)
    assert study.outcome(TINY, tmp_path / "b") is None
    resumed = run(TINY, tmp_path / "b", text)
    assert {**resumed, "seconds": 0} == {**unbroken, "seconds": 0}
    assert run(TINY, tmp_path / "b", text) == resumed  # from its file


def test_runs_of_one_seed_share_their_text(text: Data):
    ours, theirs = (
        study.Domains(config, text, study.build(config.model)) for config in ARMS.values()
    )
    for step in range(1, 4):
        a, b = (objective.step_data(step).batches for objective in (ours, theirs))
        assert all(torch.equal(x.tokens_BT, y.tokens_BT) for x, y in zip(a, b, strict=True))
    by_domain = study.Domains(TINY.model_copy(update={"counts": "domain"}), text, ours.model)
    parts = by_domain.step_data(1).batches
    assert len(parts) == len(data.DOMAINS)
    assert torch.equal(
        torch.cat([part.tokens_BT for part in parts]), ours.step_data(1).batches[0].tokens_BT
    )


def test_upcycled_runs_begin_where_the_dense_one_ended(text: Data, tmp_path: Path):
    plan = claim("C8").plan
    assert plan is not None
    start = StudyConfig(model=dense(), steps=6, rows_per_domain=1)
    changes = {"steps": 4, "rows_per_domain": 1, "start": start}
    [config] = seeded(plan.arms["up 60"].model_copy(update=changes), [], [3])
    assert config.start is not None and config.start.seed == 3
    found = run(config, tmp_path, text)
    assert found["before"]["made"] == pytest.approx(found["before"]["start"], abs=1e-5)
    assert found["curve"][0][1] == pytest.approx(found["before"]["start"], abs=1e-5)
    before = study.outcome(config.start, tmp_path)
    assert before is not None and before["loss"] == pytest.approx(found["before"]["start"])


def test_a_plan_from_tuning_to_its_page(lab: Lab, tmp_path: Path):
    plan = Plan(
        arms=ARMS,
        sweeps=(rates(ARMS, (1e-3, 1e-2)),),
        tuning_seeds=(7,),
        test_seeds=(0, 1),
    )
    c3 = claim("C3")
    assert c3.judge is not None

    def judge(found: Findings):
        assert all(len(runs) == 2 for runs in found.runs.values())
        moe_runs = found.runs["moe"]
        named = {"dense": found.runs["dense"], "top-k": moe_runs, "v2": moe_runs}
        assert c3.judge is not None
        return c3.judge(found._replace(runs=named))

    record = settle(c3._replace(plan=plan, judge=judge), lab)
    assert set(record["chosen"]["moe"]) <= {"lr=0.001", "lr=0.01"}
    assert record["verdict"]["outcome"] in ("reproduced", "null", "contradicted")
    assert record["runs"]["moe"][0]["single"] > 0 and record["runs"]["dense"][0]["single"] is None
    folders = {path.parent.name for path in lab.runs.glob("*/outcome.json")}
    assert len(folders) == plan.num_runs == 8
    assert settle(c3._replace(plan=plan, judge=judge), lab) == record  # nothing is done twice
    for part in ("runs", "chosen"):
        record[part] = {"dense": record[part]["dense"], "top-k": record[part]["moe"]}
    for tried in record["tuning"].values():
        tried["top-k"] = tried.pop("moe")
    results = tmp_path / "docs" / "results" / "grin"
    results.mkdir(parents=True)
    (results / "C3.json").write_text(json.dumps(record))
    write_pages(tmp_path / "docs")
    assert (tmp_path / "docs" / "images" / "grin" / "C3.svg").exists()
    text = (tmp_path / "docs" / "claims" / "grin.md").read_text()
    assert text == page(results) and record["verdict"]["words"] in text
    assert "(the first tried)" in text or "(the last tried)" in text  # of two, one is at an end
    assert "C4" in text and "not run yet: `python -m experiments.grin C4`" in text


def test_ctrl_c_keeps_a_run(text: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a process of the pool: the loop saves, and the next command goes on."""
    step = loop._step

    def interrupted(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", interrupted)
        with pytest.raises(Interrupted):
            run(TINY, tmp_path, text)
    [saved] = tmp_path.glob("*/checkpoints/step-*")
    assert saved.name.endswith("1")
    assert run(TINY, tmp_path, text)["tokens"] == 8 * 4 * data.ROW_TOKENS
