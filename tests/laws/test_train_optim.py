"""The optimiser: AdamW is torch's, and Muon's direction is nearly orthogonal."""

import pytest
import torch
from tests.laws.training import tiny_model
from torch import nn

from phikit.train.optim import OptimConfig, Optimiser, orthogonalise


def set_gradients(model: nn.Module, seed: int, *, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_adamw_equals_torch():
    """Thirty steps at changing rates; matrices decay, norms do not."""
    ours, theirs = tiny_model(), tiny_model()
    config = OptimConfig(adam_lr=3e-3, weight_decay=0.1, betas=(0.8, 0.9), clip_norm=1.0)
    optimiser = Optimiser(ours.named_parameters(), config)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.9), eps=1e-8)
    for step in range(30):
        rate = config.rate(step, 30) / (1 + step % 3)
        set_gradients(theirs, step)
        expected_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in reference.param_groups:
            group["lr"] = rate * 3e-3
        reference.step()
        set_gradients(ours, step)
        optimiser.accumulate()
        assert optimiser.clip() == pytest.approx(expected_norm.item(), rel=1e-5)
        optimiser.step(rate)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-6, name


def test_small_gradients_are_not_clipped():
    model = tiny_model()
    optimiser = Optimiser(model.named_parameters(), OptimConfig(adam_lr=1e-3))
    set_gradients(model, 0, scale=1e-4)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimiser.accumulate()
    assert optimiser.clip() < 1.0
    for name, gradient in expected.items():
        assert torch.equal(optimiser.gradient[f"adam.{name}"][0], gradient)


def test_steps_too_small_for_bfloat16_are_not_lost():
    """A hundred steps of 1e-4 move a weight of 1 by 1e-2; in bfloat16 each would round away."""
    model = tiny_model(dtype=torch.bfloat16)
    optimiser = Optimiser(model.named_parameters(), OptimConfig(adam_lr=1e-4))
    for _ in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimiser.accumulate()
        optimiser.step(1.0)
    norm = model.get_parameter("model.norm.weight")
    assert norm.float().mean().item() == pytest.approx(0.99, abs=2**-8)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (7, 64), (64, 1)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_muon_directions_are_nearly_orthogonal(shape: tuple[int, int], scale: float):
    """For matrices whose smallest singular value is a thirtieth of the largest."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -1.5, min(shape))
    result = orthogonalise((scale * u * values @ vh)[None])
    found = torch.linalg.svdvals(result)
    assert found.min() >= 0.6
    assert found.max() <= 1.3


def test_muon_keeps_the_singular_vectors():
    """Its direction is U V^T of the decomposition, up to the size of the singular values."""
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalise(matrix[None])[0] @ vh.T
    off_diagonal = inner - torch.diag(inner.diagonal())
    assert off_diagonal.abs().max() < 0.05


def test_muon_batched_equals_single():
    matrices = torch.randn(6, 48, 32, generator=torch.Generator().manual_seed(2))
    together = orthogonalise(matrices)
    for matrix, expected in zip(matrices, together, strict=True):
        assert torch.allclose(orthogonalise(matrix[None])[0], expected, atol=1e-2)


def test_a_matrix_without_gradient_stays():
    assert torch.equal(orthogonalise(torch.zeros(2, 8, 4)), torch.zeros(2, 8, 4))


def test_muon_takes_the_matrices_of_the_blocks_and_adam_the_rest():
    model = tiny_model()
    optimiser = Optimiser(model.named_parameters(), OptimConfig(adam_lr=1e-3, muon_lr=0.02))
    muon = {name for k, names in optimiser.names.items() if k.startswith("muon") for name in names}
    matrices = {n for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}
    assert muon == matrices
    everything = sorted(name for names in optimiser.names.values() for name in names)
    assert everything == sorted(name for name, _ in model.named_parameters())


def test_muon_takes_the_published_step():
    """Jordan et al., 2024: Nesterov momentum, orthogonalised, stretched for tall matrices."""
    model = tiny_model()
    config = OptimConfig(adam_lr=0.0, muon_lr=0.02, weight_decay=0.1, momentum=0.9, clip_norm=None)
    optimiser = Optimiser(model.named_parameters(), config)
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if name.endswith(("gate_up_proj.weight", "o_proj.weight"))]
    weights = {name: parameters[name].detach().clone() for name in names}
    momenta = {name: torch.zeros_like(weights[name]) for name in names}
    for step in range(3):
        set_gradients(model, step)
        for name in names:
            gradient = parameters[name].grad
            assert gradient is not None
            momenta[name] = 0.9 * momenta[name] + 0.1 * gradient
            update = orthogonalise((0.1 * gradient + 0.9 * momenta[name])[None])[0]
            rows, columns = update.shape
            update *= max(1.0, rows / columns) ** 0.5
            weights[name] = weights[name] * (1 - 0.5 * 0.02 * 0.1) - 0.5 * 0.02 * update
        optimiser.accumulate()
        optimiser.step(0.5)
    for name in names:
        assert torch.allclose(parameters[name], weights[name], atol=3e-4), name


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_a_module_may_go_at_another_rate(muon_lr: float | None):
    """Named parts of the model move by their factor, all others as they would."""
    moved = []
    for scales in ({}, {"self_attn": 0.1}):
        model = tiny_model()
        config = OptimConfig(adam_lr=1e-3, muon_lr=muon_lr, clip_norm=None, scales=scales)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = Optimiser(model.named_parameters(), config)
        set_gradients(model, 0)
        optimiser.accumulate()
        optimiser.step(1.0)
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    assert any(".self_attn." in name for name in moved[0])
    for name, distance in moved[0].items():
        factor = 0.1 if ".self_attn." in name else 1.0
        torch.testing.assert_close(moved[1][name], factor * distance, rtol=0.02, atol=2e-6)
