from typing import Any

import pytest
import torch
from torch import Tensor

from phikit.base.errors import ConfigError
from phikit.base.types import Example
from phikit.data.pack import batch_rows
from phikit.models.catalogue import SMOLLM2_135M
from phikit.models.dense import DenseConfig, DenseModel
from phikit.recipes import PIPELINES
from phikit.recipes.budget import budget
from phikit.recipes.config import PipelineConfig
from phikit.recipes.see_and_hear import see_and_hear
from phikit.train.lm import LMConfig, LMObjective
from phikit.train.optim import OptimConfig, Optimiser

MODEL = DenseConfig(
    vocab_size=512,
    d_model=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    d_mlp=256,
    max_context=256,
)


def nano(*assignments: str) -> PipelineConfig:
    return PIPELINES["nano_reasoner"]().override(assignments)


def test_tokens_are_exact_bounds_where_the_config_gives_steps():
    pretrain = budget(nano("stages.pretrain.loop.steps=10")).stages[0]
    assert pretrain.steps == (10, "exact")
    lm = nano().stages[0].lm  # pyright: ignore[reportAttributeAccessIssue]
    assert pretrain.trained_tokens == (10 * lm.rows_per_step * lm.row_tokens, "at most")
    assert pretrain.generated_tokens == (0, "exact")


def test_rollouts_count_prompts_groups_and_prompt_selection():
    settings = ("stages.rl.grpo.prompts_per_step=4", "stages.rl.grpo.group_size=2")
    plain, chosen = (
        budget(nano(*settings, "stages.rl.loop.steps=5", f"stages.rl.grpo.selection={choice}"))
        for choice in ("null", '{"candidates": 10, "samples": 4}')
    )
    first, second = plain.stages[-1].generated_tokens, chosen.stages[-1].generated_tokens
    assert first.value is not None and second.value is not None
    reply = first.value // (5 * 4 * 2)
    assert first.value == 5 * 4 * 2 * reply
    assert second.value == (5 * 4 * 2 + 10 * 4) * reply


def test_what_only_the_data_can_tell_is_unknown():
    costs = budget(
        PIPELINES["phi4_mini_reasoning"]().override(
            ["stages.mid.source.count=null", "evaluation.source.count=null"]
        )
    )
    assert costs.stages[0].trained_tokens.value is None
    assert costs.evaluation_tokens.value is None


def test_adapters_are_what_is_trained():
    costs = budget(PIPELINES["smol_reasoner_lora"]())
    assert 0 < costs.parameters.trainable < 0.05 * costs.parameters.total


def test_what_is_trained_is_what_some_stage_trains():
    mixture, full = (budget(see_and_hear(tuning=tuning)) for tuning in ("mixture", "full"))
    with torch.device("meta"):
        text = sum(p.numel() for p in DenseModel(SMOLLM2_135M).parameters())
    assert full.parameters.trainable == full.parameters.total > text
    assert mixture.parameters.trainable == mixture.parameters.total - text
    for ours, theirs in zip(mixture.stages, full.stages, strict=True):
        trains_text = ours.name in ("vision3", "vision4", "speech2", "joint")
        more = theirs.memory.optimiser - ours.memory.optimiser
        assert (more > 12 * text) == trains_text


def test_a_reader_is_trained_and_the_text_model_is_not():
    config = see_and_hear(without="see")
    start = config.stages[0].model_copy(update={"alone": None, "reader": MODEL})
    plain, read = (
        budget(config.model_copy(update={"stages": (stage, *config.stages[1:])}))
        for stage in (config.stages[0], start)
    )
    assert read.parameters == plain.parameters
    assert read.stages[0].memory.weights < plain.stages[0].memory.weights / 10


def test_an_adapter_that_is_not_there_is_missed_at_once():
    with pytest.raises(ConfigError, match=r"stages\.vision3\.learns: 'vision' has no adapter"):
        see_and_hear().override(["modalities.vision.adapter=null"])


def test_an_adapter_of_the_text_model_is_none_of_the_senses():
    """It would freeze what the stages are to train."""
    with pytest.raises(ConfigError, match=r"lora: .*modalities\.NAME\.adapter"):
        see_and_hear().override(['lora={"rank": 4, "alpha": 8}'])


def test_the_memory_of_the_optimiser_is_that_of_its_tensors():
    optim = OptimConfig(adam_lr=1e-3, muon_lr=1e-2)
    config = nano(
        "dtype=float32",
        f"base.model={MODEL.model_dump_json()}",
        f"stages.pretrain.loop.optim={optim.model_dump_json()}",
    )
    model = DenseModel(MODEL)
    optimiser = Optimiser(model.named_parameters(), optim)
    groups = (optimiser.master, optimiser.gradient, optimiser.first, optimiser.second)
    held = sum(t.nbytes for group in groups for t in group.values())
    gradients = sum(p.nbytes for p in model.parameters())
    estimated = budget(config).stages[0].memory
    assert estimated.weights == sum(p.nbytes for p in model.parameters())
    assert estimated.optimiser == pytest.approx(held + gradients, abs=64)


def test_activations_are_about_what_the_backward_pass_keeps():
    rows, length = 8, 128
    config = nano(
        "dtype=float32",
        f"base.model={MODEL.model_dump_json()}",
        f'stages.pretrain.lm={{"row_tokens": {length}, "rows_per_step": 8, "micro_rows": {rows}}}',
    )
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = DenseModel(MODEL).initialise(torch.Generator().manual_seed(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = torch.arange(length).int().numpy()
    example = Example(tokens=tokens, loss_mask=tokens >= 0)
    objective = LMObjective(
        [example] * rows, LMConfig(row_tokens=length, rows_per_step=rows, micro_rows=rows), seed=0
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = objective.loss(model, batch_rows([[example]] * rows))
    measured = sum(size for place, size in kept.items() if place not in weights)
    assert output.total.requires_grad
    estimated = budget(config).stages[0].memory.activations - 3 * 4 * (1 << 22)
    assert estimated == pytest.approx(measured, rel=0.15)
