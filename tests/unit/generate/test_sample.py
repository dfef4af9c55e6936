"""The sampler draws from the distribution it names; its numbers are a function of their names."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phikit.generate.sample import (
    BLOCK,
    Sampling,
    _cut,
    _Rows,
    in_blocks,
    inverse_cdf,
    penalise,
    sample,
    stream_ids,
    top_log_probs,
    uniform,
)

ROWS, STEPS = 2000, 5

CUTS: list[dict[str, Any]] = [
    {"top_k": 5},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.1},
    {"top_k": 9, "top_p": 0.8},
    {"top_k": 9, "min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.03},
]


def sampling(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    rows: int = ROWS,
) -> Sampling:
    return Sampling(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        stream_ids(torch.arange(rows) // 8, torch.arange(rows) % 8),
    )


def steps(step: int, rows: int = ROWS) -> Tensor:
    return torch.full((rows,), step)


def counts(logits_V: Tensor, settings: Sampling) -> Tensor:
    """How often each id is drawn in ROWS * STEPS draws."""
    total = torch.zeros(len(logits_V), dtype=torch.long)
    for step in range(STEPS):
        ids, _ = sample(logits_V.expand(ROWS, -1), settings, steps_R=steps(step))
        total += torch.bincount(ids, minlength=len(logits_V))
    return total


def reference(logits_V: Tensor, cut: dict[str, Any], *, temperature: float = 1.0) -> Tensor:
    """Probabilities as transformers cuts them."""
    warpers = LogitsProcessorList()
    if "top_k" in cut:
        warpers.append(TopKLogitsWarper(cut["top_k"]))
    if "top_p" in cut:
        warpers.append(TopPLogitsWarper(cut["top_p"]))
    if "min_p" in cut:
        warpers.append(MinPLogitsWarper(cut["min_p"]))
    prompt: Any = torch.zeros(1, 1).long()
    return warpers(prompt, logits_V[None] / temperature)[0].softmax(-1)


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


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("vocabulary", [12, 500])
def test_cuts(vocabulary: int, cut: dict[str, Any]):
    given = logits(vocabulary)
    found = counts(given, sampling(temperature=0.8, **cut))
    assert_drawn_from(found, reference(given, cut, temperature=0.8))


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_kept_ids_are_those_of_transformers(cut: dict[str, Any], scale: float):
    """Over a large vocabulary, where the nucleus outgrows the first candidates or does not."""
    vocabulary, rows = 9000, 8
    given = scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3))
    assert_kept(given, cut)


def assert_kept(logits_RV: Tensor, cut: dict[str, Any]) -> None:
    rows, vocabulary = logits_RV.shape
    parts = _Rows.of(logits_RV, torch.ones(rows))
    _cut(parts, sampling(rows=rows, **cut), torch.zeros(rows, dtype=torch.bool))
    kept = (parts.weights_RNJ * (parts.sums_RN > 0)[..., None]).flatten(1)[:, :vocabulary] > 0
    expected = torch.stack([reference(row, cut) > 0 for row in logits_RV])
    assert torch.equal(kept, expected)


def test_top_p_near_zero_keeps_the_best():
    given = logits(50)
    ids, _ = sample(given.expand(ROWS, -1), sampling(top_p=1e-9), steps_R=steps(0))
    assert set(ids.tolist()) == {int(given.argmax())}


def test_every_id_can_be_kept():
    """Cuts that cut nothing, at their limits and beyond."""
    given = logits(12)
    cuts: list[dict[str, Any]] = [{"top_k": 12}, {"top_k": 500}, {"top_p": 0.999999}]
    for cut in (*cuts, {"top_k": 99, "top_p": 1.0}):
        assert_drawn_from(counts(given, sampling(**cut)), given.softmax(-1))


def test_ids_as_likely_as_the_last_one_kept_stay():
    given = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).expand(ROWS, -1)
    cuts: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.8}, {"min_p": math.exp(-2.0)}]
    for cut in cuts:
        ids, _ = sample(given, sampling(**cut), steps_R=steps(0))
        assert set(ids.tolist()) == {0, 1, 2, 3}


def mixed(rows: int) -> Sampling:
    """Every kind of row beside every other."""
    several = torch.arange(rows)
    return Sampling(
        torch.tensor([0.0, 0.6, 1.0, 1.3])[several % 4],
        torch.tensor([0, 3, 0, 70, 0])[several % 5],
        torch.tensor([1.0, 0.5, 1.0, 0.95, 0.99, 1.0, 1.0])[several % 7],
        torch.tensor([0.0, 0.02, 0.0])[several % 3],
        stream_ids(several // 3, several % 3),
    )


def test_rows_keep_their_own_settings():
    given = logits(40).expand(4, -1)
    settings = Sampling(
        torch.tensor([0.0, 1.0, 1.0, 1.0]),
        torch.tensor([0, 1, 0, 0]),
        torch.tensor([1.0, 1.0, 1e-6, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 1.0]),
        stream_ids(torch.zeros(4, dtype=torch.long), torch.arange(4)),
    )
    ids, log_probs = sample(given, settings, steps_R=steps(0, 4))
    assert ids.tolist() == [int(given[0].argmax())] * 4
    best = given[0].log_softmax(-1).max()
    torch.testing.assert_close(log_probs, best.expand(4))


@pytest.mark.parametrize("vocabulary", [7, 300, 1001, 20_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_bit_for_bit_in_any_batch(vocabulary: int, threads: int):
    rows = 24
    given = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(5))
    settings, steps_R = mixed(rows), torch.arange(rows) * 3
    torch.set_num_threads(threads)
    try:
        together = sample(given, settings, steps_R=steps_R)
        tops = top_log_probs(given, settings.temperature, k=3)
        for chosen in (*torch.arange(rows).split(1), torch.arange(0, rows, 5), torch.arange(9, 20)):
            part, those = given[chosen], settings.rows(chosen)
            for whole, alone in (
                (together, sample(part, those, steps_R=steps_R[chosen])),
                (tops, top_log_probs(part, those.temperature, k=3)),
            ):
                assert torch.equal(alone[0], whole[0][chosen])
                assert torch.equal(alone[1], whole[1][chosen])
    finally:
        torch.set_num_threads(1)


def test_log_probs_are_of_the_whole_distribution():
    given = logits(300).expand(ROWS, -1)
    settings = sampling(temperature=0.7, top_k=9, top_p=0.8, min_p=0.01)
    ids, log_probs = sample(given, settings, steps_R=steps(3))
    expected = (given / 0.7).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", [5, 130])
def test_extreme_logits(vocabulary: int):
    """A mask that leaves one id; a temperature near zero; logits far apart."""
    alone = torch.full((4, vocabulary), -math.inf)
    alone[torch.arange(4), torch.tensor([0, 1, 4, 4])] = torch.tensor([0.0, -1e30, 50.0, 1e30])
    whole: list[dict[str, Any]] = [{}, {"temperature": 0.0}]
    for cut in whole + CUTS:
        ids, log_probs = sample(alone, sampling(rows=4, **cut), steps_R=steps(0, 4))
        assert ids.tolist() == [0, 1, 4, 4]
        assert log_probs.tolist() == [0.0] * 4
    given = logits(vocabulary).expand(50, -1)
    for factor, temperature in ((1.0, 1e-30), (1e30, 1.0)):
        settings = sampling(temperature=temperature, rows=50)
        ids, log_probs = sample(factor * given, settings, steps_R=steps(0, 50))
        assert set(ids.tolist()) == {int(given[0].argmax())}
        assert set(log_probs.tolist()) == {0.0}


def test_a_broken_row_spoils_no_other():
    given = logits(100).expand(3, -1).clone()
    expected, _ = sample(given, sampling(rows=3, top_p=0.9), steps_R=steps(1, 3))
    given[1] = math.nan
    ids, log_probs = sample(given, sampling(rows=3, top_p=0.9), steps_R=steps(1, 3))
    assert ids[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert 0 <= int(ids[1]) < 100
    assert bool(log_probs[1].isnan())


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_top_log_probs(temperature: float):
    given = torch.stack([logits(300), -logits(300)])
    given[:, 7] = given[:, 250] = 9.0
    values, ids = top_log_probs(given, torch.full((2,), temperature), k=6)
    expected = (given / (temperature or 1.0)).log_softmax(-1)
    torch.testing.assert_close(values, expected.topk(6).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(expected.gather(-1, ids), values, atol=1e-5, rtol=0)
    assert ids[:, :2].tolist() == [[7, 250], [7, 250]]
    drawn, log_probs = sample(given, sampling(temperature=0.0, rows=2), steps_R=steps(0, 2))
    assert drawn.tolist() == [7, 7]
    if temperature != 0.5:
        assert torch.equal(log_probs, values[:, 0])


def test_repetition_penalty_is_that_of_transformers():
    given = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    seen: Any = torch.tensor([[4, 9, 9, 30], [0, 1, 2, 3], [49, 49, 49, 49]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, given.clone())
    for row in range(3):
        penalise(given, row=row, seen_ids=seen[row], penalty=1.3)
    torch.testing.assert_close(given, expected)


def test_uniform_numbers():
    streams = sampling(rows=1000).streams
    assert len(set(streams.tolist())) == 1000
    numbers = torch.stack([uniform(streams, steps(step, 1000)) for step in range(64)])
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
        found = stream_ids(torch.tensor([seed]), torch.tensor([number]))
        assert float(uniform(found, torch.tensor([step]))[0]) == expected


# Weights whose sums float32 holds exactly, and one that is too small to count.
@given(
    st.lists(
        st.sampled_from([0.0, 1e-30, 2**-12, 1.0, 3.0]), min_size=1, max_size=3 * BLOCK
    ).filter(any),
    st.sampled_from([0.0, 1e-12, 0.25, 0.5, 0.999999, 1 - 2**-53]),
)
def test_an_impossible_id_is_never_drawn(weights: list[float], u: float):
    row = torch.tensor([weights])
    blocks = in_blocks(row, fill=0.0)
    sums = blocks.sum(-1).double()
    id_ = int(inverse_cdf(blocks, torch.tensor([u], dtype=torch.float64), sums_RN=sums)[0])
    assert row[0, id_] > 0
    below = float(row[0, :id_].double().sum()) / float(row.double().sum())
    through = float(row[0, : id_ + 1].double().sum()) / float(row.double().sum())
    assert below - 1e-9 <= u <= through + 1e-9
