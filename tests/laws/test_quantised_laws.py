"""Laws of quantised weights: their layout, and what a model of them shares with its original."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.chat.render import renderer_for
from phikit.models.decoder import Decoder
from phikit.models.moe import MoEConfig, MoEModel
from phikit.nn.lora import add_adapters, choose_adapter, lora_linears, route_adapters
from phikit.nn.quantised import PackedWeight, QuantConfig, QuantEmbedding, QuantLinear
from phikit.weights.calibrate import gptq
from phikit.weights.load import Loaded
from phikit.weights.quantise import quantise
from phikit.weights.scales import LIMITS, choose_scales, nearest

SHAPES = ((16, 32, 32), (20, 128, 64), (48, 96, 32), (3, 256, 128))
"""Rows, columns, group: a whole panel, a part of one, several, less than one."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight_OI: Tensor, *, bits: int, group: int) -> PackedWeight:
    packed = PackedWeight(weight_OI.shape, bits=bits, group=group)
    scales_OG = choose_scales(weight_OI, bits=bits, group=group)
    packed.fill(nearest(weight_OI, scales_OG, bits=bits), scales_OG)
    return packed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "width", "group"), SHAPES)
def test_every_integer_comes_back_from_where_the_layout_puts_it(
    bits: int, rows: int, width: int, group: int
):
    generator = torch.Generator().manual_seed(rows)
    low, high = LIMITS[bits]
    q_OI = torch.randint(low, high + 1, (rows, width), generator=generator)
    scales_OG = drawn(rows, width // group).bfloat16().float()
    weight = PackedWeight((rows, width), bits=bits, group=group)
    weight.fill(q_OI, scales_OG)
    exact_OI = q_OI * scales_OG.repeat_interleave(group, 1)
    assert torch.equal(weight.dequantise(torch.float32), exact_OI)
    ids = torch.randint(0, rows, (2, 5), generator=generator)
    assert torch.equal(weight.rows(ids), exact_OI[ids])

    # The same by the words of the definition, for the last row and the last group.
    row, columns = rows - 1, 32 // bits
    stored = weight.packed[row // 16, -1].tolist()
    for k in range(group):
        vector, inside = divmod(k, columns)
        j, p = divmod(inside, 2)
        word = 32 * vector + 2 * (row % 16) + p
        value = (stored[2 * word] | stored[2 * word + 1] << 8) >> bits * j & (1 << bits) - 1
        number = value - 8 if bits == 4 else value - 256 * (value > 127)
        assert number == q_OI[row, width - group + k]


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_at_most_half_a_step_off(bits: int):
    weight_OI = drawn(40, 128)
    scales_OG = choose_scales(weight_OI, bits=bits, group=32)
    steps_OI = scales_OG.abs().repeat_interleave(32, 1)
    packed = rounded(weight_OI, bits=bits, group=32)
    error_OI = (packed.dequantise(torch.float32) - weight_OI).abs()
    position_OI = weight_OI / scales_OG.repeat_interleave(32, 1)
    low, high = LIMITS[bits]
    inside = (position_OI >= low - 0.5) & (position_OI <= high + 0.5)
    assert inside.float().mean() > 0.97
    assert (error_OI <= steps_OI / 2 * (1 + 1e-5))[inside].all()


def test_zeros_stay_zeros():
    for bits in (4, 8):
        packed = rounded(torch.zeros(5, 64), bits=bits, group=32)
        assert not packed.dequantise(torch.float32).any()


def test_a_searched_scale_is_no_worse_than_the_plain_one():
    weight_OI = drawn(64, 256)
    found = rounded(weight_OI, bits=4, group=32).dequantise(torch.float32)
    groups = weight_OI.unflatten(1, (-1, 32))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    plain = (extreme / -8).bfloat16().float()
    kept = nearest(weight_OI, plain, bits=4) * plain.repeat_interleave(32, 1)
    error, plain_error = ((each - weight_OI).square().mean() for each in (found, kept))
    assert error < 0.95 * plain_error


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_is_that_of_the_dequantised_matrix(bits: int, rows: int, inference: bool):
    """By torch, and in inference mode by the kernels where there are any."""
    weight = rounded(drawn(52, 128, seed=1), bits=bits, group=32)
    x, bias = drawn(rows, 128, seed=2), drawn(52, seed=3)
    exact = F.linear(x.double(), weight.dequantise(torch.float64), bias.double())
    with torch.inference_mode(inference):
        y = weight.product(x, bias=bias)
    assert (y - exact).abs().max() < 1e-3 * exact.abs().max()
    with torch.inference_mode(inference):
        rough = weight.product(x.bfloat16(), bias=bias.bfloat16())
    assert (rough - exact).abs().max() < 2e-2 * exact.abs().max()


def test_scales_keep_their_precision_when_the_model_changes_its_own():
    weight = rounded(drawn(16, 32), bits=4, group=32)
    before = weight.dequantise(torch.float32)
    weight.to(torch.float16).to(torch.float64)
    assert weight.scales.dtype == torch.bfloat16
    assert torch.equal(weight.dequantise(torch.float32), before)


def test_gptq_is_nearer_than_rounding_on_what_it_was_calibrated_on():
    """Correlated inputs, some of them large, as those of a real layer are."""
    mixing = drawn(96, 96, seed=1) * torch.linspace(0.05, 2.0, 96)
    x_SI = drawn(600, 96, seed=2) @ mixing
    weight_OI = drawn(40, 96, seed=3)
    for bits in (4, 8):
        q_OI, scales_OG = gptq(weight_OI, x_SI.T @ x_SI / len(x_SI), bits=bits, group=32)
        learnt = PackedWeight(weight_OI.shape, bits=bits, group=32)
        learnt.fill(q_OI, scales_OG)
        plain = rounded(weight_OI, bits=bits, group=32)
        error, plain_error = (
            (x_SI @ (each.dequantise(torch.float32) - weight_OI).T).square().mean()
            for each in (learnt, plain)
        )
        assert error < 0.6 * plain_error


def test_gptq_on_inputs_that_are_all_zero_rounds():
    weight_OI = drawn(16, 64)
    q_OI, scales_OG = gptq(weight_OI, torch.zeros(64, 64), bits=8, group=32)
    assert torch.equal(q_OI, nearest(weight_OI, scales_OG, bits=8))


# --- Models -------------------------------------------------------------------------------------

TOKENS_BT = torch.randint(0, 290, (2, 40), generator=torch.Generator().manual_seed(1))
ROWS = torch.randint(0, 290, (24, 64), generator=torch.Generator().manual_seed(2)).tolist()
FITTING = {"d_model": 64, "d_mlp": 96}


@pytest.fixture(scope="module")
def packed(nano_tokenizer) -> Callable[..., Decoder]:
    """Quantises a model: `packed(model, bits=4, method="gptq")`."""

    def run(model: Decoder, **settings: object) -> Decoder:
        loaded = Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
        quantise(loaded, QuantConfig.resolve(settings), calibration=ROWS)
        return model

    return run


def divergence(original: Decoder, changed: Decoder) -> float:
    with torch.no_grad():
        theirs, ours = (model(TOKENS_BT).log_softmax(-1) for model in (original, changed))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def tiny_moe(seed: int = 0) -> MoEModel:
    config = MoEConfig(
        vocab_size=300, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        d_mlp=96, num_experts=4, max_context=128, init_std=0.12,
    )  # fmt: skip
    return MoEModel(config).initialise(torch.Generator().manual_seed(seed))


def test_eight_bits_are_near_and_four_bits_nearer_with_gptq(tiny_model, packed):
    original = tiny_model(**FITTING)
    eight = divergence(original, packed(tiny_model(**FITTING), bits=8))
    four = divergence(original, packed(tiny_model(**FITTING), bits=4))
    learnt = divergence(original, packed(tiny_model(**FITTING), bits=4, method="gptq"))
    assert eight < 1e-3 < learnt < four < 0.1


def test_tied_embeddings_and_head_share_their_memory(tiny_model, packed):
    for embedding_bits in (4, 8):
        model = packed(tiny_model(**FITTING), embedding_bits=embedding_bits)
        assert isinstance(model.model.embed_tokens, QuantEmbedding)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.bits == embedding_bits
        model.to(torch.bfloat16).to("cpu")
        assert model.lm_head.weight.packed is model.model.embed_tokens.weight.packed
    kept = packed(tiny_model(**FITTING), embedding_bits=16)
    assert kept.lm_head.weight is kept.model.embed_tokens.weight
    assert isinstance(kept.lm_head.weight, torch.nn.Parameter)


def test_a_quantised_model_is_the_model_of_its_dequantised_weights(tiny_model, packed):
    """Prompts and single tokens alike, whichever way the product is computed."""
    model, plain = packed(tiny_model(**FITTING), bits=4), tiny_model(**FITTING)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, QuantLinear | QuantEmbedding):
                weight = module.weight.dequantise(torch.float32)
                plain.get_submodule(path).weight.copy_(weight)
        wanted = plain(TOKENS_BT)
        assert (model(TOKENS_BT) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with torch.inference_mode():
        near = model(TOKENS_BT[:1, :8])
    assert (near - wanted[:1, :8]).abs().max() < 2e-3 * wanted.abs().max()


def test_experts_are_quantised_each_by_the_tokens_sent_to_it(packed):
    original = tiny_moe()
    four = divergence(original, packed(tiny_moe(), bits=4, embedding_bits=16))
    learnt = divergence(original, packed(tiny_moe(), bits=4, embedding_bits=16, method="gptq"))
    eight = divergence(original, packed(tiny_moe(), bits=8))
    assert eight < 0.01 and max(four, learnt) < 0.3
    model = packed(tiny_moe(), bits=8)
    with torch.no_grad():
        whole = model(TOKENS_BT[:1])
        one = model(TOKENS_BT[:1, :1])
    assert torch.allclose(one, whole[:, :1], atol=1e-5)


def test_adapters_on_a_quantised_base_are_adapters_on_the_dequantised_one(tiny_model, packed):
    targets = ("qkv_proj", "down_proj")
    model, plain = packed(tiny_model(**FITTING), bits=4), tiny_model(**FITTING)
    for each in (model, plain):
        generator = torch.Generator().manual_seed(4)
        for name in ("one", "two"):
            added = add_adapters(
                each, name=name, targets=targets, rank=4, alpha=8.0, generator=generator
            )
            with torch.no_grad():
                for parameter in added:
                    parameter.normal_(0, 0.2, generator=generator)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, QuantLinear | QuantEmbedding):
                weight = module.weight.dequantise(torch.float32)
                plain.get_submodule(path).weight.copy_(weight)
        logits = []
        for each in (model, plain):
            with route_adapters(each, ["one", None]):
                logits.append(each(TOKENS_BT))
            choose_adapter(each, "two")
            logits.append(each(TOKENS_BT))
    routed, chosen, plain_routed, plain_chosen = logits
    assert (routed - plain_routed).abs().max() < 1e-5 * routed.abs().max()
    assert (chosen - plain_chosen).abs().max() < 1e-5 * chosen.abs().max()
    assert (chosen - routed).abs().max() > 0.1
    assert len(list(lora_linears(model))) == 4
