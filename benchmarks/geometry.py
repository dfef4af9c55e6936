"""Phi-4-mini's geometry with random quantised weights, decoding in turns with reading memory."""

from dataclasses import dataclass
from typing import Any

from benchmarks.duel import Outcome, Play, Side
from benchmarks.full_size import geometry

SPREADS = {8: 73.0, 4: 4.6}
"""Standard deviation of integers drawn evenly, by their bits."""
PROMPT_TOKENS = 32
NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """One side's job; `bits` is None for the one that reads memory."""

    bits: int | None
    scale: str
    threads: int


def geometry_sides(threads: int, *, scale: str) -> list[Side]:
    """int8, int4, and reading memory."""
    return [
        *(Side(f"phikit int{bits}", decoding, Shape(bits, scale, threads)) for bits in (8, 4)),
        Side("reading memory", reading, Shape(None, scale, threads)),
    ]


def decoding(shape: Shape) -> Play:
    """One sequence; the rate is tokens a second."""
    import torch

    from phikit.base.device import set_threads
    from phikit.generate.bench import steady_rates, step_bytes
    from phikit.generate.engine import Engine
    from phikit.generate.request import Request

    set_threads(shape.threads)
    engine = Engine(random_model(shape))
    generator = torch.Generator().manual_seed(0)

    def play() -> Outcome:
        prompt = torch.randint(1000, 40_000, (PROMPT_TOKENS,), generator=generator).tolist()
        request = Request(prompt, max_new_tokens=NEW_TOKENS, temperature=0.0)
        [rate] = steady_rates(engine, [request], window=NEW_TOKENS)
        context = PROMPT_TOKENS + NEW_TOKENS // 2
        return Outcome(rate, {"bytes_per_token": step_bytes(engine, batch=1, context=context)})

    return play


def reading(shape: Shape) -> Play:
    """The rate is bytes a second of the fastest of several ways to read memory."""
    from phikit.base.bandwidth import read_speeds
    from phikit.base.device import set_threads

    set_threads(shape.threads)
    speeds = read_speeds(rounds=1_000)
    return lambda: Outcome(next(speeds), {})


def random_model(shape: Shape) -> Any:
    """The model with packed weights of random integers, made without ever being larger."""
    import torch
    from torch import Tensor, nn

    from phikit.models.registry import build
    from phikit.nn.quantised import QuantConfig
    from phikit.weights.build import named_tensors
    from phikit.weights.quantised import put_empty

    assert shape.bits is not None
    config, quantisation = geometry(shape.scale), QuantConfig.resolve({"bits": shape.bits})
    with torch.device("meta"):
        model = build(config)
    put_empty(model, quantisation)
    generator = torch.Generator().manual_seed(0)

    def drawn(key: str, tensor: Tensor) -> Tensor:
        if key.endswith(".packed"):
            return torch.empty(tensor.shape, dtype=torch.uint8).random_(generator=generator)
        assert tensor.ndim == 1 or key.endswith(".scales"), f"{key} is not quantised"
        value = 1.0
        if key.endswith(".scales"):
            in_head = not key.startswith("model.layers.")
            value = (
                config.init_std / SPREADS[quantisation.embedding_bits if in_head else shape.bits]
            )
        return torch.full(tensor.shape, value, dtype=torch.bfloat16)

    for key, tensor in list(named_tensors(model)):
        made = drawn(key, tensor)
        module, _, leaf = key.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made)
        setattr(model.get_submodule(module), leaf, made)
    return model
