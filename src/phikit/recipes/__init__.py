"""Recipes: functions that return complete configs. Adding one is a module and a line here."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from phikit.base.progress import Progress
from phikit.recipes.config import PipelineConfig
from phikit.recipes.grin_nano import grin_nano
from phikit.recipes.nano_reasoner import nano_reasoner
from phikit.recipes.phi4_mini_reasoning import phi4_mini_reasoning
from phikit.recipes.see_and_hear import hear_recordings, see_and_hear, see_modular
from phikit.recipes.smol_reasoner import smol_reasoner, smol_reasoner_lora

if TYPE_CHECKING:
    from phikit.recipes.pipeline import Pipeline

PIPELINES: dict[str, Callable[..., PipelineConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        nano_reasoner,
        grin_nano,
        smol_reasoner,
        smol_reasoner_lora,
        phi4_mini_reasoning,
        see_and_hear,
        see_modular,
        hear_recordings,
    )
}


def pipeline_for(config: PipelineConfig, out: Path, *, progress: Progress) -> "Pipeline":
    """The pipeline of a config in a folder: one with modalities has an evaluation of its own."""
    from phikit.recipes.pipeline import Pipeline
    from phikit.recipes.sense_pipeline import SensePipeline

    kind = SensePipeline if config.modalities else Pipeline
    return kind(config, out, progress=progress)
