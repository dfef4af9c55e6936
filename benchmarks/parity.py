"""How far phikit is from transformers, family by family, on random tiny checkpoints.

    python -m benchmarks.parity

A checkpoint that transformers has made and saved is loaded by phikit, and one that phikit has saved
by transformers. The figures go into `docs/results/parity.json`, from which `make docs` makes the
table of docs/models.md. The tests in `tests/parity` assert the same and more; this prints how near.
"""

import json
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from phikit.base.errors import PhikitError
from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.decoder import Decoder
from phikit.models.multimodal import MultimodalConfig
from phikit.models.registry import FAMILIES, config_from_hf, config_to_hf
from phikit.nn.lora import attach_lora
from phikit.nn.speech import SpeechConfig
from phikit.nn.vision import VisionConfig
from phikit.weights.adapter import save_adapter
from phikit.weights.build import build_model
from phikit.weights.gguf_tokenizer import CONTROL, NORMAL, Tables, build_tokenizer
from phikit.weights.load import Loaded, load
from phikit.weights.multimodal import open_checkpoint
from phikit.weights.save import save

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "parity.json"
VOCABULARY, CONTEXT, ORIGINAL_CONTEXT, NEW_TOKENS = 300, 128, 32, 64
SEEDS = range(3)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.12,  # so that next tokens differ clearly in probability
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def phi3() -> Any:
    """LongRoPE with the switch inside the text, part of each head rotated."""
    from transformers import Phi3Config

    return Phi3Config(
        **SIZES,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=ORIGINAL_CONTEXT,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
            "long_factor": [1.0, 1.4, 2.2, 3.1, 4.5, 7.9],
        },
        tie_word_embeddings=True,
    )


def llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SIZES, tie_word_embeddings=True)


def phi() -> Any:
    from transformers import PhiConfig

    return PhiConfig(**SIZES, partial_rotary_factor=0.5)


def phimoe() -> Any:
    """Without LongRoPE: transformers never uses this family's long factors."""
    from transformers import PhimoeConfig

    return PhimoeConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=None,
    )


def phi4_multimodal() -> Any:
    """Text rows; `tests/parity/test_multimodal.py` adds images, clips, and both adapters."""
    from transformers import Phi4MultimodalConfig

    encoders = MultimodalConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_mlp=96,
        max_context=CONTEXT,
        partial_rotary=0.75,
        init_std=SIZES["initializer_range"],
        vision=VisionConfig(
            d_model=32,
            d_mlp=40,
            num_layers=3,
            num_heads=2,
            feature_layer=2,
            patch_size=7,
            crop_size=28,
            positions_per_side=4,
        ),
        speech=SpeechConfig(
            d_model=32,
            num_layers=2,
            num_heads=4,
            d_mlp=24,
            subsampling_channels=8,
            bias_max_distance=5,
        ),
        image_token=VOCABULARY - 2,
        audio_token=VOCABULARY - 1,
    )
    others = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": "float32"}
    return Phi4MultimodalConfig.from_dict(config_to_hf(encoders) | others)


CASES: dict[str, Callable[[], Any]] = {
    "phi3": phi3,
    "llama": llama,
    "phi": phi,
    "phimoe": phimoe,
    "phi4_multimodal": phi4_multimodal,
}
"""By `model_type`, the configuration that transformers is given."""


def main() -> None:
    """Measure every family, print, and write the results."""
    console = Console()
    families = {}
    for family in FAMILIES:
        for model_type in family.model_types:
            if model_type in CASES:
                families[model_type] = measure(CASES[model_type])
                console.print(model_type, families[model_type])
            else:
                console.print(f"{model_type}: not measured, transformers has nothing to compare")
    record = {
        "packages": {name: version(name) for name in ("torch", "transformers", "peft", "gguf")},
        "python": platform.python_version(),
        "families": families,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(make: Callable[[], Any]) -> dict[str, Any]:
    """The largest differences over the seeds."""
    found: dict[str, Any] = {}
    for seed in SEEDS:
        for key, value in compare(make, seed).items():
            if isinstance(value, bool):
                found[key] = found.get(key, True) and value
            elif isinstance(value, float):
                found[key] = max(found.get(key, 0.0), value)
            else:
                found[key] = value
    return found


def compare(make: Callable[[], Any], seed: int) -> dict[str, Any]:
    """Every figure of one random checkpoint."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(make(), attn_implementation="eager").eval()
    tokens = torch.randint(0, VOCABULARY, (2, 96))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        theirs.save_pretrained(place)
        values = json.loads((place / "config.json").read_text())
        config = config_from_hf(values)
        with open_checkpoint(place, config) as source:
            ours = build_model(config, source, dtype=None)
    return {
        "logits": distance(ours, theirs, tokens),
        "gradients": gradient_distance(ours, theirs, tokens),
        "greedy": same_tokens(ours, theirs, tokens[0, :20].tolist()),
        "saved": saved_distance(ours, tokens),
        "gguf": gguf_distance(ours, tokens),
        "adapter": adapter_distance(ours, tokens),
    }


@torch.no_grad()
def distance(ours: Decoder, theirs: Any, tokens: Tensor) -> float:
    """The largest difference of two logits."""
    return float((ours(tokens) - theirs(tokens).logits).abs().max())


def gradient_distance(ours: Decoder, theirs: Any, tokens: Tensor) -> float:
    """Relative distance of the gradients of the embeddings, which every layer goes into."""
    weights = torch.randn(*tokens.shape, VOCABULARY)
    gradients = []
    for model, logits in ((ours, ours(tokens)), (theirs, theirs(tokens).logits)):
        model.zero_grad()
        (logits.log_softmax(-1) * weights).sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def same_tokens(ours: Decoder, theirs: Any, prompt: list[int]) -> bool:
    """Whether greedy decoding goes the same way, across LongRoPE's switch where there is one."""
    [[completion]] = Engine(ours).generate([Request(prompt, NEW_TOKENS, temperature=0.0)])
    with torch.no_grad():
        made = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return completion.tokens == made[0, len(prompt) :].tolist()


def saved_distance(ours: Decoder, tokens: Tensor) -> float:
    """What phikit saved, read by transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(folder, speaking(ours))
        again = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    return distance(ours, again.eval(), tokens)


@torch.no_grad()
def gguf_distance(ours: Decoder, tokens: Tensor) -> float | None:
    """Written as BF16 and read again; None for a family that the format or we do not know."""
    from phikit.weights.gguf_out import save_gguf

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.gguf"
        try:
            save_gguf(place, speaking(ours.bfloat16()), quant="bf16")
        except PhikitError:
            return None
        finally:
            ours.float()
        again = load(place, dtype=torch.float32)
    return float((again.model(tokens) - ours(tokens)).abs().max())


def adapter_distance(ours: Decoder, tokens: Tensor) -> float:
    """A random adapter that phikit saved, attached by peft to what phikit saved."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "base", speaking(ours))
        base = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "base", dtype=torch.float32, attn_implementation="eager"
        )
        weights = attach_lora(ours, name="a", targets=("qkv_proj", "o_proj"), rank=4, alpha=8)
        with torch.no_grad():
            for weight in weights:
                weight.normal_(0.0, 0.1)
        save_adapter(Path(folder) / "adapter", ours, name="a")
        theirs = PeftModel.from_pretrained(base, Path(folder) / "adapter")
    return distance(ours, theirs.eval(), tokens)


def speaking(model: Decoder) -> Loaded:
    """The model with some tokenizer and renderer, which saving asks for."""
    letters = sorted(ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    kinds = [NORMAL] * len(letters) + [CONTROL] * len(specials)
    tokenizer = build_tokenizer(Tables("gpt2", "gpt-2", letters + specials, kinds, [], [], [], []))
    return Loaded(model, tokenizer, renderer_for(tokenizer, "smollm2"))


if __name__ == "__main__":
    main()
