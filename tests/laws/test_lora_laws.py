"""An adapter at zero, or switched off, is the base bit for bit; merged equals attached."""

import pytest
import torch

from phikit.models.dense import DenseModel
from phikit.nn.lora import LoRALinear, LowRank, attach_lora, choose_adapter, merge_lora

TOKENS = torch.arange(60).view(3, 20)
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def attach(
    model: DenseModel, name: str = "skill", *, drawn: bool = True
) -> list[torch.nn.Parameter]:
    trainable = attach_lora(model, name=name, targets=TARGETS, rank=4, alpha=8.0)
    if drawn:
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in trainable:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return trainable


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_zero_and_switched_off_it_is_the_base(tiny_model, dtype):
    base = tiny_model().to(dtype)(TOKENS)
    model = tiny_model().to(dtype)
    attach(model, drawn=False)
    assert torch.equal(model(TOKENS), base)
    attach(model, "drawn")
    assert not torch.equal(model(TOKENS), base)
    choose_adapter(model, None)
    assert torch.equal(model(TOKENS), base)
    choose_adapter(model, "skill")
    assert torch.equal(model(TOKENS), base)


@torch.no_grad()
def test_merged_is_attached(tiny_model):
    model = tiny_model()
    attach(model)
    attached = model(TOKENS)
    merge_lora(model, "skill")
    torch.testing.assert_close(model(TOKENS), attached, atol=1e-5, rtol=0)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert set(model.state_dict()) == set(tiny_model().state_dict())


@torch.no_grad()
def test_two_adapters_do_not_mix(tiny_model):
    both, one = tiny_model(), tiny_model()
    attach(both, "a")
    attach(both, "bb")
    attach(one, "bb")
    assert torch.equal(both(TOKENS), one(TOKENS))
    choose_adapter(both, "a")
    assert not torch.allclose(both(TOKENS), one(TOKENS))


def test_base_weights_keep_their_keys(tiny_model):
    base = tiny_model()
    model = tiny_model()
    attach(model)
    own = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert set(own) == set(base.state_dict())
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert all(".adapters.skill." in key for key in missing)
    assert not unexpected


def test_only_the_adapter_learns(tiny_model):
    model = tiny_model()
    trainable = attach(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable}
    model(TOKENS).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name), name
    assert all(p.grad is not None and bool(p.grad.any()) for p in trainable)


def test_gradient_is_that_of_the_dense_update(tiny_model):
    """With W' = W + s B A: dB = s dW' A^T and dA = s B^T dW'."""
    model = tiny_model()
    attach(model)
    model(TOKENS).square().mean().backward()
    dense = tiny_model()
    attach(dense)
    merge_lora(dense, "skill")
    dense.requires_grad_(True)
    dense(TOKENS).square().mean().backward()
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            adapter = module.adapters["skill"]
            assert isinstance(adapter, LowRank)
            gradient = dense.get_parameter(f"{path}.weight").grad
            assert gradient is not None
            expected_b = adapter.scale * gradient @ adapter.a_RD.T
            expected_a = adapter.scale * adapter.b_DR.T @ gradient
            torch.testing.assert_close(adapter.b_DR.grad, expected_b, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(adapter.a_RD.grad, expected_a, atol=1e-5, rtol=1e-3)


def test_adapters_of_one_seed_are_equal(tiny_model):
    first, again, other = (
        attach_lora(
            tiny_model(),
            name="a",
            targets=TARGETS,
            rank=2,
            alpha=4.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
