"""An adapter at zero, switched off or on other rows is the base bit for bit; merged = attached."""

import pytest
import torch

from phikit.base.errors import ConfigError
from phikit.models.dense import DenseModel
from phikit.nn.lora import (
    LoRALinear,
    LowRank,
    attach_lora,
    choose_adapter,
    merge_lora,
    route_adapters,
    route_of,
)

TOKENS = torch.arange(60).view(3, 20)
TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def attach(
    model: DenseModel, name: str = "skill", *, drawn: bool = True, rank: int = 4
) -> list[torch.nn.Parameter]:
    trainable = attach_lora(model, name=name, targets=TARGETS, rank=rank, alpha=8.0)
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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_on_its_own_adapter(tiny_model, dtype):
    """Rows without one are the base of the same batch bit for bit; the others as if alone."""
    model = tiny_model().to(dtype)
    base = model(TOKENS)
    attach(model, "a")
    attach(model, "bb", rank=7)
    choose_adapter(model, None)
    close = 1e-5 if dtype == torch.float32 else 0.1  # gathered rows are rounded once more
    whole = {}
    for name in ("a", "bb"):
        with route_adapters(model, [name] * 3):
            whole[name] = model(TOKENS)
    for names in (["a", None, "bb"], [None, None, "a"], ["bb", "a", "a"], [None] * 3):
        with route_adapters(model, names):
            mixed = model(TOKENS)
        for row, name in enumerate(names):
            if name is None:
                assert torch.equal(mixed[row], base[row])
            else:
                torch.testing.assert_close(mixed[row], whole[name][row], atol=close, rtol=0)
                assert not torch.allclose(mixed[row], base[row], atol=0.2)
    choose_adapter(model, "a")
    with route_adapters(model, [None, "bb", None]):
        mixed = model(TOKENS)
    torch.testing.assert_close(mixed[0], whole["a"][0], atol=close, rtol=0)
    assert torch.equal(model(TOKENS), whole["a"])


def test_each_rows_loss_reaches_its_adapter_alone(tiny_model):
    model = tiny_model()
    trainable = {"a": attach(model, "a"), "bb": attach(model, "bb", rank=7)}
    model.requires_grad_(True)  # the second `attach_lora` froze the first adapter
    for row, used in ((0, "a"), (1, None), (2, "bb")):
        model.zero_grad()
        choose_adapter(model, None)
        with route_adapters(model, ["a", None, "bb"]):
            loss = model(TOKENS)[row].square().mean()
        if used is not None:
            loss.backward()
        for name, parameters in trainable.items():
            has_gradient = [p.grad is not None and bool(p.grad.any()) for p in parameters]
            assert has_gradient == [name == used] * len(parameters)


def test_what_the_model_has_not_is_refused(tiny_model):
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"no adapter 'a'\n.*attach one first"):
        choose_adapter(model, "a")
    with pytest.raises(ConfigError, match=r"no linear layer 'qkv'\n.*'qkv_proj'"):
        attach_lora(model, name="a", targets=["qkv"], rank=2, alpha=2.0)
    attach(model, "a")
    with (
        pytest.raises(ConfigError, match=r"no adapter 'b'\n.*it has a"),
        route_adapters(model, ["a", "b", None]),
    ):
        pass


@torch.no_grad()
def test_merging_says_what_becomes_of_other_adapters(tiny_model):
    model = tiny_model()
    attach(model, "a")
    attach(model, "bb", rank=7)
    choose_adapter(model, "a")
    attached = model(TOKENS)
    with pytest.raises(ConfigError, match=r"other adapters than 'a': bb"):
        merge_lora(model, "a")
    merge_lora(model, "a", others="keep")
    assert route_of(model).names == ["bb"]
    torch.testing.assert_close(model(TOKENS), attached, atol=1e-5, rtol=0)
    choose_adapter(model, "bb")
    both = model(TOKENS)
    assert not torch.allclose(both, attached, atol=0.1)
    merge_lora(model, "bb")
    torch.testing.assert_close(model(TOKENS), both, atol=1e-5, rtol=0)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


@torch.no_grad()
def test_an_adapter_of_some_linears_leaves_the_others_to_the_base(tiny_model):
    model, alone = tiny_model(), tiny_model()
    attach(model, "a")
    for each in (model, alone):
        [first, *_] = attach_lora(each, name="b", targets=["o_proj"], rank=2, alpha=2.0)
        first.fill_(0.1)
    with route_adapters(model, ["b"] * 3), route_adapters(alone, ["b"] * 3):
        assert torch.equal(model(TOKENS), alone(TOKENS))


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
