import json
from pathlib import Path

import pytest

from phikit.base.config import fingerprint
from phikit.base.errors import ConfigError, RunError
from phikit.cli.settings import complete_stage, leaves, recipe, resolve
from phikit.recipes import PIPELINES
from phikit.recipes.config import PipelineConfig


def config_of(name: str) -> PipelineConfig:
    config, left = recipe(name)
    assert not left
    return config


def start(
    name: str | None,
    *assignments: str,
    source: Path | None = None,
    out: Path | None = None,
    resume: bool = False,
) -> tuple[PipelineConfig, Path]:
    return resolve(name, assignments, source=source, out=out, resume=resume)


def write(folder: Path, config: PipelineConfig) -> Path:
    record = {"phikit": "0", "kind": "pipeline", "config": config.model_dump(mode="json")}
    (folder / "config.json").write_text(json.dumps(record))
    return folder / "config.json"


def test_a_recipe_with_assignments_and_the_default_folder():
    config, folder = start("nano_reasoner", "stages.sft.loop.epochs=2", "seed=3")
    assert config.seed == 3
    assert config.stages[2].loop.epochs == 2
    assert folder == Path("runs/nano_reasoner")


def test_a_saved_config_needs_no_name_and_takes_assignments(tmp_path: Path):
    file = write(tmp_path, config_of("nano_reasoner").override(["seed=9"]))
    for source in (file, tmp_path):
        config, folder = start(None, "stages.rl.loop.steps=2", source=source)
        assert (config.seed, config.stages[-1].loop.steps) == (9, 2)
        assert folder == Path("runs/nano_reasoner")


def test_resume_takes_the_config_of_the_folder(tmp_path: Path):
    write(tmp_path, config_of("nano_reasoner").override(["seed=9"]))
    config, folder = start("nano_reasoner", out=tmp_path, resume=True)
    assert (config.seed, folder) == (9, tmp_path)


def test_names_must_agree(tmp_path: Path):
    file = write(tmp_path, config_of("smol_reasoner"))
    with pytest.raises(ConfigError, match="is a config of smol_reasoner, not of nano_reasoner"):
        start("nano_reasoner", source=file)


def test_mistakes_are_typed(tmp_path: Path):
    with pytest.raises(ConfigError, match="no recipe named"):
        start(None)
    with pytest.raises(ConfigError, match="each name a config"):
        start("nano_reasoner", source=tmp_path, resume=True)
    with pytest.raises(RunError, match="nothing to resume"):
        start("nano_reasoner", out=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="cannot read"):
        start(None, source=tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        start(None, source=tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "stage", "config": {}}')
    with pytest.raises(ConfigError, match="not the config of a pipeline"):
        start(None, source=tmp_path)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_what_a_dry_run_prints_is_what_set_takes(name: str):
    config = config_of(name).override(["seed=4"])
    lines = [
        f"{path}={json.dumps(value)}" for path, value in leaves(config.model_dump(mode="json"))
    ]
    assert fingerprint(config_of(name).override(lines)) == fingerprint(config)
    last = config.stages[-1].name
    assert any(line.startswith(f"stages.{last}.loop.optim.") for line in lines)


def test_a_shell_is_offered_the_stages_of_a_pipeline():
    assert "nano_reasoner." in complete_stage("nano")
    assert complete_stage("nano_reasoner.s") == ["nano_reasoner.sft"]
