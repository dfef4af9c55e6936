"""What requests do to one another inside the engine: nothing.

Random arrivals, cancellations and lengths against requests run alone, over caches so small that
sequences push one another out; prefixes shared between requests; drafts; and, after all of it, no
block held by anyone. In float32, greedy or with a seed, texts are equal token by token.
"""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phikit.base.errors import ConfigError
from phikit.generate.blocks import BLOCK_TOKENS, BlockPool
from phikit.generate.cache import block_bytes
from phikit.generate.engine import Engine
from phikit.generate.request import Completion, Request
from phikit.generate.sequence import Ticket
from phikit.generate.speculate import DraftModel, PromptLookup
from phikit.models.dense import DenseModel

FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 7.9]}


@pytest.fixture(scope="module")
def model(tiny_model) -> DenseModel:
    return tiny_model(tie_embeddings=False)


@pytest.fixture(scope="module")
def crossing_model(tiny_model) -> DenseModel:
    """Sequences outgrow LongRoPE's original context."""
    return tiny_model(tie_embeddings=False, longrope={**FACTORS, "original_context": 30})


def small_cache(model: DenseModel, blocks: int, **changes) -> Engine:
    return Engine(model, cache_bytes=blocks * block_bytes(model.config, model.dtype), **changes)


def alone(model: DenseModel, request: Request) -> list[Completion]:
    [samples] = Engine(model).generate([request])
    return samples


def assert_same(a: list[Completion], b: list[Completion]) -> None:
    assert [(c.tokens, c.finish_reason) for c in a] == [(c.tokens, c.finish_reason) for c in b]
    for x, y in zip(a, b, strict=True):
        assert x.log_probs == pytest.approx(y.log_probs, abs=1e-4)


def assert_empty(engine: Engine) -> None:
    """Nothing runs, nothing waits, nobody holds a block or a row."""
    assert not engine.busy
    assert engine.pool.available == engine.pool.size
    assert len(engine.scheduler._rows) == len(engine.scheduler.tables)


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    max_new_tokens=st.integers(1, 40),
    num_samples=st.integers(1, 4),
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_p=st.sampled_from([None, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 3),
    stop_ids=st.sampled_from([(), tuple(range(60))]),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    asked=st.lists(
        st.tuples(requests, st.integers(0, 12), st.none() | st.integers(0, 12)), max_size=6
    ),
    blocks=st.integers(5, 14),
    rows=st.integers(1, 8),
    step_tokens=st.sampled_from([1, 7, 64]),
    drafts=st.booleans(),
    crossing=st.booleans(),
)
def test_arrivals_and_cancellations(
    model, crossing_model, asked, blocks, rows, step_tokens, drafts, crossing
):
    """Each request comes at a step and may be cancelled some steps later."""
    chosen = crossing_model if crossing else model
    engine = small_cache(
        chosen,
        blocks,
        max_rows=rows,
        step_tokens=step_tokens,
        drafter=PromptLookup(longest=2, shortest=1) if drafts else None,
    )
    tickets: dict[int, Ticket] = {}
    step = 0
    while len(tickets) < len(asked) or engine.busy:
        for number, (request, arrives, _) in enumerate(asked):
            if arrives == step:
                tickets[number] = engine.submit(request)
        for number, (_, arrives, stays) in enumerate(asked):
            if stays is not None and arrives + stays == step:
                engine.cancel(tickets[number])
        engine.step()
        step += 1
        assert step < 5000
    assert_empty(engine)
    for number, (request, _, stays) in enumerate(asked):
        whole = alone(chosen, request)
        if stays is None:
            assert_same(tickets[number].completions, whole)
            continue
        for part, all_of_it in zip(tickets[number].completions, whole, strict=True):
            assert part.tokens == all_of_it.tokens[: len(part.tokens)]


def test_ten_thousand_requests_through_a_small_cache(tiny_model):
    """All finish; the cache stays what it was made as."""
    model = tiny_model(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_mlp=16, head_dim=8)
    engine = small_cache(model, 100, max_rows=64)
    draw = random.Random(0)
    asked = [
        Request(
            [draw.randrange(300) for _ in range(draw.randint(1, 30))],
            max_new_tokens=draw.choice([1, 1, 2, 3, 40]),
            seed=i,
        )
        for i in range(10_000)
    ]
    results = engine.generate(asked)
    assert all(len(c.tokens) == r.max_new_tokens for r, [c] in zip(asked, results, strict=True))
    assert_empty(engine)
    pool = engine.pool
    assert len(pool._names) == len(pool._named) == pool.idle <= pool.size
    assert engine._cache is not None and len(engine._cache.layers[0].keys) == 100


def count_tokens(engine: Engine, run: Callable[[], object]) -> int:
    """How many tokens go through the model."""
    seen = 0
    plan = engine.scheduler.plan

    def counted(drafts):
        nonlocal seen
        spans = plan(drafts)
        seen += sum(len(span.tokens) for span in spans)
        return spans

    engine.scheduler.plan = counted
    run()
    return seen


def test_the_samples_of_a_prompt_compute_it_once(model):
    engine = Engine(model)
    request = Request([5] * 50, max_new_tokens=3, num_samples=6)
    assert count_tokens(engine, lambda: engine.generate([request])) == 50 + 6 * 2


def test_a_later_request_takes_up_the_beginning(model):
    engine = Engine(model)
    first = Request(list(range(50)), max_new_tokens=20, temperature=0.0)
    [[said]] = engine.generate([first])
    turns = Request([*first.prompt, *said.tokens, 7, 8], max_new_tokens=9, temperature=0.0)
    results: list[list[Completion]] = []
    computed = count_tokens(engine, lambda: results.extend(engine.generate([turns])))
    assert_same(results[0], alone(model, turns))
    kept = 69 // BLOCK_TOKENS * BLOCK_TOKENS
    assert computed == 72 + 8 - kept


def test_what_was_cached_under_other_weights_is_dropped(tiny_model):
    model = tiny_model(tie_embeddings=False)
    engine = Engine(model)
    request = Request(list(range(50)), max_new_tokens=8, temperature=0.0)
    engine.generate([request])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    [samples] = engine.generate([request])
    assert_same(samples, alone(model, request))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_change_no_text(model, tiny_model, temperature):
    """Right drafts, wrong drafts, and those of a model that is sometimes right."""
    near = tiny_model(tie_embeddings=False)
    with torch.no_grad():
        near.lm_head.weight.add_(torch.randn(near.lm_head.weight.shape) * 0.01)
    asked = [
        Request([9, 4, 7] * 5 + [i], max_new_tokens=40, num_samples=3, temperature=temperature)
        for i in range(4)
    ]
    plain = Engine(model).generate(asked)
    for drafter in (PromptLookup(shortest=1), DraftModel(model), DraftModel(near)):
        engine = Engine(model, drafter=drafter)
        passes = 0
        tickets = [engine.submit(request) for request in asked]
        while engine.busy:
            engine.step()
            passes += 1
        for ticket, expected in zip(tickets, plain, strict=True):
            assert_same(ticket.completions, expected)
        assert_empty(engine)
        if isinstance(drafter, DraftModel):
            assert drafter.pool.available == drafter.pool.size
            assert temperature > 0 or passes < 25


@torch.no_grad()
def test_drafts_change_no_distribution(tiny_model):
    """100,000 samples of three tokens against the exact probabilities, by Pearson's chi-square."""
    vocabulary, count, temperature = 5, 100_000, 3.0
    model = tiny_model(vocab_size=vocabulary, tie_embeddings=False, num_layers=1)
    prompt = [1, 2, 0, 1, 2]
    engine = Engine(model, drafter=PromptLookup(longest=2, shortest=1))
    request = Request(prompt, 3, num_samples=count, temperature=temperature, seed=5)
    [samples] = engine.generate([request])
    texts = torch.cartesian_prod(*[torch.arange(vocabulary)] * 3)
    rows = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], dim=1)
    logits = model(rows)[:, len(prompt) - 1 : -1].double()
    log_probs = (logits / temperature).log_softmax(-1)
    expected = count * log_probs.gather(-1, texts[..., None])[..., 0].sum(-1).exp()
    places = torch.tensor([s.tokens for s in samples]) @ torch.tensor([25, 5, 1])
    seen = torch.bincount(places, minlength=len(texts))
    statistic = float(((seen - expected) ** 2 / expected).sum())
    degrees = len(texts) - 1
    assert expected.min() > 5
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


class Broken:
    """A constraint that gives up after two tokens, when it is asked or when it is told."""

    finished = False

    def __init__(self, when: str) -> None:
        self.when, self.heard = when, 0

    def allowed(self) -> torch.Tensor:
        if self.when == "asked" and self.heard == 2:
            raise ConfigError("the grammar is too deep")
        return torch.ones(300, dtype=torch.bool)

    def accept(self, token: int) -> None:
        self.heard += 1
        if self.when == "told" and self.heard == 2:
            raise ConfigError("the grammar is too deep")


@pytest.mark.parametrize("when", ["asked", "told"])
def test_a_constraint_that_fails_ends_its_own_request(model, when):
    engine = Engine(model)
    plain = Request([1, 2, 3], max_new_tokens=20, seed=4)
    other = engine.submit(plain)
    broken = engine.submit(
        Request([1, 2], max_new_tokens=20, num_samples=3, constraint=lambda: Broken(when))
    )
    while engine.busy:
        engine.step()
    assert isinstance(broken.error, ConfigError) and broken.done
    assert_same(other.completions, alone(model, plain))
    assert_empty(engine)
    with pytest.raises(ConfigError, match="too deep"):
        engine.generate([plain, broken.request])
    assert_empty(engine)


def test_leaving_a_stream_cancels_it(model):
    engine = Engine(model)
    stream = engine.stream(Request([1, 2, 3], max_new_tokens=50))
    next(stream)
    stream.close()
    assert_empty(engine)


def test_two_streams_in_turn(model):
    engine = Engine(model)
    asked = [Request([i, 2], max_new_tokens=12, seed=i) for i in range(2)]
    pairs = zip(*(engine.stream(request) for request in asked), strict=True)
    for request, tokens in zip(asked, zip(*pairs, strict=True), strict=True):
        assert list(tokens) == alone(model, request)[0].tokens


def test_an_int8_cache_is_near(model):
    """Not equal: keys and values are rounded. Its log-probabilities stay close."""
    request = Request(list(range(40)), max_new_tokens=1, temperature=1.0, num_samples=20)
    [exact] = Engine(model).generate([request])
    [rounded] = Engine(model, cache_dtype="int8").generate([request])
    for a, b in zip(exact, rounded, strict=True):
        if a.tokens == b.tokens:
            assert a.log_probs == pytest.approx(b.log_probs, abs=0.02)
    assert sum(a.tokens == b.tokens for a, b in zip(exact, rounded, strict=True)) >= 15
    assert block_bytes(model.config, torch.int8) < block_bytes(model.config, torch.bfloat16)


class TestBlockPool:
    """The pool against a plain account of who holds what."""

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["take", "share", "release", "name", "find", "forget"]),
                st.integers(0, 9),
            ),
            max_size=60,
        )
    )
    def test_random_walks(self, moves: list[tuple[str, int]]):
        pool = BlockPool(5)
        held: list[int] = []
        named: dict[bytes, int] = {}
        for move, number in moves:
            block = held[number % len(held)] if held else None
            name = bytes([number])
            if move == "take":
                taken = pool.take()
                assert (taken is None) == (len(set(held)) == 5)
                if taken is not None:
                    assert taken not in held
                    named = {n: b for n, b in named.items() if b != taken}
                    held.append(taken)
            elif move == "find":
                found = pool.find(name)
                assert found == named.get(name)
                if found is not None:
                    held.append(found)
            elif move == "forget":
                pool.forget()
                named = {}
            elif block is not None and move == "share":
                pool.share(block)
                held.append(block)
            elif block is not None and move == "release":
                pool.release(block)
                held.remove(block)
            elif block is not None and move == "name":
                pool.name(block, name)
                if name not in named and block not in named.values():
                    named[name] = block
            assert pool.available == 5 - len(set(held))
