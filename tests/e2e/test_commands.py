"""What a user does after `phikit run`: look, ask, evaluate, compare, and run it again."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Phikit = Callable[..., subprocess.CompletedProcess[str]]

STAGES = ["pretrain", "mid", "sft", "dpo", "rl"]


def test_a_run_leaves_results_a_report_and_the_command_to_chat(finished: Path):
    results = json.loads((finished / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == STAGES
    wanted = {"seconds", "tokens", "accuracy", "stderr", "n", "pass_at_1_t06", "mean_tokens"}
    assert all(wanted <= stage.keys() for stage in results["stages"])
    assert "<svg" in (finished / "report.html").read_text()
    assert len(list(finished.glob("stages/*/samples/test.txt"))) == len(STAGES)


def test_running_again_trains_nothing_and_gives_the_same_results(
    shell: Phikit, tiny: tuple[str, ...], finished: Path
):
    before = (finished / "results.json").read_text()
    written = {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/*")}
    again = shell("run", "nano_reasoner", "--out", finished, *tiny)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(STAGES)
    assert f"report: {finished}/report.html" in again.stdout
    assert again.stdout.rstrip().endswith(f"chat {finished}")
    assert (finished / "results.json").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/*")} == written


def test_resume_takes_the_settings_of_the_run(phikit: Phikit, finished: Path):
    plan = phikit("run", "nano_reasoner", "--out", finished, "--resume", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "stages.mid.loop.steps=120\n" in plan.stdout
    saved = phikit("run", "--from", finished / "config.json", "--dry-run", "--set", "seed=5")
    assert saved.stdout == plan.stdout.replace("\nseed=0\n", "\nseed=5\n")


def test_one_stage_stands_on_the_finished_ones_before_it(
    phikit: Phikit, tiny: tuple[str, ...], finished: Path, tmp_path: Path
):
    copy = shutil.copytree(finished, tmp_path / "copy")
    done = phikit("train", "nano_reasoner.mid", "--out", copy, *tiny)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done before") == 2


def test_chat_answers_each_piped_line_and_obeys_commands(
    shell: Phikit, finished: Path, tmp_path: Path
):
    talk = tmp_path / "talk.jsonl"
    lines = f"What is 3 + 4?\n/temperature 0\nCompute\\\n5 + 2.\n/save {talk}\n/quit\nnever asked\n"
    said = shell("chat", finished, given=lines)
    assert said.returncode == 0, said.stderr
    messages = [json.loads(line) for line in talk.read_text().splitlines()]
    questions = [message["content"] for message in messages if message["role"] == "user"]
    assert questions == ["What is 3 + 4?", "Compute\n5 + 2."]
    for message in messages[1::2]:
        assert message["content"] in said.stdout


def test_chat_reads_a_stage_a_model_and_the_installed_weights(phikit: Phikit, finished: Path):
    stage = next(finished.glob("stages/2-sft-*"))
    for run in (stage, stage / "model"):
        said = phikit("chat", run, "--max-new-tokens", 3, given="What is 3 + 4?")
        assert said.returncode == 0, said.stderr
        assert said.stdout


def test_eval_reads_a_file_and_counts_what_became_of_every_reply(
    phikit: Phikit, finished: Path, tmp_path: Path
):
    data = tmp_path / "mine.jsonl"
    rows = [{"question": f"What is {n} + 2?", "answer": n + 2} for n in range(1, 7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "transcripts.txt"
    arguments = ("eval", finished, "--data", data, "--samples", 4, "--limit", 5, "--out", out)
    shown = phikit(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert "5 problems, 4 replies each at temperature 0.6" in shown.stdout
    assert "pass@4" in shown.stdout and "maj@4" in shown.stdout and "±" in shown.stdout
    numbers = json.loads(phikit(*arguments, "--json").stdout)
    assert sum(numbers["statuses"].values()) == 20
    assert numbers["pass@1"]["accuracy"] == pytest.approx(numbers["accuracy"])
    assert out.read_text().count("Question\n") == 20


def test_eval_of_a_task_shows_difficulty_and_writes_into_the_run(phikit: Phikit, finished: Path):
    shown = phikit("eval", finished, "--task", "procedural", "--limit", 10)
    assert shown.returncode == 0, shown.stderr
    assert "5 steps" in shown.stdout
    assert (next(finished.glob("stages/4-rl-*")) / "samples" / "eval-procedural.txt").is_file()


def test_report_writes_the_page_again_and_prints_the_table(phikit: Phikit, finished: Path):
    page = finished / "report.html"
    before = page.read_text()
    page.unlink()
    shown = phikit("report", finished)
    assert shown.returncode == 0, shown.stderr
    assert page.read_text() == before
    assert all(name in shown.stdout for name in STAGES)


def test_diff_shows_settings_and_paired_differences(phikit: Phikit, finished: Path, tmp_path: Path):
    other = shutil.copytree(finished, tmp_path / "other")
    record = json.loads((other / "config.json").read_text())
    record["config"]["stages"][2]["loop"]["epochs"] = 7
    (other / "config.json").write_text(json.dumps(record))
    shown = phikit("diff", finished, other)
    assert shown.returncode == 0, shown.stderr
    [line] = [line for line in shown.stdout.splitlines() if "loop.epochs" in line]
    assert line.split() == ["stages.sft.loop.epochs", "4.0", "7"]
    assert "+0.0 [+0.0, +0.0] within noise" in shown.stdout


def test_a_dry_run_at_real_scale_needs_no_network_and_starts_nothing(
    phikit: Phikit, tmp_path: Path
):
    plan = phikit("run", "phi4_mini_reasoning", "--dry-run", "--out", tmp_path / "run")
    assert plan.returncode == 0, plan.stderr
    assert "3,836,021,760 parameters" in plan.stdout
    assert not (tmp_path / "run").exists()


def test_help_and_version_load_no_torch(shell: Phikit):
    shown = shell("--help")
    assert shown.returncode == 0
    assert all(verb in shown.stdout for verb in ("run", "train", "chat", "eval", "report", "diff"))
    assert shell("--version").stdout.startswith("phikit ")
