"""A mixture of experts from nothing, routed as GRIN does it, beside a dense model of equal work."""

from phikit.models.dense import DenseConfig
from phikit.models.moe import MoEConfig
from phikit.nn.moe.router import SparseMixerConfig
from phikit.nn.moe.session import RoutingConfig
from phikit.recipes.config import (
    EvaluationConfig,
    MidStage,
    NewBase,
    PipelineConfig,
    PretrainStage,
)
from phikit.recipes.nano_reasoner import mid as nano_mid
from phikit.recipes.nano_reasoner import model as nano_model
from phikit.recipes.nano_reasoner import pretrain as nano_pretrain
from phikit.recipes.nano_reasoner import problems

ROUTING = RoutingConfig(balance="global", balance_coefficient=0.01)


def model() -> MoEConfig:
    """8 experts of half the dense block's width, two a token: 5.4 M weights, 1.8 M for a token.

    The released threshold, 0.01, leaves nearly all tokens a single candidate, of which a router
    that starts at random learns nothing; at 0.1 about half of them have more.
    """
    dense = nano_model()
    shared = dense.model_dump(exclude={"layout", "d_mlp"})
    own = {
        "d_mlp": dense.d_mlp // 2,
        "num_experts": 8,
        "top_k": 2,
        "router": SparseMixerConfig(jitter_eps=0.1),
        "norm": "rms",
        "attention_bias": False,
        "head_bias": False,
    }
    return MoEConfig.resolve(shared | own)


def beside() -> DenseConfig:
    """The dense model that does the same work for a token."""
    return nano_model()


def pretrain() -> PretrainStage:
    """The nano line's corpus, fewer steps: two models share the ten minutes."""
    stage = nano_pretrain()
    loop = stage.loop.model_copy(update={"routing": ROUTING, "steps": 350})
    return stage.model_copy(update={"documents": 20_000, "loop": loop})


def mid() -> MidStage:
    """Distilled chain of thought, on fewer traces than the nano line has."""
    stage = nano_mid()
    loop = stage.loop.model_copy(update={"routing": ROUTING})
    return stage.model_copy(update={"source": problems(6_000), "loop": loop})


def grin_nano() -> PipelineConfig:
    """Experts from nothing in ten minutes on two CPU cores, their routing drawn in the report."""
    return PipelineConfig(
        name="grin_nano",
        base=NewBase(model=model(), tokenizer_documents=6_000, tokenizer_traces=problems(3_000)),
        beside=beside(),
        stages=(pretrain(), mid()),
        evaluation=EvaluationConfig(source=problems(500), max_new_tokens=128),
    )
