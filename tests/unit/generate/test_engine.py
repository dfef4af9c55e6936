"""What the engine refuses, and the plain facts of a completion."""

import pytest
import torch

from phikit.base.errors import ContextOverflowError
from phikit.generate.engine import Engine
from phikit.generate.request import Request


@pytest.fixture(scope="module")
def engine(tiny_model) -> Engine:
    return Engine(tiny_model(tie_embeddings=False))


@pytest.mark.parametrize(("length", "new"), [(128, 1), (1, 128), (500, 1)])
def test_a_request_longer_than_the_context(engine: Engine, length: int, new: int):
    request = Request([1] * length, max_new_tokens=new)
    for run in (lambda: engine.generate([request]), lambda: list(engine.stream(request))):
        with pytest.raises(ContextOverflowError, match=f"= {length + new}, and .* is 128"):
            run()


def test_the_whole_context_can_be_used(engine: Engine):
    [[completion]] = engine.generate([Request([1] * 100, max_new_tokens=28, temperature=0.0)])
    assert len(completion.tokens) == len(completion.log_probs) == 28
    assert completion.finish_reason == "length"


def test_an_empty_prompt(engine: Engine):
    with pytest.raises(ContextOverflowError, match="the prompt is empty"):
        engine.generate([Request([], max_new_tokens=1)])


def test_no_requests(engine: Engine):
    assert engine.generate([]) == []


def test_the_stop_token_is_part_of_the_completion(engine: Engine):
    [[free]] = engine.generate([Request([5, 6], max_new_tokens=20, temperature=0.0)])
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    request = Request([5, 6], max_new_tokens=20, temperature=0.0, stop_ids=(stop,))
    [[stopped]] = engine.generate([request])
    assert stopped.tokens == free.tokens[: first + 1]
    assert stopped.finish_reason == "stop"


def test_the_model_is_left_as_it_was(engine: Engine):
    engine.generate([Request([5, 6], max_new_tokens=4)])
    loss = engine.model(torch.arange(6)[None]).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in engine.model.parameters())
