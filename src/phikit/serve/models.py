"""Several models by name: loaded when first asked for, let go when memory is wanted for another.

A model that is in use is never let go. When no other can make room, the request is refused with a
time to ask again, not queued: a queue of loads would hold every client behind the slowest disk.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from time import monotonic, time
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from phikit.base.device import parse_dtype
from phikit.base.errors import ConfigError
from phikit.generate.cache import block_bytes
from phikit.generate.engine import Engine
from phikit.generate.language_model import LanguageModel, load
from phikit.models.registry import build
from phikit.serve.errors import ClosingError, ShelfFullError, UnknownModelError
from phikit.serve.worker import MAX_QUEUE, EngineWorker
from phikit.weights.describe import describe, weight_bytes

RETRY_AFTER_S = 10
MEMORY_SHARE = 0.8
"""Of the machine's memory: the default budget."""


class Source(NamedTuple):
    """Where a model comes from."""

    load: Callable[[], LanguageModel]
    size: Callable[[], int]
    """Bytes that its weights will take, known without loading it."""
    about: Mapping[str, Any] = MappingProxyType({})
    """Facts for listings, where they are known: `path`, `modified_s`, `size` (bytes on disk),
    `dtype`, `config`, `template`, `speaks_tools`, `thinks`; `senses`, the names of the modalities,
    and `adapters`, of those among them that have one."""


@dataclass(eq=False)
class ServedModel:
    """A loaded model and the worker that runs it."""

    name: str
    loaded: LanguageModel
    worker: EngineWorker
    load_s: float
    """How long loading took, in seconds."""
    users: int = 0
    used_at: float = field(default_factory=monotonic)

    @property
    def size(self) -> int:
        """Bytes of its weights and, at most, of its cache."""
        return weight_bytes(self.loaded.model) + _cache_bytes(self.worker.engine)


class ModelShelf:
    """The models of a server.

    Args:
        sources: by name; the first is the default.
        memory_bytes: what all loaded models may take, their caches included; None is a share of
            the machine's memory (`MEMORY_SHARE`).
        make_engine: the engine of a model; by default one with the engine's own defaults.
        max_queue: bounds the requests that wait at one model.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        *,
        memory_bytes: int | None = None,
        make_engine: Callable[[LanguageModel], Engine] | None = None,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        if not sources:
            raise ConfigError("there is no model to serve", fix="name one or more")
        self.sources = dict(sources)
        if memory_bytes is None:
            memory_bytes = int(MEMORY_SHARE * _machine_bytes())
        self.memory_bytes = memory_bytes
        self._make_engine = make_engine or (lambda loaded: Engine(loaded.model))
        self._max_queue = max_queue
        self._models: dict[str, ServedModel] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._is_closed = False

    @property
    def names(self) -> list[str]:
        return list(self.sources)

    @property
    def loaded(self) -> list[ServedModel]:
        """The models in memory, the least recently used first."""
        with self._lock:
            return sorted(self._models.values(), key=lambda model: model.used_at)

    @contextmanager
    def acquire(self, name: str) -> Iterator[ServedModel]:
        """A model, loaded if need be, which stays while the context lasts. Blocks while it loads.

        Raises:
            UnknownModelError: there is none of this name.
            ShelfFullError: memory is short, and all loaded models are in use.
            ClosingError: the shelf is closed.
            PhikitError: as `phikit.load`.
        """
        model = self._take(name) or self._load(name)
        try:
            yield model
        finally:
            self._give_back(model)

    @asynccontextmanager
    async def acquire_async(self, name: str) -> AsyncIterator[ServedModel]:
        """`acquire` for an event loop: a model that has to be loaded is loaded in a thread."""
        model = self._take(name) or await self._load_async(name)
        try:
            yield model
        finally:
            self._give_back(model)

    def close(self, timeout_s: float = 0.0) -> None:
        """Let all models go; their running requests have so long to finish."""
        with self._lock:
            self._is_closed = True
            models = list(self._models.values())
        threads = [threading.Thread(target=m.worker.close, args=(timeout_s,)) for m in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _take(self, name: str) -> ServedModel | None:
        """The model if it is loaded, marked as in use."""
        if name not in self.sources:
            near = get_close_matches(name, self.sources, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(self.names)}"
            raise UnknownModelError(f"there is no model {name!r} here", fix=fix)
        with self._lock:
            if self._is_closed:
                raise ClosingError
            model = self._models.get(name)
            if model is not None:
                model.users += 1
                model.used_at = monotonic()
            return model

    def _give_back(self, model: ServedModel) -> None:
        with self._lock:
            model.users -= 1
            model.used_at = monotonic()

    async def _load_async(self, name: str) -> ServedModel:
        """`_load` in a thread. Whoever leaves meanwhile does not leave the model in use."""
        loaded: list[ServedModel] = []
        settling, is_gone = threading.Lock(), False

        def load() -> None:
            model = self._load(name)
            with settling:
                if not is_gone:
                    loaded.append(model)
                    return
            self._give_back(model)

        try:
            await asyncio.to_thread(load)
        except asyncio.CancelledError:
            with settling:
                is_gone = True
            for model in loaded:
                self._give_back(model)
            raise
        return loaded[0]

    def _load(self, name: str) -> ServedModel:
        """Load a model, one at a time, and mark it as in use."""
        with self._loading:
            model = self._take(name)
            if model is not None:
                return model
            self._make_room(name, self.sources[name].size())
            started = time()
            loaded = self.sources[name].load()
            loaded.model.eval()
            worker = EngineWorker(
                self._make_engine(loaded), max_queue=self._max_queue, name=f"engine of {name}"
            )
            model = ServedModel(name, loaded, worker, time() - started)
            with self._lock:
                self._models[name] = model
            # The cache's bytes are known only now.
            try:
                self._make_room(name, 0)
                return self._take(name) or model
            except BaseException:
                self._let_go([model])
                raise

    def _make_room(self, name: str, needed: int) -> None:
        """Let models go, the least recently used first, until so many bytes are free.

        Raises ShelfFullError if that would take one that is in use.
        """
        leaving: list[ServedModel] = []
        with self._lock:
            sizes = {model: model.size for model in self._models.values()}
            excess = needed + sum(sizes.values()) - self.memory_bytes
            idle = [m for m in self._models.values() if not m.users and m.name != name]
            for model in sorted(idle, key=lambda model: model.used_at):
                if excess <= 0:
                    break
                leaving.append(model)
                excess -= sizes[model]
            others_in_use = [m.name for m in self._models.values() if m.users and m.name != name]
            if excess > 0 and others_in_use:
                raise ShelfFullError(
                    f"there is no room for {name!r} beside {', '.join(others_in_use)}, in use now",
                    retry_after_s=RETRY_AFTER_S,
                    fix="ask again later, or raise the memory budget of the server",
                )
            if excess > 0:
                raise ConfigError(
                    f"{name!r} takes {excess:,} bytes more than the budget of "
                    f"{self.memory_bytes:,} for weights and cache",
                    fix="raise the memory budget, or lower the cache's",
                )
        self._let_go(leaving)

    def _let_go(self, models: list[ServedModel]) -> None:
        with self._lock:
            for model in models:
                self._models.pop(model.name, None)
        for model in models:
            model.worker.close()


def source(path: str | Path, *, dtype: str | None = None) -> Source:
    """The source of what `phikit.load` takes.

    Raises:
        WeightsError: nothing is there, or it is damaged.
        ConfigError: the model is of another family, or the dtype is unknown.
    """
    described = describe(path)
    about = {
        "path": str(described.path),
        "modified_s": described.path.stat().st_mtime,
        "size": described.stored.size,
        "dtype": described.stored.dtype,
        "config": described.config,
        "senses": tuple(sense.name for sense in described.senses),
        "adapters": tuple(sense.name for sense in described.senses if sense.has_adapter),
        "template": getattr(described.renderer, "template", ""),
        "speaks_tools": getattr(described.renderer, "speaks_tools", False),
        "thinks": getattr(described.renderer, "thinks", False),
    }

    def size() -> int:
        packed = described.packed
        attached = sum(sense.parameters or 0 for sense in described.senses)
        if packed is not None:
            return packed.size + 4 * (sum(packed.kept.values()) + attached)
        with torch.device("meta"):
            numbers = sum(part.numel() for part in build(described.config).parameters())
        numbers += attached
        return numbers * _dtype(dtype or described.stored.dtype).itemsize

    return Source(lambda: load(path, dtype=dtype), size, about)


def _dtype(name: str) -> torch.dtype:
    """The dtype in memory; quantised GGUF files become float32."""
    try:
        return parse_dtype(name)
    except ConfigError:
        return torch.float32


def _cache_bytes(engine: Engine) -> int:
    blocks = engine.pool.size
    return blocks * block_bytes(engine.model.config, engine.cache_dtype)


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
