"""The plain solver on a real engine with random weights."""

import random

import pytest
import torch

from phikit.base.errors import ConfigError, DataError
from phikit.chat.message import Message
from phikit.chat.render import PhiRenderer
from phikit.data.problem import Problem, Provenance
from phikit.evals.scorer import math_scorer
from phikit.generate.engine import Engine
from phikit.models.dense import DenseConfig, DenseModel
from phikit.solve.plain import SamplingConfig, Senses, plain, problem_seed

SAMPLING = SamplingConfig(max_new_tokens=12, num_samples=3, temperature=1.0, seed=4)


def ask(question: str) -> Problem:
    provenance = Provenance("t", "", "", "test", "", "1", 0, 0)
    return Problem(question, "1", None, None, None, question, provenance)


PROBLEMS = [ask(f"What is {n} + {n * n}?" + " Think." * (n % 4)) for n in range(9)]


@pytest.fixture(scope="module")
def renderer(nano_tokenizer):
    return PhiRenderer(nano_tokenizer)


@pytest.fixture(scope="module")
def engine(nano_tokenizer):
    config = DenseConfig(
        vocab_size=nano_tokenizer.size,
        d_model=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        d_mlp=48,
        max_context=96,
        tie_embeddings=False,  # tied, random weights only repeat the last token
        init_std=0.2,
    )
    return Engine(DenseModel(config).initialise(torch.Generator().manual_seed(0)))


def test_a_problem_has_the_same_replies_in_any_company_and_order(engine, renderer):
    solve = plain(engine, renderer, SAMPLING)
    together = dict(zip((p.question for p in PROBLEMS), solve(PROBLEMS), strict=True))
    shuffled = random.Random(1).sample(PROBLEMS, k=len(PROBLEMS))
    for problem, replies in zip(shuffled, solve(shuffled), strict=True):
        assert [r.tokens for r in replies] == [r.tokens for r in together[problem.question]]
    for problem in PROBLEMS[:3]:
        (alone,) = solve([problem])
        assert [r.tokens for r in alone] == [r.tokens for r in together[problem.question]]


def test_the_seed_and_the_problem_change_the_replies(engine, renderer):
    replies = plain(engine, renderer, SAMPLING)(PROBLEMS)
    other = plain(engine, renderer, SAMPLING.override(["seed=5"]))(PROBLEMS)
    assert [r.tokens for g in replies for r in g] != [r.tokens for g in other for r in g]
    assert len({tuple(r.tokens) for group in replies for r in group}) > len(PROBLEMS)
    seeds = {problem_seed(s, p.content_hash) for s in range(3) for p in PROBLEMS}
    assert len(seeds) == 3 * len(PROBLEMS) and all(0 <= seed < 2**63 for seed in seeds)


def test_replies_carry_what_was_sampled(engine, renderer):
    for group in plain(engine, renderer, SAMPLING)(PROBLEMS):
        assert len(group) == SAMPLING.num_samples
        for reply in group:
            assert len(reply.tokens) == len(reply.log_probs) <= SAMPLING.max_new_tokens
            assert reply.finished == (reply.tokens[-1] in renderer.stop_ids)
            assert reply.finished or len(reply.tokens) == SAMPLING.max_new_tokens
            assert reply.message == renderer.parse(reply.tokens) and reply.error is None


def test_a_question_beyond_the_context_is_an_error_of_its_own(engine, renderer):
    long = ask("How many? " * 80)
    solve = plain(engine, renderer, SAMPLING)
    with_long, without = solve([PROBLEMS[0], long, PROBLEMS[1]]), solve(PROBLEMS[:2])
    assert [with_long[0], with_long[2]] == without
    assert len(with_long[1]) == SAMPLING.num_samples
    prompt = len(renderer.prompt([Message("user", long.question)]))
    score = math_scorer()([(long, with_long[1][0])])[0]
    assert score.status == "error" and score.reason is not None
    assert str(prompt) in score.reason and "96" in score.reason


def test_so_is_one_about_what_cannot_be_read(engine, renderer):
    def media(problem: Problem) -> None:
        if problem is PROBLEMS[1]:
            raise DataError("x.png: no picture")

    seen = plain(engine, renderer, SAMPLING, senses=Senses(media, {}))(PROBLEMS[:3])
    without = plain(engine, renderer, SAMPLING)(PROBLEMS[:3])
    assert [seen[0], seen[2]] == [without[0], without[2]]
    assert [reply.error for reply in seen[1]] == ["x.png: no picture"] * SAMPLING.num_samples


def test_nothing_asked_is_nothing_answered(engine, renderer):
    assert plain(engine, renderer, SAMPLING)([]) == []


def test_a_system_message_reaches_the_model(engine, renderer):
    said = plain(engine, renderer, SAMPLING, system="Be brief.")(PROBLEMS[:2])
    assert [r.tokens for r in said[0]] != [
        r.tokens for r in plain(engine, renderer, SAMPLING)(PROBLEMS[:2])[0]
    ]


def test_progress_counts_every_sampled_token(engine, renderer):
    seen: list[tuple[int, int]] = []
    replies = plain(
        engine, renderer, SAMPLING, on_progress=lambda tokens, done: seen.append((tokens, done))
    )(PROBLEMS)
    tokens, done = (sum(column) for column in zip(*seen, strict=True))
    assert tokens == sum(len(r.tokens) for g in replies for r in g)
    assert done == sum(map(len, replies))


def test_greedy_replies_are_not_repeated():
    with pytest.raises(ConfigError, match="3 identical replies"):
        SamplingConfig.resolve({"temperature": 0, "num_samples": 3})
