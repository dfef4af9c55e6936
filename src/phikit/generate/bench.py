"""How fast an engine is here, and how much memory its decoding reads for that.

A batch decodes when each of its sequences is given one token a step. What a call of the engine
spends on prompts, or while some sequences have not begun or have ended, is left out: only steps
in which all of them are given a token count (`steady_rates`).

A step reads all weights that a token meets and the keys and values of all sequences, so bytes a
step times steps a second is what decoding reads from memory, and from the caches of the processor
where a model is small enough to stay there.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple, Self

import torch
from torch import nn

from phikit.base.errors import ConfigError
from phikit.generate.blocks import BLOCK_TOKENS
from phikit.generate.cache import block_bytes
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.decoder import Decoder
from phikit.nn.lora import LowRank, LowRankExperts
from phikit.nn.moe.experts import Experts


class Spread(NamedTuple):
    """Some rounds of a measurement."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median(values), min(values), max(values))


class DecodeSpeed(NamedTuple):
    """Decoding of so many sequences at once."""

    batch: int
    tokens_per_s: Spread
    """Of all sequences together."""
    bytes_per_step: float
    """Weights, keys and values that a step reads."""

    @property
    def bytes_per_s(self) -> float:
        return self.bytes_per_step * self.tokens_per_s.median / self.batch


class Speed(NamedTuple):
    """What `measure` found."""

    first_token_s: Spread
    """From a request to its first token."""
    prefill_tokens_per_s: Spread
    """Tokens of the prompt over that time."""
    decode: list[DecodeSpeed]


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        prompt_tokens: of every prompt; no two prompts are alike.
        new_tokens: of every sequence, in one round of decoding.
        batches: numbers of sequences that decode together.
        rounds: of everything, after one that does not count.
    """

    prompt_tokens: int
    new_tokens: int
    batches: tuple[int, ...]
    rounds: int

    @property
    def reply_tokens(self) -> int:
        """Tokens a sequence decodes in all: a first one, and the rounds one after another."""
        return 1 + self.new_tokens * self.rounds

    @property
    def work(self) -> int:
        """Tokens that go through the engine, as `measure` reports them."""
        prefilled = self.prompt_tokens * (1 + self.rounds + sum(self.batches))
        return prefilled + self.reply_tokens * sum(self.batches)


def measure(engine: Engine, plan: Plan, *, on_progress: Callable[[str, int], None]) -> Speed:
    """Time the engine on random prompts; `on_progress` is told (what is measured, tokens done).

    Raises:
        ContextOverflowError: a prompt and its rounds do not fit into the model's context.
        ConfigError: a batch is never decoded together, see `steady_rates`.
    """
    prompts = _Prompts(engine.model, plan.prompt_tokens)
    engine.check(prompts.request(plan.reply_tokens))
    waits, decode = [], []
    for _ in range(1 + plan.rounds):
        request = prompts.request(1)
        started = time.perf_counter()
        next(engine.stream(request))
        waits.append(time.perf_counter() - started)
        on_progress("prefill", plan.prompt_tokens)
    for batch in plan.batches:
        task = f"decode, batch {batch}"
        rates = steady_rates(
            engine,
            [prompts.request(plan.reply_tokens) for _ in range(batch)],
            window=plan.new_tokens,
            on_tokens=lambda count, task=task: on_progress(task, count),
        )
        on_progress(task, plan.prompt_tokens * batch)
        context = plan.prompt_tokens + plan.reply_tokens // 2
        read = step_bytes(engine, batch=batch, context=context)
        decode.append(DecodeSpeed(batch, Spread.of(rates), read))
    prefill = [plan.prompt_tokens / wait for wait in waits[1:]]
    return Speed(Spread.of(waits[1:]), Spread.of(prefill), decode)


def steady_rates(
    engine: Engine,
    requests: Sequence[Request],
    *,
    window: int,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Tokens a second of all requests together, one figure for every `window` steady steps.

    A step is steady if each request is given one token in it and in the step before. The last
    figure may cover some steps more or less. Each request has one sample.

    Raises ConfigError if there are no such steps: the first requests end before the last one's
    prompt is through, or the engine has not as many rows or as large a cache.
    """
    ends: list[float] = []

    def on_progress(tokens: int, finished: int) -> None:
        on_tokens(tokens)
        if tokens == len(requests):
            ends.append(time.perf_counter())

    engine.generate(requests, on_progress=on_progress)
    steps = len(ends) - 1
    if steps < 1:
        raise ConfigError(
            f"{len(requests)} requests were never decoded together: the first of them ended before "
            "the last began",
            fix="ask for more new tokens, shorter prompts, or a smaller batch",
        )
    starts = [0, *(s for s in range(window, steps, window) if steps - s >= window / 2), steps]
    spans = pairwise(starts)
    return [len(requests) * (b - a) / (ends[b] - ends[a]) for a, b in spans]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model, shared ones once."""
    return sum(tensor.nbytes for tensor in _tensors(model).values())


def step_bytes(engine: Engine, *, batch: int, context: int) -> float:
    """Bytes that one step reads: weights, and the keys and values of `context` tokens a sequence.

    Embeddings that are not tied to the head, encoders and idle adapters are not read. Of experts
    those are that `batch` tokens meet if the router favours none.
    """
    model, config = engine.model, engine.model.config
    read = {**_tensors(model.model.layers), **_tensors(model.model.norm), **_tensors(model.lm_head)}
    for module in model.model.modules():
        if isinstance(module, LowRank | LowRankExperts):
            for key in _tensors(module):
                read.pop(key, None)
    weights: float = sum(tensor.nbytes for tensor in read.values())
    for module in model.model.modules():
        if isinstance(module, Experts):
            experts = module.down_proj.num_experts
            unmet = (1 - config.top_k / experts) ** batch  # pyright: ignore
            weights -= unmet * weight_bytes(module)
    seen = min(context, config.sliding_window or context)
    return weights + batch * seen * block_bytes(config, engine.cache_dtype) / BLOCK_TOKENS


def _tensors(module: nn.Module) -> dict[int, torch.Tensor]:
    """Parameters and buffers by address."""
    return {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}


class _Prompts:
    """Makes requests with random prompts, all different: no prefix of one is in the cache.

    Their ids are of the first half of the vocabulary: placeholders of media are in the second.
    """

    def __init__(self, model: Decoder, length: int) -> None:
        self._ids, self._length = model.config.vocab_size // 2, length
        self._generator = torch.Generator().manual_seed(0)

    def request(self, new_tokens: int) -> Request:
        ids = torch.randint(self._ids, (self._length,), generator=self._generator)
        return Request(ids.tolist(), max_new_tokens=new_tokens, temperature=0.0)
