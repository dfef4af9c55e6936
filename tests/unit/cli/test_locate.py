import json
import os
from pathlib import Path

import pytest

from phikit.base.errors import RunError, WeightsError
from phikit.cli.locate import locate, locate_pipeline, stage_name
from phikit.recipes import PIPELINES
from phikit.recipes.config import PipelineConfig
from phikit.recipes.pipeline import stage_folders

NANO = PIPELINES["nano_reasoner"]()


def write_run(folder: Path, config: PipelineConfig) -> None:
    record = {"kind": "pipeline", "config": config.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(record))


def write_stage(folder: Path, *, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"kind": "stage", "config": {}}')
    if finished:
        (folder / "result.json").write_text("{}")
    return folder


def test_a_run_means_its_last_finished_stage(tmp_path: Path):
    write_run(tmp_path, NANO)
    paths = [folder.path for folder in stage_folders(NANO, tmp_path)]
    for path in paths[:2]:
        write_stage(path)
    write_stage(paths[2], finished=False)
    found = locate(str(tmp_path))
    assert (found.model, found.stage) == (paths[1] / "model", paths[1])
    assert found.config is not None and found.config["name"] == "nano_reasoner"


def test_stages_of_older_settings_do_not_count(tmp_path: Path):
    for folder in stage_folders(NANO, tmp_path):
        write_stage(folder.path)
    changed = NANO.override(["seed=1"])
    write_run(tmp_path, changed)
    first = write_stage(stage_folders(changed, tmp_path)[0].path)
    assert locate(str(tmp_path)).stage == first


def test_stages_named_by_another_version_are_found_by_number_and_age(tmp_path: Path):
    write_run(tmp_path, NANO)
    names = ("0-pretrain-aaaaaaaa", "1-mid-aaaaaaaa", "1-mid-bbbbbbbb")
    stages = [write_stage(tmp_path / "stages" / name) for name in names]
    os.utime(stages[1] / "result.json", ns=(0, 0))
    assert locate(str(tmp_path)).stage == stages[2]


def test_a_stage_a_model_and_a_gguf_file(tmp_path: Path):
    write_run(tmp_path, NANO)
    stage = write_stage(tmp_path / "stages" / "1-mid-aaaaaaaa")
    assert stage_name(stage) == "mid"
    assert locate(str(stage)).model == stage / "model"
    assert locate_pipeline(str(stage))[0] == tmp_path.resolve()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert locate(str(model)) == (model, None, None)
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"")
    assert locate(str(file)).model == file
    assert locate("smollm2").model == "smollm2"


def test_a_published_model_must_have_been_pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="no folder a/b, and no model(.|\n)*phikit pull a/b"):
        locate("a/b")
    commit = "0" * 40
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text(commit)
    assert locate("a/b").model == snapshot


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "looked for"),
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ('{"name": "a"}', "describes neither a run nor a model"),
    ],
)
def test_what_is_no_run_says_why(tmp_path: Path, content: str | None, words: str):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunError, match=words):
        locate(str(tmp_path))


def test_nothing_finished_yet(tmp_path: Path):
    write_run(tmp_path, NANO)
    with pytest.raises(RunError, match="no stage of"):
        locate(str(tmp_path))
    stage = write_stage(tmp_path / "stages" / "0-pretrain-aaaaaaaa", finished=False)
    with pytest.raises(RunError, match="is not finished"):
        locate(str(stage))
    with pytest.raises(RunError, match="does not exist"):
        locate(str(tmp_path / "absent"))
