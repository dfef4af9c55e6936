import json
from pathlib import Path

import pytest
from tests.stub_endpoint import says, stub_endpoint

from phikit.base.errors import ConfigError, DataError
from phikit.cli.judge import judge
from phikit.evals.factuality.judgement import ERROR_TYPES


def test_planted_reports_by_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    judge(planted=40, out=out)
    shown = capsys.readouterr().out
    assert "40 reports, judged by rules" in shown and "omitted comparison" in shown
    assert "exactly the planted errors: 100.0 %" in shown
    record = json.loads(out.read_text())
    assert record["summary"]["agreement"]["exactly_right"]["share"] == 1
    assert len(record["judgements"]) == 40


def test_a_file_by_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs, config = tmp_path / "pairs.jsonl", tmp_path / "judge.toml"
    row = {"reference": "The lungs are clear.", "candidate": "Clear lungs."}
    pairs.write_text((json.dumps(row) + "\n") * 2)
    zeros = dict.fromkeys(ERROR_TYPES, 0)
    good = json.dumps({"significant": zeros, "insignificant": zeros})
    with stub_endpoint() as server:
        config.write_text(f'[endpoint]\nbase_url = "{server.url}"\nmodel = "big"\n')
        server.script = [says(good), says("no")]
        judge(pairs, by=str(config))
        shown = capsys.readouterr()
        assert "2 reports, judged by big (" in shown.out
        assert "null judgements: 1, 50.0 %" in shown.out and "not one JSON object" in shown.out
        assert "over 1 judged reports" in shown.out and "2 calls" in shown.err
        server.default = says("no")
        judge(pairs, by=str(config))
        shown = capsys.readouterr()
        assert "null judgements: 2, 100.0 %" in shown.out and "per report" not in shown.out
        judge(pairs, by=str(config), as_json=True)
        assert json.loads(capsys.readouterr().out)["errors_per_report"] is None


def test_what_cannot_be_judged(tmp_path: Path):
    with pytest.raises(ConfigError, match="one set of reports"):
        judge()
    with pytest.raises(ConfigError, match="one set of reports"):
        judge(tmp_path / "a.jsonl", planted=3)
    with pytest.raises(DataError, match="cannot read"):
        judge(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="cannot read"):
        judge(planted=3, by=str(tmp_path / "absent.toml"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no settings"):
        judge(planted=3, by=str(tmp_path / "list.json"))
