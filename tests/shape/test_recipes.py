"""Every recipe is complete: it survives JSON, builds on the meta device, and has a budget."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import typer.core
import typer.main

from phikit.base.config import fingerprint
from phikit.cli.app import app
from phikit.models.modality import AdapterConfig
from phikit.models.registry import build
from phikit.recipes import PIPELINES
from phikit.recipes.budget import budget
from phikit.recipes.config import MediaStage, PipelineConfig
from phikit.recipes.pipeline import stage_folders
from phikit.weights.surgery import attach, parts

NAMES = sorted(PIPELINES)
PIPELINE_OPTIONS = {"--set", "--dry-run", "--out", "--resume", "--from"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_json(name: str):
    config = PIPELINES[name]()
    again = PipelineConfig.resolve(json.loads(config.model_dump_json()))
    assert again == config
    assert fingerprint(again) == fingerprint(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_named_and_explained(name: str):
    config, recipe = PIPELINES[name](), PIPELINES[name]
    assert config.name == recipe.__name__ == name
    assert inspect.getdoc(recipe)
    stages = [stage.name for stage in config.stages]
    assert len(set(stages)) == len(stages) and "base" not in stages and "test" not in stages
    assert not any("-" in stage or "." in stage for stage in stages)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_on_meta_and_has_a_budget(name: str):
    config = PIPELINES[name]()
    with torch.device("meta"):
        model = build(config.base.model)
    costs = budget(config)
    total = sum(p.numel() for p in model.parameters())
    if config.modalities:
        for modality in config.modalities:
            attach(model, modality)
        stages = [stage for stage in config.stages if isinstance(stage, MediaStage)]
        learnt = {(name, part) for of in stages for name in of.learns for part in of.learns[name]}
        sizes = {
            (name, part): sum(p.numel() for p in of)
            for name in model.senses
            for part, of in parts(model, name)._asdict().items()
        }
        assert costs.parameters.total == total + sum(sizes.values())
        assert costs.parameters.trainable == sum(sizes[key] for key in learnt)
    elif config.lora is None:
        assert costs.parameters == (total, total)
    else:
        assert costs.parameters.total == total + costs.parameters.trainable
    assert [stage.name for stage in costs.stages] == [stage.name for stage in config.stages]


def test_another_adapter_is_another_stage_and_the_same_start(tmp_path: Path):
    """A run in the same folder uses no stage again that was made with another adapter."""
    config = PIPELINES["see_and_hear"]()
    vision, *others = config.modalities
    wider = vision.model_copy(update={"adapter": AdapterConfig(rank=64, alpha=128)})
    changed = config.model_copy(update={"modalities": (wider, *others)})
    for ours, theirs in zip(*(stage_folders(c, tmp_path) for c in (config, changed)), strict=True):
        assert isinstance(ours.stage, MediaStage)
        assert (ours.path == theirs.path) == ours.stage.is_start


@pytest.mark.parametrize("verb", ["run", "train"])
def test_the_options_of_a_pipeline_are_these_and_no_more(verb: str):
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[verb]
    flags = {flag for p in command.params if p.param_type_name == "option" for flag in p.opts}
    assert flags == PIPELINE_OPTIONS
    assert sum(p.param_type_name == "argument" for p in command.params) == 1
