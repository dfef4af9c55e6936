"""Recipes: functions that return complete configs. Adding one is a module and a line here."""

from collections.abc import Callable

from phikit.recipes.config import PipelineConfig
from phikit.recipes.grin_nano import grin_nano
from phikit.recipes.nano_reasoner import nano_reasoner
from phikit.recipes.phi4_mini_reasoning import phi4_mini_reasoning
from phikit.recipes.smol_reasoner import smol_reasoner, smol_reasoner_lora

PIPELINES: dict[str, Callable[[], PipelineConfig]] = {
    recipe.__name__: recipe
    for recipe in (nano_reasoner, grin_nano, smol_reasoner, smol_reasoner_lora, phi4_mini_reasoning)
}
