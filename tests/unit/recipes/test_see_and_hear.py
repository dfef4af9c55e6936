"""What the recipe's own parameters change."""

import pytest

from phikit.base.errors import ConfigError
from phikit.cli.settings import own_settings, recipe
from phikit.recipes.config import MediaStage, NewBase, PipelineConfig
from phikit.recipes.see_and_hear import see_and_hear
from phikit.weights.surgery import Part


def learning(config: PipelineConfig) -> dict[str, dict[str, tuple[Part, ...]]]:
    return {stage.name: stage.learns for stage in config.stages if isinstance(stage, MediaStage)}


def test_the_stages_are_those_of_the_report():
    learns = learning(see_and_hear())
    assert learns["vision1"] == {"vision": ("projector",)}
    assert learns["vision2"] == {"vision": ("projector", "encoder")}
    assert learns["vision3"] == {"vision": ("projector", "encoder", "adapter")}
    assert learns["vision4"] == {"vision": ("projector", "adapter")}
    assert learns["speech1"] == {"speech": ("projector", "encoder")}
    assert learns["speech2"] == {"speech": ("projector", "adapter")}
    assert "adapter" not in learns["joint"]["speech"] and "encoder" not in learns["joint"]["speech"]


def test_one_adapter_for_all():
    config = see_and_hear(tuning="shared")
    vision, speech = config.modalities
    assert vision.adapter is not None and speech.adapter is None and speech.borrows == "vision"
    learns = learning(config)
    assert learns["speech2"] == {"speech": ("projector",), "vision": ("adapter",)}
    assert learns["vision3"]["vision"] == ("projector", "encoder", "adapter")


def test_full_fine_tuning_trains_the_text_model_where_adapters_would():
    config = see_and_hear(tuning="full")
    assert all(modality.adapter is None for modality in config.modalities)
    trained = [s.name for s in config.stages if isinstance(s, MediaStage) and s.backbone]
    assert trained == ["vision3", "vision4", "speech2", "joint"]


def test_settings_of_a_recipe_are_set_like_all_others():
    config, left = recipe("see_and_hear", ["backbone=nano", "seed=3", "without=vision2"])
    assert isinstance(config.base, NewBase) and left == ["seed=3"]
    names = [stage.name for stage in config.stages]
    assert names[0] == "pretrain" and "vision2" not in names and "vision3" in names
    with pytest.raises(ConfigError, match="did you mean backbone"):
        recipe("see_and_hear", ["backbon=nano"])
    for wrong in ("backbone=giant", "tuning=none", "without=vision9"):
        with pytest.raises(ConfigError):
            recipe("see_and_hear", [wrong])


def test_settings_of_a_recipe_are_listed():
    assert own_settings("see_and_hear") == [
        "backbone=smollm2|nano", "tuning=mixture|shared|full", "without=..."
    ]  # fmt: skip
    assert own_settings("nano_reasoner") == []


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("stages.see.source.families.cats=2", "source.families: no family 'cats'; there are text"),
        ("stages.see.source.families.text=-1", "families.text"),
        ('stages.see.source.families={"text": 0}', "no problem of any"),
        ('stages.see.source={"kind": "media_file", "layout": "parquet", "path": "x"}', "reader"),
        ('stages.see.learns={"smell": ["encoder"]}', "encoder of vision"),
        ('stages.vision1.learns={"smell": ["encoder"]}', "there are speech, vision"),
    ],
)
def test_mistakes_are_found_before_anything_runs(setting: str, fault: str):
    with pytest.raises(ConfigError, match=fault):
        see_and_hear().override([setting])
