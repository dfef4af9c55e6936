"""The published checkpoints of the families: their sizes, and how many parameters they have.

For tables, budgets and tests; loading a model reads the `config.json` beside its weights and never
this file. So LongRoPE's factors, lists of numbers that change no size, are here for Phi-4-mini
alone; for the others `original_context` says that they have some.

Sources: the `config.json` of each checkpoint, and the technical reports (arXiv 2306.11644,
2309.05463, 2404.14219, 2409.12136, 2412.08905, 2503.01743, 2506.18349). What no file or report
could be found for stands in `note`.
"""

from typing import NamedTuple

from phikit.models.decoder import DecoderConfig
from phikit.models.dense import DenseConfig
from phikit.models.moe import MoEConfig
from phikit.models.multimodal import LoraShape, MultimodalConfig
from phikit.models.phi import PhiConfig
from phikit.models.phi3_small import DUMMY_TOKENS, Phi3SmallConfig
from phikit.nn.rope import LongRope

# fmt: off
PHI4_MINI_LONG_FACTOR = (
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649,
    2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845,
    5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158,
    11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105,
    25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71,
    32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
)
# fmt: on


class Checkpoint(NamedTuple):
    """One published checkpoint."""

    hub_id: str
    config: DecoderConfig
    billions: str | None = None
    """Its parameters as published, in 10^9, with as many digits as the source gives."""
    active_billions: str | None = None
    """Those that one token meets, in a mixture of experts."""
    original_context: int | None = None
    """Context before LongRoPE's extension."""
    note: str = ""


def find(name: str) -> Checkpoint | None:
    """The checkpoint with this hub id, or the hub id without its owner; None if there is none."""
    wanted = name.lower()
    for checkpoint in CHECKPOINTS:
        hub_id = checkpoint.hub_id.lower()
        if wanted in (hub_id, hub_id.partition("/")[2]):
            return checkpoint
    return None


PHI_1 = PhiConfig(
    vocab_size=51_200,
    d_model=2048,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    head_dim=64,
    d_mlp=8192,
    max_context=2048,
)
PHI_2 = PHI_1.model_copy(
    update={
        "d_model": 2560,
        "num_layers": 32,
        "head_dim": 80,
        "d_mlp": 10_240,
        "partial_rotary": 0.4,
    }
)
PHI_3_MINI = DenseConfig(
    vocab_size=32_064,
    d_model=3072,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=96,
    d_mlp=8192,
    max_context=4096,
    sliding_window=2047,
    tie_embeddings=False,
)
PHI_3_MINI_LONG = PHI_3_MINI.model_copy(update={"max_context": 131_072, "sliding_window": 262_144})
PHI_3_SMALL = Phi3SmallConfig(
    vocab_size=100_352,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_mlp=14_336,
    max_context=8192,
    rope_theta=1_000_000.0,
    dummy_tokens=DUMMY_TOKENS,
)
PHI_3_MEDIUM = DenseConfig(
    vocab_size=32_064,
    d_model=5120,
    num_layers=40,
    num_heads=40,
    num_kv_heads=10,
    head_dim=128,
    d_mlp=17_920,
    max_context=4096,
    sliding_window=2047,
    tie_embeddings=False,
)
PHI_3_MEDIUM_LONG = PHI_3_MEDIUM.model_copy(
    update={"max_context": 131_072, "sliding_window": 131_072}
)
PHI_3_5_MOE = MoEConfig(
    vocab_size=32_064,
    d_model=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    d_mlp=6400,
    num_experts=16,
    max_context=131_072,
    sliding_window=131_072,
    tie_embeddings=False,
)
GRIN_MOE = PHI_3_5_MOE.model_copy(update={"max_context": 4096, "sliding_window": 2047})
PHI_MINI_MOE = GRIN_MOE.model_copy(update={"d_mlp": 960})
PHI_TINY_MOE = GRIN_MOE.model_copy(update={"d_mlp": 448, "num_heads": 16, "num_kv_heads": 4})
PHI_4 = PHI_3_MEDIUM.model_copy(
    update={
        "vocab_size": 100_352,
        "max_context": 16_384,
        "rope_theta": 250_000.0,
        "sliding_window": None,
    }
)
PHI_4_REASONING = PHI_4.model_copy(update={"max_context": 32_768, "rope_theta": 500_000.0})
PHI_4_MINI = DenseConfig(
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
    longrope=LongRope(
        short_factor=(1.0,) * 48, long_factor=PHI4_MINI_LONG_FACTOR, original_context=4096
    ),
)
PHI_4_MULTIMODAL = MultimodalConfig(
    **dict(PHI_4_MINI),
    vision_lora=LoraShape(rank=256, alpha=512.0),
    speech_lora=LoraShape(rank=320, alpha=640.0),
)
SMOLLM2_135M = DenseConfig(
    layout="llama",
    vocab_size=49_152,
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_mlp=1536,
    max_context=8192,
    rope_theta=100_000.0,
)

_WINDOW = "sliding_window recalled, not read in its file"
_SLIM = "sizes recalled, not read in its file; they give the published total"

CHECKPOINTS = (
    Checkpoint("microsoft/phi-1", PHI_1),
    Checkpoint("microsoft/phi-1_5", PHI_1),
    Checkpoint("microsoft/phi-2", PHI_2, billions="2.78"),
    Checkpoint("microsoft/Phi-3-mini-4k-instruct", PHI_3_MINI, billions="3.821"),
    Checkpoint(
        "microsoft/Phi-3-mini-128k-instruct",
        PHI_3_MINI_LONG,
        billions="3.821",
        original_context=4096,
        note=_WINDOW,
    ),
    Checkpoint(
        "microsoft/Phi-3-small-8k-instruct",
        PHI_3_SMALL,
        note="rope_theta recalled, not read in its file",
    ),
    Checkpoint(
        "microsoft/Phi-3-medium-4k-instruct",
        PHI_3_MEDIUM,
        billions="14",
        note="sizes as in its 128k sibling",
    ),
    Checkpoint(
        "microsoft/Phi-3-medium-128k-instruct",
        PHI_3_MEDIUM_LONG,
        billions="14",
        original_context=4096,
        note=_WINDOW,
    ),
    Checkpoint(
        "microsoft/Phi-3.5-mini-instruct",
        PHI_3_MINI_LONG,
        billions="3.821",
        original_context=4096,
        note=_WINDOW,
    ),
    Checkpoint(
        "microsoft/GRIN-MoE",
        GRIN_MOE,
        billions="42",
        active_billions="6.6",
        note="rope_theta, window and untied head recalled, not read in its file",
    ),
    Checkpoint(
        "microsoft/Phi-3.5-MoE-instruct",
        PHI_3_5_MOE,
        billions="41.87",
        active_billions="6.64",
        original_context=4096,
    ),
    Checkpoint(
        "microsoft/Phi-mini-MoE-instruct",
        PHI_MINI_MOE,
        billions="7.6",
        active_billions="2.4",
        note=_SLIM,
    ),
    Checkpoint("microsoft/Phi-tiny-MoE-instruct", PHI_TINY_MOE, billions="3.8", note=_SLIM),
    Checkpoint("microsoft/phi-4", PHI_4, billions="14.66"),
    Checkpoint("microsoft/Phi-4-reasoning", PHI_4_REASONING, billions="14.66"),
    Checkpoint("microsoft/Phi-4-reasoning-plus", PHI_4_REASONING, billions="14.66"),
    Checkpoint("microsoft/Phi-4-mini-instruct", PHI_4_MINI, billions="3.836"),
    Checkpoint(
        "microsoft/Phi-4-mini-reasoning",
        PHI_4_MINI,
        billions="3.836",
        note="taken to be as its base; not read in its file",
    ),
    Checkpoint("microsoft/Phi-4-multimodal-instruct", PHI_4_MULTIMODAL, billions="5.57"),
    Checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2_135M, billions="0.1345"),
)
"""In the order in which they came out, those of one family and size together."""
