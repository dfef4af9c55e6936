"""What a step reads, and which steps count; speeds themselves are not tested."""

import pytest
import torch

from phikit.base.errors import ConfigError, ContextOverflowError
from phikit.generate.bench import Plan, measure, steady_rates, step_bytes, weight_bytes
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.moe import MoEConfig, MoEModel
from phikit.models.multimodal import MultimodalModel
from phikit.nn.lora import attach_lora

CACHE_OF_A_TOKEN = 2 * 2 * 2 * 16 * 4
"""Keys and values, layers, heads, their width, bytes; of the tiny model."""


def matrix_bytes(model) -> int:
    """Of the blocks, the final norm and the head, which the embeddings may be tied to."""
    head = model.lm_head.weight.nbytes
    body = (*model.model.layers.parameters(), *model.model.norm.parameters())
    return head + sum(parameter.nbytes for parameter in body)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_the_weights_and_the_cache(tiny_model, tied: bool):
    model = tiny_model(tie_embeddings=tied)
    found = step_bytes(Engine(model), batch=3, context=10)
    assert found == matrix_bytes(model) + 3 * 10 * CACHE_OF_A_TOKEN
    everything = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(model) == everything
    assert (found - 3 * 10 * CACHE_OF_A_TOKEN == everything) == tied


def test_keys_out_of_the_window_are_not_read(tiny_model):
    engine = Engine(tiny_model(sliding_window=4))
    near, far = (step_bytes(engine, batch=1, context=c) for c in (4, 100))
    assert near == far


def test_adapters_and_encoders_are_not_read(tiny_model, tiny_multimodal):
    model = tiny_model()
    before = step_bytes(Engine(model), batch=1, context=1)
    attach_lora(model, name="a", targets=("qkv_proj",), rank=2, alpha=4)
    assert step_bytes(Engine(model), batch=1, context=1) == before
    model: MultimodalModel = tiny_multimodal()
    spared = sum(
        p.nbytes for p in (*model.image_embed.parameters(), *model.audio_embed.parameters())
    )
    assert step_bytes(Engine(model), batch=1, context=1) < weight_bytes(model) - spared


def test_experts_that_no_token_meets_are_not_read():
    size = {"vocab_size": 64, "d_model": 32, "num_layers": 1, "d_mlp": 32, "max_context": 32}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "num_experts": 4}
    model = MoEModel(MoEConfig.resolve({**size, **heads}))
    engine = Engine(model)
    experts = weight_bytes(model.model.layers[0].mlp.experts)  # type: ignore[union-attr]
    cache = step_bytes(engine, batch=1, context=2) - step_bytes(engine, batch=1, context=1)
    one, two, many = (step_bytes(engine, batch=b, context=1) - b * cache for b in (1, 2, 1000))
    assert many - one == pytest.approx(experts / 2)  # a token meets two of four
    assert many - two == pytest.approx(experts / 4)
    assert many == pytest.approx(matrix_bytes(model) + model.lm_head.bias.nbytes)


def requests(count: int, *, new_tokens: int) -> list[Request]:
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(300, (20,), generator=draw).tolist() for _ in range(count)]
    return [Request(prompt, max_new_tokens=new_tokens, temperature=0.0) for prompt in prompts]


def test_rates_come_by_windows(tiny_model):
    engine, told = Engine(tiny_model()), []
    rates = steady_rates(engine, requests(3, new_tokens=9), window=4, on_tokens=told.append)
    assert len(rates) == 2 and min(rates) > 0
    assert sum(told) == 27


def test_steps_in_which_some_still_read_their_prompts_do_not_count(tiny_model):
    engine, told = Engine(tiny_model(), step_tokens=20), []
    steady_rates(engine, requests(3, new_tokens=9), window=4, on_tokens=told.append)
    assert told[0] < 3 and told.count(3) > 1


def test_what_never_decodes_together_is_refused(tiny_model):
    engine = Engine(tiny_model(), max_rows=2)
    with pytest.raises(ConfigError, match="3 requests were never decoded together"):
        steady_rates(engine, requests(3, new_tokens=9), window=4)


def test_measure(tiny_model):
    done: dict[str, int] = {}
    plan = Plan(prompt_tokens=20, new_tokens=4, batches=(1, 2), rounds=2)

    def on_progress(task: str, tokens: int) -> None:
        done[task] = done.get(task, 0) + tokens

    speed = measure(Engine(tiny_model()), plan, on_progress=on_progress)
    assert list(done) == ["prefill", "decode, batch 1", "decode, batch 2"]
    assert sum(done.values()) == plan.work
    assert [row.batch for row in speed.decode] == [1, 2]
    for low, middle, high in (
        (spread.low, spread.median, spread.high)
        for spread in (speed.first_token_s, *(row.tokens_per_s for row in speed.decode))
    ):
        assert 0 < low <= middle <= high


def test_what_does_not_fit_is_refused_before_any_work(tiny_model):
    plan = Plan(prompt_tokens=100, new_tokens=10, batches=(1,), rounds=3)
    with pytest.raises(ContextOverflowError, match="131, and the model's context is 128"):
        measure(Engine(tiny_model()), plan, on_progress=lambda task, tokens: pytest.fail(task))
