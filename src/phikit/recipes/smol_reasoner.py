"""The stages after pre-training on a real model: SmolLM2-135M-Instruct, from its GGUF package."""

from phikit.data.source import ProceduralSource
from phikit.models.catalogue import SMOLLM2_135M
from phikit.recipes.config import (
    DPOStage,
    EvaluationConfig,
    LoRAConfig,
    MidStage,
    PipelineConfig,
    PretrainedBase,
    RLStage,
    SFTStage,
)
from phikit.train.dpo import DPOConfig
from phikit.train.grpo import GRPOConfig
from phikit.train.lm import LMConfig
from phikit.train.loop import LoopConfig
from phikit.train.optim import OptimConfig
from phikit.train.sft import SFTConfig


def smol_reasoner() -> PipelineConfig:
    """Mid-training, SFT, rollout DPO and RL of SmolLM2-135M, in 47 minutes; see docs/smol.md."""
    return PipelineConfig(
        name="smol_reasoner",
        base=PretrainedBase(path="smollm2", model=SMOLLM2_135M),
        stages=(
            MidStage(
                name="mid",
                source=ProceduralSource(count=1200),
                lm=LMConfig(row_tokens=512, rows_per_step=8, micro_rows=4),
                loop=LoopConfig(
                    epochs=1,
                    checkpoint_every=10,
                    optim=OptimConfig(adam_lr=3e-4, warmup=0.1, decay=0.5),
                ),
            ),
            SFTStage(
                name="sft",
                source=ProceduralSource(count=400, steps={3: 0.2, 4: 0.3, 5: 0.5}),
                sft=SFTConfig(examples_per_step=32, micro_examples=16),
                loop=LoopConfig(
                    epochs=1,
                    checkpoint_every=5,
                    optim=OptimConfig(adam_lr=1e-4, warmup=0.1, decay=0.9),
                ),
            ),
            DPOStage(
                name="dpo",
                source=ProceduralSource(count=96),
                max_new_tokens=128,
                samples=8,
                dpo=DPOConfig(pairs_per_step=16, micro_pairs=8),
                loop=LoopConfig(epochs=1, checkpoint_every=5, optim=OptimConfig(adam_lr=5e-6)),
            ),
            RLStage(
                name="rl",
                source=ProceduralSource(count=400),
                grpo=GRPOConfig(
                    prompts_per_step=16,
                    group_size=8,
                    max_new_tokens=128,
                    micro_rows=16,
                    final_temperature=0.8,
                    negative_weight=0.25,
                ),
                loop=LoopConfig(steps=10, checkpoint_every=2, optim=OptimConfig(adam_lr=1e-5)),
            ),
        ),
        evaluation=EvaluationConfig(
            source=ProceduralSource(count=100), max_new_tokens=160, samples=4
        ),
    )


def smol_reasoner_lora() -> PipelineConfig:
    """The same stages with rank-16 adapters in place of full fine-tuning."""
    full = smol_reasoner()
    return full.model_copy(
        update={"name": "smol_reasoner_lora", "lora": LoRAConfig(rank=16, alpha=32.0)}
    )
