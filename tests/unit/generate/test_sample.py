"""The sampler draws from the distribution it names; its numbers are a function of their names."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phikit.generate.sample import BLOCK, Sampling, inverse_cdf, sample, stream_ids, uniform

ROWS, STEPS = 2000, 5


def sampling(
    *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, rows: int = ROWS
) -> Sampling:
    return Sampling(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        stream_ids(torch.arange(rows) // 8, torch.arange(rows) % 8),
    )


def counts(logits_V: Tensor, settings: Sampling) -> Tensor:
    """How often each id is drawn in ROWS * STEPS draws."""
    total = torch.zeros(len(logits_V), dtype=torch.long)
    for step in range(STEPS):
        ids, _ = sample(logits_V.expand(ROWS, -1), settings, step=step)
        total += torch.bincount(ids, minlength=len(logits_V))
    return total


def assert_drawn_from(found_V: Tensor, probs_V: Tensor) -> None:
    """Pearson's chi-square at four standard deviations, rare ids taken together."""
    expected_V = probs_V.double() * found_V.sum()
    assert not found_V[probs_V == 0].any()
    common = expected_V >= 10
    found = torch.cat([found_V[common], found_V[~common].sum()[None]])
    expected = torch.cat([expected_V[common], expected_V[~common].sum()[None]])
    found, expected = found[expected > 0], expected[expected > 0]
    chi_square = float(((found - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    # Wilson & Hilferty (1931): the cube root of chi-square over its degrees is nearly normal.
    spread = 2 / (9 * degrees)
    assert chi_square < degrees * (1 - spread + 4 * math.sqrt(spread)) ** 3


def logits(vocabulary: int) -> Tensor:
    return 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))


@pytest.mark.parametrize("vocabulary", [2, 12, BLOCK, BLOCK + 1, 700])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_softmax(vocabulary: int, temperature: float):
    given = logits(vocabulary)
    found = counts(given, sampling(temperature=temperature))
    assert_drawn_from(found, (given / temperature).softmax(-1))


@pytest.mark.parametrize("vocabulary", [12, 500])
def test_top_k(vocabulary: int):
    given = logits(vocabulary)
    kept = given.topk(5).indices
    cut = torch.full_like(given, -math.inf)
    cut[kept] = given[kept]
    assert_drawn_from(counts(given, sampling(top_k=5)), cut.softmax(-1))


@pytest.mark.parametrize("vocabulary", [12, 500])
@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_top_p(vocabulary: int, top_p: float):
    """The fewest ids that together reach top_p."""
    given = logits(vocabulary)
    probs, order = given.softmax(-1).sort(descending=True)
    number = int((probs.cumsum(-1) < top_p).sum()) + 1
    kept = torch.zeros(vocabulary)
    kept[order[:number]] = probs[:number] / probs[:number].sum()
    assert_drawn_from(counts(given, sampling(top_p=top_p)), kept)


def test_top_p_near_zero_keeps_the_best():
    given = logits(50)
    ids, _ = sample(given.expand(ROWS, -1), sampling(top_p=1e-9), step=0)
    assert set(ids.tolist()) == {int(given.argmax())}


def test_rows_keep_their_own_settings():
    given = logits(40).expand(3, -1)
    settings = Sampling(
        torch.tensor([0.0, 1.0, 1.0]),
        torch.tensor([0, 1, 0]),
        torch.tensor([1.0, 1.0, 1e-6]),
        stream_ids(torch.zeros(3, dtype=torch.long), torch.arange(3)),
    )
    ids, log_probs = sample(given, settings, step=0)
    assert ids.tolist() == [int(given[0].argmax())] * 3
    best = given[0].log_softmax(-1).max()
    torch.testing.assert_close(log_probs, best.expand(3))


def test_log_probs_are_of_the_whole_distribution():
    given = logits(300).expand(ROWS, -1)
    ids, log_probs = sample(given, sampling(temperature=0.7, top_k=9, top_p=0.8), step=3)
    expected = (given / 0.7).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


def test_uniform_numbers():
    streams = sampling(rows=1000).streams
    assert len(set(streams.tolist())) == 1000
    numbers = torch.stack([uniform(streams, step) for step in range(64)])
    assert numbers.dtype == torch.float64
    assert bool((numbers >= 0).all() and (numbers < 1).all())
    assert len(set(numbers.flatten().tolist())) == numbers.numel()
    found = torch.histc(numbers.float(), bins=32, min=0, max=1).long()
    assert_drawn_from(found, torch.full((32,), 1 / 32))
    # Neighbouring steps and neighbouring streams are unrelated.
    centred = numbers - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        correlation = float((a * b).mean()) * 12
        assert abs(correlation) < 4 / math.sqrt(a.numel())


def splitmix64(state: int) -> int:
    """The published mixing function, on Python's unbounded integers."""
    mask = (1 << 64) - 1
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def test_numbers_are_those_of_splitmix64():
    mask = (1 << 64) - 1
    for seed, number, step in ((0, 0, 0), (0, 1, 999), (1, 0, 3), (2**62, 7, 12345)):
        stream = splitmix64((splitmix64(seed) + number) & mask)
        expected = (splitmix64((stream + (step + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) * 2**-53
        assert (
            float(uniform(stream_ids(torch.tensor([seed]), torch.tensor([number])), step)[0])
            == expected
        )


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 3.0]), min_size=1, max_size=3 * BLOCK).filter(
        any
    ),
    st.sampled_from([0.0, 1e-12, 0.25, 0.5, 0.999999, 1 - 2**-53]),
)
def test_an_impossible_id_is_never_drawn(weights: list[float], u: float):
    row = torch.tensor([weights])
    id_ = int(inverse_cdf(row, torch.tensor([u], dtype=torch.float64))[0])
    assert row[0, id_] > 0
    below = float(row[0, :id_].double().sum()) / float(row.double().sum())
    through = float(row[0, : id_ + 1].double().sum()) / float(row.double().sum())
    assert below - 1e-9 <= u <= through + 1e-9
