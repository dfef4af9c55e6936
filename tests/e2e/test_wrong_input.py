"""Every mistake ends with what is wrong, what to do next, and exit code 1; never a traceback."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Complaint = Callable[..., str]
RandomModel = Callable[[int], Path]


@pytest.fixture
def complaint(phikit: Callable[..., subprocess.CompletedProcess[str]]) -> Complaint:
    """What a command says that must fail."""

    def run(*arguments: object, given: str = "") -> str:
        failed = phikit(*arguments, given=given)
        assert failed.returncode == 1, failed.stdout + failed.stderr
        assert "Traceback" not in failed.stdout + failed.stderr
        lines = failed.stderr.splitlines()
        assert lines[0].startswith("phikit: ") and lines[-1].startswith("  Next: "), lines
        return failed.stderr

    return run


def test_an_unknown_recipe_names_the_nearest(complaint: Complaint):
    assert "did you mean nano_reasoner?" in complaint("run", "nano_reasonner")


def test_an_unknown_stage_names_those_there_are(complaint: Complaint):
    said = complaint("train", "nano_reasoner.stf")
    assert "no stage 'stf'" in said and "nano_reasoner.sft" in said


def test_misspelt_settings_are_all_reported_with_the_nearest(complaint: Complaint):
    said = complaint(
        *("run", "nano_reasoner", "--set", "stages.sft.loop.epoch=2"),
        *("--set", "stages.stf.loop.epochs=2", "--set", "sed=1"),
    )
    assert "stages.sft.loop.epoch: unknown setting; did you mean epochs?" in said
    assert "did you mean sft?" in said
    assert "sed: unknown setting; did you mean seed?" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "a", "answer": 1}\n{"question": oops}\n', ("bad.jsonl:2", "not JSON")),
        ('{"question": "a", "answr": 1}\n', ("bad.jsonl:1", "did you mean 'answer'?")),
        ("", ("bad.jsonl", "no problems in the file")),
    ],
)
def test_bad_data_names_file_line_and_reason(
    complaint: Complaint, tmp_path: Path, content: str, words: tuple[str, ...]
):
    (tmp_path / "bad.jsonl").write_text(content)
    said = complaint("eval", tmp_path, "--data", tmp_path / "bad.jsonl")
    assert all(word in said for word in words)


@pytest.mark.parametrize("verb", ["chat", "eval", "report", "diff"])
def test_a_folder_that_is_not_a_run_says_what_was_looked_for(
    complaint: Complaint, tmp_path: Path, verb: str
):
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": 1}\n')
    more = {"eval": ("--data", tmp_path / "data.jsonl"), "diff": (tmp_path,)}
    said = complaint(verb, tmp_path, *more.get(verb, ()))
    assert f"looked for {tmp_path}/config.json" in said


def test_a_folder_where_nothing_can_be_written(
    complaint: Complaint, tiny: tuple[str, ...], tmp_path: Path
):
    (tmp_path / "file").write_text("")
    said = complaint("run", "nano_reasoner", "--out", tmp_path / "file" / "run", *tiny)
    assert f"cannot write {tmp_path}/file/run" in said


def test_a_folder_that_holds_something_else_is_left_alone(complaint: Complaint, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    assert "choose another folder" in complaint("run", "nano_reasoner", "--out", tmp_path)


def test_there_must_be_a_run_to_resume(complaint: Complaint, tmp_path: Path):
    said = complaint("run", "nano_reasoner", "--resume", "--out", tmp_path)
    assert f"nothing to resume: {tmp_path} is not a run" in said


def test_a_question_longer_than_the_context_gives_both_numbers(
    complaint: Complaint, random_model: RandomModel
):
    said = complaint("chat", random_model(160), given=f"{'What is 3 + 4? ' * 40}\nWhat is 1 + 1?\n")
    assert "and the model's context is 160" in said and "prompt tokens" in said
    assert "shorter" in said


def test_problems_that_all_exceed_the_context_are_no_evaluation(
    complaint: Complaint, random_model: RandomModel, tmp_path: Path
):
    row = {"question": "What is 3 + 4? " * 40, "answer": 7}
    (tmp_path / "long.jsonl").write_text(json.dumps(row))
    said = complaint("eval", random_model(160), "--data", tmp_path / "long.jsonl")
    assert "no problem could be asked" in said and "context is 160" in said


def test_a_process_of_its_own_ends_the_same_way(
    shell: Callable[..., subprocess.CompletedProcess[str]],
):
    failed = shell("run", "nano_reasonner")
    assert failed.returncode == 1
    assert failed.stderr.startswith("phikit: there is no recipe 'nano_reasonner'\n  Next: ")
    assert "Traceback" not in failed.stderr
