"""Phi-4-Mini-Reasoning at its real scale: 3.8 B parameters, the paper's hyper-parameters.

Steps, batch sizes and learning rates are those reported for arXiv 2504.21233 (the DPO batch, its
beta and the reinforcement learning batch are unpublished; here they are this project's choices).
The data are public sets of verified long chains of thought in place of the unpublished ones. It
needs a cluster of GPUs; on a laptop `--dry-run` prints the budget.
"""

from phikit.data.source import HubSource
from phikit.models.catalogue import PHI_4_MINI
from phikit.recipes.config import (
    DPOStage,
    EvaluationConfig,
    HubBase,
    MidStage,
    PipelineConfig,
    RLStage,
    SFTStage,
)
from phikit.train.dpo import DPOConfig
from phikit.train.grpo import GRPOConfig, PromptSelection
from phikit.train.lm import LMConfig
from phikit.train.loop import LoopConfig
from phikit.train.optim import OptimConfig
from phikit.train.sft import SFTConfig

TRACES = HubSource(
    id="open-r1/OpenR1-Math-220k",
    question="problem",
    answer="answer",
    solution="messages",  # a trace of DeepSeek-R1; the column "solution" is written by people
    count=90_000,
    license="Apache-2.0",
)


def phi4_mini_reasoning() -> PipelineConfig:
    """microsoft/Phi-4-mini-instruct to a reasoner: the published recipe, for a GPU cluster."""
    return PipelineConfig(
        name="phi4_mini_reasoning",
        base=HubBase(id="microsoft/Phi-4-mini-instruct", model=PHI_4_MINI),
        stages=(
            MidStage(
                name="mid",
                source=TRACES,
                lm=LMConfig(row_tokens=16_384, rows_per_step=128, micro_rows=1),
                loop=LoopConfig(epochs=5, optim=OptimConfig(adam_lr=1e-5, warmup=0.1)),
            ),
            SFTStage(
                name="sft",
                source=TRACES.model_copy(update={"count": 50_000}),
                sft=SFTConfig(examples_per_step=128, micro_examples=1),
                loop=LoopConfig(epochs=5, optim=OptimConfig(adam_lr=1e-5, warmup=0.1)),
            ),
            DPOStage(
                name="dpo",
                source=TRACES.model_copy(update={"count": 40_000}),
                max_new_tokens=16_384,
                dpo=DPOConfig(pairs_per_step=128, micro_pairs=1),
                loop=LoopConfig(epochs=1, optim=OptimConfig(adam_lr=5e-7)),
            ),
            RLStage(
                name="rl",
                source=TRACES.model_copy(update={"count": 20_000}),
                grpo=GRPOConfig(
                    prompts_per_step=128,
                    group_size=8,
                    max_new_tokens=25_600,
                    micro_rows=1,
                    max_group_accuracy=0.5,
                    selection=PromptSelection(candidates=20_000),
                ),
                loop=LoopConfig(steps=200, checkpoint_every=10, optim=OptimConfig(adam_lr=5e-7)),
            ),
        ),
        evaluation=EvaluationConfig(
            source=HubSource(
                id="HuggingFaceH4/MATH-500",
                rows_of="test",
                question="problem",
                count=500,
                is_benchmark=True,
            ),
            max_new_tokens=25_600,
        ),
    )
