"""A replayed step is the step itself, to the last bit; what cannot be replayed is not."""

import random
from collections.abc import Callable, Sequence
from threading import Thread

import pytest
import torch
from torch import Tensor

from phikit.chat.render import renderer_for
from phikit.generate import replay
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.generate.speculate import DraftModel
from phikit.models.dense import DenseModel
from phikit.nn import kernels
from phikit.nn.kernels.record import NotRecordable, Recording, record
from phikit.nn.lora import attach_lora, choose_adapter
from phikit.nn.quantised import QuantConfig
from phikit.weights.load import Loaded
from phikit.weights.quantise import quantise

Said = list[tuple[list[int], list[float]]]


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    with torch.inference_mode():
        if not kernels.ready(torch.ones(1)):
            pytest.skip(f"needs the compiled kernels, which are {kernels.status()}")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every step that was replayed."""
    rows: list[int] = []
    plain = Recording.replay

    def replayed(self: Recording, inputs: Sequence[Tensor]) -> Tensor:
        rows.append(len(inputs[0]))
        return plain(self, inputs)

    monkeypatch.setattr(Recording, "replay", replayed)
    return rows


@pytest.fixture
def make(tiny_model, nano_tokenizer) -> Callable[[str], DenseModel]:
    def model_of(weights: str) -> DenseModel:
        sizes = {"d_model": 64, "tie_embeddings": False}  # whole groups
        if not weights.startswith("int"):
            return tiny_model(**sizes).to(getattr(torch, weights))
        model = tiny_model(**sizes).bfloat16()
        config = QuantConfig.resolve({"bits": int(weights[3:]), "group": 32})
        quantise(Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini")), config)
        return model

    return model_of


def requests(seed: int, *, count: int = 9) -> list[Request]:
    """Prompts and replies of all lengths, some greedy."""
    draw = random.Random(seed)
    return [
        Request(
            [draw.randrange(300) for _ in range(draw.randint(1, 30))],
            max_new_tokens=draw.randint(1, 20),
            temperature=draw.choice([0.0, 1.0]),
            seed=draw.randrange(1000),
        )
        for _ in range(count)
    ]


def said(engine: Engine, asked: list[Request]) -> Said:
    return [(c.tokens, c.log_probs) for [c] in engine.generate(asked)]


def said_plainly(model: DenseModel, asked: list[Request], **settings) -> Said:
    """By an engine that records nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "record", refuse)
        return said(Engine(model, **settings), asked)


def refuse(*_: object) -> None:
    raise NotRecordable


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("settings", [{}, {"cache_dtype": "int8"}, {"max_rows": 3}])
def test_replays_say_the_same_to_the_last_bit(make, replays, weights, settings):
    model = make(weights)
    engine = Engine(model, **settings)
    for seed in range(3):
        asked = requests(seed)
        found, before = said(engine, asked), len(replays)
        assert found == said_plainly(model, asked, **settings)
        assert len(replays) == before
    assert len(set(replays)) >= min(3, settings.get("max_rows", 3)) - 1, "nothing was replayed"


def test_windows_and_long_contexts_are_replayed_as_they_are(tiny_model, replays):
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.7], "long_factor": [1, 2, 3, 4, 5, 7.9]}
    for changes in ({"sliding_window": 5}, {"longrope": {**factors, "original_context": 30}}):
        model, asked = tiny_model(**changes), requests(1)
        assert said(Engine(model), asked) == said_plainly(model, asked)
    assert replays


def test_drafts_are_replayed(make, replays):
    model, asked = make("float32"), requests(2)
    engine = Engine(model, drafter=DraftModel(make("float32")))
    assert [tokens for tokens, _ in said(engine, asked)] == [
        tokens for tokens, _ in said_plainly(model, asked)
    ]
    assert replays


def test_new_weights_are_seen_wherever_they_lie(make, replays):
    model, asked = make("float32"), requests(3)
    engine = Engine(model)
    first = said(engine, asked)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)  # training writes in place
    second = said(engine, asked)
    assert second != first
    assert second == said_plainly(model, asked)
    moved = model.model.layers[1].self_attn.o_proj
    moved.weight = torch.nn.Parameter(moved.weight.detach() * 1.5)
    assert said(engine, asked) == said_plainly(model, asked) != second
    assert replays


def test_adapters_are_not_replayed(make, replays):
    model, asked = make("float32"), requests(4)
    engine = Engine(model)
    without = said(engine, asked)
    parameters = attach_lora(model, name="a", targets=["qkv_proj"], rank=2, alpha=8.0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    choose_adapter(model, "a")
    replays.clear()
    adapted = said(engine, asked)
    assert not replays
    assert adapted == said_plainly(model, asked) != without
    choose_adapter(model, None)
    assert said(engine, asked) == without


def test_recordings_take_bounded_memory(make, replays, monkeypatch):
    model = make("bfloat16")
    engine = Engine(model)
    said(engine, requests(5))
    sizes = [each.num_bytes for each in engine._replays._recordings.values() if each]
    assert len(sizes) >= 3
    monkeypatch.setattr(replay, "MOST_BYTES", max(sizes))
    engine._replays.forget()
    asked = requests(6)
    assert said(engine, asked) == said_plainly(model, asked)
    kept = [each for each in engine._replays._recordings.values() if each]
    assert sum(each.num_bytes for each in kept) <= max(sizes)


@pytest.mark.parametrize(
    "stray",
    [
        lambda x: x.sin(),
        lambda x: x + 1,
        lambda x: x + x[:1],
        lambda x: x.double().float(),
        lambda x: x.mul_(2),
        lambda x: x.expand(2, -1, -1).flatten(),
        lambda x: x[x.argmax() :],
    ],
)
@torch.inference_mode()
def test_what_is_no_kernel_ends_the_recording(stray):
    x = torch.ones(3, 2)
    assert torch.equal(
        record(lambda: kernels.add(x, x) + x, [x]).replay([2 * x]), 6 * torch.ones(3, 2)
    )
    with pytest.raises(NotRecordable):
        record(lambda: stray(kernels.add(x, x)), [x])


@torch.inference_mode()
def test_other_threads_calls_are_not_written_down():
    x = torch.ones(4)

    def compute() -> Tensor:
        other = Thread(target=beside)
        other.start()
        other.join()
        return kernels.add(x, x)

    @torch.inference_mode()
    def beside() -> None:
        kernels.add(x, x)

    assert len(record(compute, [x])._calls) == 1
