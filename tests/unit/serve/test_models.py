"""The shelf: models come when asked for, and leave when memory is wanted, unless in use."""

import asyncio
import threading
import time

import pytest
import torch

from phikit.base.errors import ConfigError, WeightsError
from phikit.generate.engine import Engine
from phikit.generate.language_model import LanguageModel
from phikit.generate.request import Request
from phikit.serve.errors import ClosingError, ShelfFullError, UnknownModelError
from phikit.serve.models import ModelShelf, Source, source
from phikit.weights.describe import weight_bytes
from phikit.weights.save import save

CACHE = 1 << 20


@pytest.fixture
def sources(tiny: LanguageModel) -> dict[str, Source]:
    size = weight_bytes(tiny.model)
    return {name: Source(lambda: tiny, lambda: size) for name in "abc"}


def shelf_of(sources: dict[str, Source], *, models: int) -> ModelShelf:
    """With room for so many models."""
    make = lambda loaded: Engine(loaded.model, cache_bytes=CACHE)  # noqa: E731
    some = next(iter(sources.values()))
    return ModelShelf(sources, memory_bytes=models * (some.size() + CACHE), make_engine=make)


def test_models_are_loaded_once_and_kept(sources):
    shelf = shelf_of(sources, models=3)
    with shelf.acquire("a") as first, shelf.acquire("a") as again:
        assert first is again and first.users == 2
        assert list(first.worker.submit(Request([1], 3)))
    assert first.users == 0
    assert [model.name for model in shelf.loaded] == ["a"]
    shelf.close()
    with pytest.raises(ClosingError), shelf.acquire("a"):
        pass


def test_the_least_recently_used_leaves(sources):
    shelf = shelf_of(sources, models=2)
    for name in "abac":
        with shelf.acquire(name):
            pass
    assert [model.name for model in shelf.loaded] == ["a", "c"]
    shelf.close()


def test_a_model_in_use_stays(sources):
    shelf = shelf_of(sources, models=1)
    in_use = pytest.raises(ShelfFullError, match="a, in use")
    with shelf.acquire("a"), in_use, shelf.acquire("b"):
        pass
    with shelf.acquire("b"):
        assert [model.name for model in shelf.loaded] == ["b"]
    shelf.close()


def test_a_model_beyond_the_budget_is_an_error(sources):
    with pytest.raises(ConfigError, match="budget"), shelf_of(sources, models=0).acquire("a"):
        pass
    small = shelf_of(sources, models=1)
    small.memory_bytes -= CACHE // 2  # the weights fit, with the cache they do not
    with pytest.raises(ConfigError, match="budget"), small.acquire("a"):
        pass
    assert small.loaded == []


def test_unknown_names_get_a_suggestion(sources):
    unknown = pytest.raises(UnknownModelError, match="there is no model 'tiny'")
    with unknown, shelf_of(sources, models=1).acquire("tiny"):
        pass


def test_a_load_that_fails_leaves_nothing(sources):
    def fail() -> LanguageModel:
        raise WeightsError("damaged")

    shelf = ModelShelf({"a": Source(fail, lambda: 0), "b": sources["b"]})
    for _ in range(2):
        with pytest.raises(WeightsError), shelf.acquire("a"):
            pass
    with shelf.acquire("b") as model:
        assert model.users == 1
    shelf.close()


def test_loading_does_not_hold_up_the_loop_nor_models_in_use(tiny, sources):
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> LanguageModel:
        begun.set()
        assert go_on.wait(10)
        return tiny

    shelf = ModelShelf({"slow": Source(slow, lambda: 0), "b": sources["b"]})

    async def use() -> None:
        async def load() -> None:
            async with shelf.acquire_async("slow"):
                pass

        with shelf.acquire("b"):
            pass
        loading = asyncio.create_task(load())
        gone = asyncio.create_task(load())
        await asyncio.to_thread(begun.wait)
        started = time.monotonic()
        async with shelf.acquire_async("b") as model:
            assert model.users == 1
        assert time.monotonic() - started < 1
        gone.cancel()
        go_on.set()
        await loading

    asyncio.run(use())
    deadline = time.monotonic() + 5
    while any(model.users for model in shelf.loaded) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [model.users for model in shelf.loaded] == [0, 0]
    shelf.close()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_source_knows_the_size_before_it_loads(tiny: LanguageModel, tmp_path, dtype):
    save(tmp_path, tiny)
    of_folder = source(tmp_path, dtype=dtype)
    loaded = of_folder.load()
    assert of_folder.size() == weight_bytes(loaded.model)
    assert loaded.model.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert of_folder.about["config"] == tiny.config and of_folder.about["speaks_tools"]
