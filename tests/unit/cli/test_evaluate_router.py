import json
from pathlib import Path

import pytest
from tests.stub_endpoint import StubServer, says, stub_endpoint

from phikit.base.errors import ConfigError
from phikit.cli.evaluate_router import evaluate_router
from phikit.data.procedural import generate
from phikit.evals.scorer import math_scorer
from phikit.serve.budget import BudgetError
from phikit.weights.load import Loaded

BASE = 'local = "small"\n'
CLOUD = '[cloud]\nbase_url = "{url}"\nmodel = "big"\nprice_in = 1.0\nprice_out = 1.0\n'
SIGNAL = '[confidence]\nsignal = "agreement"\nthreshold = 0.6\nsamples = 4\n'


def evaluate(loaded: Loaded, server: StubServer, folder: Path, *parts: str) -> None:
    config = folder / "router.toml"
    config.write_text("".join(parts).replace("{url}", server.url))
    evaluate_router(
        config,
        generate(seed=0, count=6, split="test"),
        loaded,
        max_new_tokens=8,
        scorer=math_scorer(),
        out=folder / "curve.json",
        as_json=False,
    )


def test_a_table_a_file_and_a_picture(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    problems = generate(seed=0, count=6, split="test")

    def knows(request) -> None:
        question = request.body["messages"][0]["content"]
        [answer] = [p.answer for p in problems if p.question == question]
        says(f"\\boxed{{{answer}}}")(request)

    with stub_endpoint() as server:
        server.default = knows
        budget = "[budget]\ncalls_per_run = 6\n"
        evaluate(loaded, server, tmp_path, BASE, CLOUD, SIGNAL, budget)
        assert len(server.requests) == 6
    record = json.loads((tmp_path / "curve.json").read_text())
    assert (record["problems"], record["cloud"]["mean"], record["local"]["mean"]) == (6, 1.0, 0.0)
    assert record["spent"]["calls"] == 6 and record["spent"]["cost"] == pytest.approx(96e-6)
    last = record["curve"][-1]
    assert (last["share"], last["kept"]) == (1.0, 1.0) and last["cost"] == pytest.approx(16e-6)
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "to the cloud" in shown and "100 %" in shown and "an oracle reaches 100.0 %" in shown


def test_what_cannot_be_swept(loaded: Loaded, tmp_path: Path):
    with stub_endpoint() as server:
        budget = "[budget]\ncalls_per_run = 3\n"
        for parts in ((BASE, SIGNAL), (BASE, CLOUD, budget)):
            with pytest.raises(ConfigError, match="nothing to sweep"):
                evaluate(loaded, server, tmp_path, *parts)
        with pytest.raises(BudgetError, match="calls_per_run=3"):
            evaluate(loaded, server, tmp_path, BASE, CLOUD, SIGNAL, budget)
    assert not (tmp_path / "curve.json").exists()
