"""Phi-4-Mini-Reasoning at its real scale: 3.8 B parameters, the paper's hyper-parameters.

Steps, batch sizes and learning rates are those reported for arXiv 2504.21233 (the DPO batch, its
beta and the reinforcement learning batch are unpublished; here they are this project's choices).
The data are public sets of verified long chains of thought in place of the unpublished ones. It
needs a cluster of GPUs; on a laptop `--dry-run` prints the budget.
"""

from phikit.data.source import HubSource
from phikit.models.dense import DenseConfig
from phikit.nn.rope import LongRope
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

# fmt: off
LONG_FACTOR = (
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)
# fmt: on

TRACES = HubSource(
    id="open-r1/OpenR1-Math-220k", question="problem", answer="answer", solution="solution"
)


def model() -> DenseConfig:
    """Phi-4-mini: 3.836 B parameters, a tied vocabulary of 200 064, LongRoPE to 128 K tokens."""
    return DenseConfig(
        vocab_size=200_064,
        d_model=3072,
        num_layers=32,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        d_mlp=8192,
        max_context=131_072,
        partial_rotary=0.75,
        sliding_window=262_144,
        longrope=LongRope(short_factor=(1.0,) * 48, long_factor=LONG_FACTOR, original_context=4096),
    )


def phi4_mini_reasoning() -> PipelineConfig:
    """microsoft/Phi-4-mini-instruct to a reasoner: the published recipe, for a GPU cluster."""
    return PipelineConfig(
        name="phi4_mini_reasoning",
        base=HubBase(id="microsoft/Phi-4-mini-instruct", model=model()),
        stages=(
            MidStage(
                name="mid",
                source=TRACES,
                lm=LMConfig(row_tokens=16_384, rows_per_step=128, micro_rows=1),
                loop=LoopConfig(epochs=5, optim=OptimConfig(adam_lr=1e-5, warmup=0.1)),
            ),
            SFTStage(
                name="sft",
                source=TRACES.model_copy(update={"count": 200_000}),
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
            source=HubSource(id="HuggingFaceH4/MATH-500", rows_of="test", question="problem"),
            max_new_tokens=25_600,
        ),
    )
