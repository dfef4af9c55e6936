"""Routing maps: kinds of tokens, shares that add up, losses that are the model's own."""

import pytest
import torch

from phikit.chat.tokenizer import Tokenizer
from phikit.evals.experts import KINDS, expert_map, kind_of, routed
from phikit.evals.report import render_report
from phikit.models.moe import MoEConfig, MoEModel
from phikit.nn.moe.router import TopKConfig

EXPERTS, CHOICES, LAYERS = 4, 2, 3
ROWS = ([1, 40, 41, 42, 260, 261, 0], [5, 6, 7, 8, 9], [200, 201])


@pytest.fixture(scope="module")
def model(nano_tokenizer: Tokenizer) -> MoEModel:
    config = MoEConfig(
        vocab_size=nano_tokenizer.size + 3,
        d_model=16,
        num_layers=LAYERS,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_mlp=8,
        max_context=32,
        num_experts=EXPERTS,
        top_k=CHOICES,
        router=TopKConfig(),
        init_std=0.2,
    )
    return MoEModel(config).initialise(torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("7", "digits"),
        (" 12", "digits"),
        (" +", "operators"),
        ("=", "operators"),
        (" apples", "words"),
        ("Anna", "words"),
        ("les", "word parts"),
        ("\n", "white space"),
        ("?", "punctuation"),
        ("'s", "punctuation"),
        ("\ufffd", "punctuation"),
    ],
)
def test_kinds(text: str, kind: str):
    assert kind_of(text) == kind
    assert kind_of(text, is_special=True) == "special"


def test_shares_add_up_and_losses_are_the_models(model: MoEModel, nano_tokenizer: Tokenizer):
    found = expert_map(model, nano_tokenizer, ROWS)
    assert set(found.kinds) <= set(KINDS) and sum(found.tokens) == sum(len(r) - 1 for r in ROWS)
    assert len(found.load) == LAYERS
    for layer in found.load:
        assert len(layer) == len(found.kinds)
        for shares in layer:
            assert len(shares) == EXPERTS and sum(shares) == pytest.approx(1)
            assert max(shares) <= 1 / CHOICES + 1e-6  # choices of a token differ
    with torch.no_grad():
        nll = [
            -model(torch.tensor([row]))[0, :-1].log_softmax(-1)[range(len(row) - 1), row[1:]]
            for row in ROWS
        ]
    assert found.loss == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)


def test_watching_changes_nothing_and_ends(model: MoEModel):
    tokens = torch.tensor([ROWS[0]])
    before = model(tokens)
    with routed(model) as seen:
        assert torch.equal(model(tokens), before)
    model(tokens)
    assert [len(layer) for layer in seen] == [1] * LAYERS


def test_the_report_draws_a_panel_for_each_layer(model: MoEModel, nano_tokenizer: Tokenizer):
    experts = expert_map(model, nano_tokenizer, ROWS).to_dict()
    curve = [{"step": step, "loss": 3.0} for step in (1, 2, 3)]
    versus = {"delta": 0.1, "stderr": 0.1, "low": -0.1, "high": 0.3, "n": 9}
    stage = {"name": "mid", "experts": experts, "metrics": curve, "versus": versus}
    other = {"name": "beside: mid", "experts": {**experts, "load": []}, "metrics": curve}
    page = render_report({"stages": [stage], "beside": [other]})
    assert page.count("<svg") == 3  # the loss of both, loads, losses by kind
    for layer in range(LAYERS):
        assert f"layer {layer}" in page
    assert "beside: mid" in page and "+10.0 [−10.0, +30.0] within noise" in page
    alone = render_report({"stages": [{"name": "mid", "metrics": curve}]})
    assert alone.count("<svg") == 1 and "Experts" not in alone
