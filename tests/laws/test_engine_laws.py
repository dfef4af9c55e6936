"""The engine decodes as the bare model would, whatever shares the batch.

All in float32, where another shape of batch changes the last bits at most.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from phikit.base.errors import ContextOverflowError
from phikit.generate.blocks import BLOCK_TOKENS
from phikit.generate.cache import block_bytes
from phikit.generate.engine import Engine
from phikit.generate.request import Completion, Request
from phikit.models.dense import DenseModel
from phikit.nn.losses import token_log_probs_and_entropy

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 7.9]}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"tie_embeddings": False},
    "window": {"tie_embeddings": False, "sliding_window": 5},
    "longrope": {"tie_embeddings": False, "longrope": {**FACTORS, "original_context": 30}},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request, tiny_model) -> DenseModel:
    return tiny_model(**VARIANTS[request.param])


def prompts(count: int, *, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(300) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def uncached_greedy(model: DenseModel, request: Request) -> list[int]:
    """One full forward pass per token."""
    tokens = list(request.prompt)
    for _ in range(request.max_new_tokens):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in request.stop_ids:
            break
    return tokens[len(request.prompt) :]


def small_cache(model: DenseModel, blocks: int, **settings: Any) -> Engine:
    """An engine whose cache holds this many blocks."""
    return Engine(model, cache_bytes=blocks * block_bytes(model.config, model.dtype), **settings)


@pytest.mark.parametrize("max_rows", [4, 512])
@pytest.mark.parametrize("step_tokens", [16, 2048])
def test_greedy_is_uncached_greedy(model, max_rows, step_tokens):
    requests = [
        Request(prompt, max_new_tokens=1 + i % 24, temperature=0.0, stop_ids=(7, 90 + i))
        for i, prompt in enumerate(prompts(12, longest=6))
    ]
    engine = Engine(model, max_rows=max_rows, step_tokens=step_tokens)
    for request, [completion] in zip(requests, engine.generate(requests), strict=True):
        assert completion.tokens == uncached_greedy(model, request)
        stopped = completion.tokens[-1] in request.stop_ids
        assert completion.finish_reason == ("stop" if stopped else "length")


def test_short_and_long_prompts_in_one_call(model):
    """With LongRoPE the short ones keep the short factors, whoever else is in the call."""
    requests = [
        Request(list(range(length)), max_new_tokens=9, temperature=0.0)
        for length in (3, 40, 20, 60)
    ]
    for request, [completion] in zip(requests, Engine(model).generate(requests), strict=True):
        assert completion.tokens == uncached_greedy(model, request)


CONTEXT = 14
CROSSING = {"tie_embeddings": False, "longrope": {**FACTORS, "original_context": CONTEXT}}


@pytest.mark.parametrize("step_tokens", [16, 2048])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 9}])
def test_crossing_the_original_context(tiny_model, changes, step_tokens):
    """Rows cross at different steps, as groups, beside rows that never do or that began beyond."""
    model = tiny_model(**CROSSING, **changes)
    requests = [
        Request(list(range(length)), max_new_tokens=new, num_samples=3, temperature=0.0)
        for length, new in ((3, 24), (13, 9), (14, 12), (1, 8), (20, 6), (9, 30))
    ]
    engine = Engine(model, step_tokens=step_tokens)
    for request, samples in zip(requests, engine.generate(requests), strict=True):
        assert [s.tokens for s in samples] == [uncached_greedy(model, request)] * 3
    never = tiny_model(**{**CROSSING, **changes, "longrope": None})
    assert any(uncached_greedy(never, r) != uncached_greedy(model, r) for r in requests)


@torch.no_grad()
def test_samples_across_the_original_context(tiny_model):
    model = tiny_model(**CROSSING)
    request = Request([5, 4, 3], max_new_tokens=20, num_samples=4, temperature=1.0, seed=1)
    [samples] = Engine(model).generate([request])
    for sample in samples:
        tokens = [*request.prompt, *sample.tokens]
        for end, log_prob in zip(range(3, len(tokens)), sample.log_probs, strict=True):
            logits = model(torch.tensor([tokens[:end]]))[0, -1]
            assert log_prob == pytest.approx(float(logits.log_softmax(-1)[tokens[end]]), abs=1e-4)


@pytest.mark.parametrize("blocks", [2, 3, 7])
def test_little_memory_for_the_cache_changes_nothing(model, blocks):
    """Sequences give their blocks up to older ones and compute them again later."""
    requests = [sampled(prompt, seed) for seed, prompt in enumerate(prompts(5, longest=9))]
    engine = small_cache(model, blocks)
    for little, much in zip(
        engine.generate(requests), Engine(model).generate(requests), strict=True
    ):
        assert_same(little, much)
    assert engine.pool.available == blocks


def test_a_request_beyond_the_cache_is_refused_at_once(model):
    engine = small_cache(model, 2)
    with pytest.raises(
        ContextOverflowError, match=rf"= 40, and the cache holds {2 * BLOCK_TOKENS}"
    ):
        engine.submit(Request([1] * 30, max_new_tokens=10))
    assert not engine.busy


def test_equal_samples_of_a_greedy_group(model):
    requests = [
        Request(prompt, max_new_tokens=5 + 6 * i, num_samples=3, temperature=0.0)
        for i, prompt in enumerate(prompts(4, longest=6))
    ]
    for request, samples in zip(requests, Engine(model).generate(requests), strict=True):
        assert [s.tokens for s in samples] == [uncached_greedy(model, request)] * 3


def sampled(prompt: Sequence[int], seed: int, **changes: Any) -> Request:
    values = {"max_new_tokens": 12, "num_samples": 6, "temperature": 0.9}
    return Request(prompt, seed=seed, stop_ids=tuple(range(40)), **{**values, **changes})


def assert_same(a: list[Completion], b: list[Completion]) -> None:
    assert [c.tokens for c in a] == [c.tokens for c in b]
    assert [c.finish_reason for c in a] == [c.finish_reason for c in b]
    for x, y in zip(a, b, strict=True):
        assert x.log_probs == pytest.approx(y.log_probs, abs=1e-4)


def test_samples_depend_on_nothing_else_in_the_batch(model):
    requests = [sampled(prompt, seed) for seed, prompt in enumerate(prompts(7, longest=6))]
    together = Engine(model).generate(requests)
    for request, samples in zip(requests, together, strict=True):
        [alone] = Engine(model).generate([request])
        assert_same(alone, samples)
        [in_pieces] = Engine(model, max_rows=4).generate([request])
        assert_same(in_pieces, samples)
    mixed = [sampled(r.prompt, r.seed, num_samples=1 + i % 6) for i, r in enumerate(requests)]
    for samples, more in zip(Engine(model).generate(mixed), together, strict=True):
        assert_same(samples, more[: len(samples)])


def test_seeds_and_samples_differ(model):
    prompt = [5, 6, 7]
    [a], [b], [c] = (Engine(model).generate([sampled(prompt, seed)]) for seed in (0, 0, 1))
    assert_same(a, b)
    texts = [tuple(s.tokens) for s in a + c]
    assert len(set(texts)) == len(texts)


@torch.no_grad()
def test_log_probs_are_those_of_the_model(model):
    for temperature in (0.6, 1.0):
        request = sampled([9, 8, 7, 6], 0, temperature=temperature, top_p=0.8, top_k=20)
        [samples] = Engine(model).generate([request])
        for sample in samples:
            tokens = torch.tensor([[*request.prompt, *sample.tokens]])
            hidden = model.hidden(tokens)[0, len(request.prompt) - 1 : -1]
            expected, _ = token_log_probs_and_entropy(
                hidden,
                model.lm_head.weight,
                tokens[0, len(request.prompt) :],
                temperature=temperature,
            )
            assert sample.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_stream_is_generate(model):
    for temperature in (0.0, 1.0):
        request = sampled([4, 2], 3, num_samples=1, temperature=temperature)
        [[completion]] = Engine(model).generate([request])
        assert list(Engine(model).stream(request)) == completion.tokens


def test_progress_counts_every_token_and_completion(model):
    seen: list[tuple[int, int]] = []
    requests = [sampled(prompt, 1, num_samples=2) for prompt in prompts(5, longest=9)]
    results = Engine(model, max_rows=4).generate(requests, on_progress=lambda *n: seen.append(n))
    assert sum(n for n, _ in seen) == sum(len(c.tokens) for group in results for c in group)
    assert sum(n for _, n in seen) == 10
