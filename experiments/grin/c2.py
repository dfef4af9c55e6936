"""**Hypothesis.** The library computes what transformers' PhiMoE computes, in evaluation and, given
the same random numbers, in training.

**Measure.** Random PhiMoE models of two layers and five experts, saved by transformers and read
by phikit: largest difference of a logit, and of a gradient relative to its norm, at three
thresholds of the candidate mask. The router by itself, 16 experts and 400 tokens: whether
choices and gates are equal bit for bit in evaluation; in training, with both sides fed the same
numbers, whether choices are equal, and the largest difference of a gate and of the scores'
gradient. The released code writes 0.3333 where the method has 1/3, so gates may differ by 1e-4
of their size there.

**Decision.** Reproduced if logits differ by less than 1e-5, gradients by less than 1e-4 of their
norm, evaluation is equal bit for bit, and choices in training are equal; contradicted otherwise.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from experiments.grin.claim import Claim, Verdict
from torch import Tensor

from phikit.models.registry import config_from_hf
from phikit.nn.moe.estimator import sparse_mixer
from phikit.weights.build import build_model
from phikit.weights.safetensors_files import open_folder

THRESHOLDS = (0.01, 0.1, 0.5)
LOGITS, GRADIENTS = 1e-5, 1e-4


class AsTransformers:
    """The numbers that transformers draws, in its order; before the second coin it wastes one."""

    def __init__(self) -> None:
        self.coins = 0

    def exponential(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).exponential_()

    def uniform(self, like: Tensor) -> Tensor:
        self.coins += 1
        coin = torch.rand_like(like)
        return coin if self.coins == 1 else coin.uniform_()


def models(threshold: float) -> dict[str, float]:
    """Whole models on random text: logits in evaluation, gradients of the routers among them."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        max_position_embeddings=256,
        attention_bias=True,
        lm_head_bias=True,
        router_jitter_noise=threshold,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    config._experts_implementation = "eager"
    theirs = PhimoeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.data.normal_(centre, 0.15, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        values = json.loads((Path(folder) / "config.json").read_text())
        with open_folder(Path(folder)) as source:
            ours = build_model(config_from_hf(values), source, dtype=None).eval()
    tokens = torch.randint(0, 300, (4, 40), generator=generator)
    a, b = ours(tokens), theirs(tokens).logits
    for logits in (a, b):
        flat = logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten()).backward()
    pairs = [
        (ours.get_parameter(f"model.layers.{k}.mlp.{name}"), theirs.get_parameter(path))
        for k in range(2)
        for name, path in (
            ("router.gate.weight", f"model.layers.{k}.mlp.router.weight"),
            ("experts.down_proj.weight", f"model.layers.{k}.mlp.experts.down_proj"),
        )
    ]
    return {
        "logits": float((a - b).detach().abs().max()),
        "gradients": max(relative(x.grad, y.grad) for x, y in pairs),
    }


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    """Distance over the norm of what is expected, 0 if both are 0."""
    assert found is not None and expected is not None
    size = float(expected.norm())
    return float((found - expected).norm()) / size if size else float(found.norm())


def routers(threshold: float) -> dict[str, Any]:
    """The routing rule by itself."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    generator = torch.Generator().manual_seed(11)
    weights = torch.randn(400, 2, generator=generator)
    drawn = torch.randn(400, 16, generator=generator)
    ours, theirs = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    gates, ids = sparsemixer(theirs, jitter_eps=threshold, training=False)
    found = sparse_mixer(ours, num_choices=2, jitter_eps=threshold)
    is_equal = torch.equal(found.gates_TC, gates) and torch.equal(found.ids_TC, ids)
    torch.manual_seed(5)
    gates, ids = sparsemixer(theirs, jitter_eps=threshold, training=True)
    torch.manual_seed(5)
    found = sparse_mixer(ours, num_choices=2, jitter_eps=threshold, draws=AsTransformers())
    [a] = torch.autograd.grad((found.gates_TC * weights).sum(), ours)
    [b] = torch.autograd.grad((gates * weights).sum(), theirs)
    return {
        "evaluation_equal": is_equal,
        "choices_equal": torch.equal(found.ids_TC, ids),
        "gates": float((found.gates_TC - gates).detach().abs().max()),
        "router_gradient": float((a - b).abs().max()),
    }


def measure() -> tuple[dict[str, Any], Verdict]:
    figures = {str(x): models(x) | routers(x) for x in THRESHOLDS}
    holds = all(
        row["logits"] < LOGITS
        and row["gradients"] < GRADIENTS
        and row["evaluation_equal"]
        and row["choices_equal"]
        for row in figures.values()
    )
    worst = max(row["logits"] for row in figures.values())
    words = f"Largest difference of a logit: {worst:.1e}."
    return figures, Verdict("reproduced" if holds else "contradicted", words, [])


CLAIM = Claim(number="C2", title="Parity with transformers", words=__doc__ or "", measure=measure)
