"""Phi-3-small against its definition, written out head by head, query by query, key by key.

transformers has no implementation; the definition is that of the sources in `models/phi3_small.py`.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.base.errors import ConfigError
from phikit.base.types import IGNORE, Batch
from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.phi3_small import Phi3SmallConfig, Phi3SmallModel, checkpoint_parts
from phikit.models.registry import config_from_hf, config_to_hf, parameter_count
from phikit.nn import attention
from phikit.nn.attention import BlockSparse, CausalAttention
from phikit.nn.losses import token_log_probs_and_entropy
from phikit.train.lm import cross_entropy
from phikit.weights.load import Loaded, load
from phikit.weights.save import checkpoint_tensors, save

SIZE: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "d_mlp": 96,
    "max_context": 128,
    "rope_theta": 1e4,
    "gegelu_limit": 0.8,
    "embedding_multiplier": 1.5,
    "attention_multiplier": 6.0,
    "pattern": {"block": 4, "local_blocks": 2, "vertical_stride": 3},
    "dummy_tokens": (7, 290),
    "tie_embeddings": False,
    "init_std": 0.12,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "more heads than the stride": {},
    "fewer heads than the stride": {
        "num_heads": 2,
        "head_dim": 32,
        "pattern": {"block": 3, "local_blocks": 1, "vertical_stride": 5},
    },
    "one pattern for all heads": {"pattern": SIZE["pattern"] | {"same_for_all_heads": True}},
    "no dense layer": {"dense_every": None},
    "usual scales, tied": {
        "tie_embeddings": True,
        "attention_multiplier": None,
        "embedding_multiplier": 1.0,
        "width_multiplier": 1.0,
    },
}
PHI_3_SMALL_8K = {
    "attention_bias": False,
    "attention_dropout_prob": 0.0,
    "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64,
    "blocksparse_vert_stride": 8,
    "bos_token_id": 100257,
    "dense_attention_every_n_layers": 2,
    "embedding_dropout_prob": 0.1,
    "eos_token_id": 100257,
    "ff_dim_multiplier": None,
    "ff_intermediate_size": 14336,
    "ffn_dropout_prob": 0.1,
    "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True,
    "hidden_act": "gegelu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 8192,
    "model_type": "phi3small",
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True,
    "mup_width_multiplier": 8.0,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_sequence_to_multiple_of_64": True,
    "reorder_and_upcast_attn": False,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "use_cache": True,
    "vocab_size": 100352,
}


def tiny(**changes: Any) -> Phi3SmallModel:
    """A small random model; norms and biases are random too, so that each of them counts."""
    generator = torch.Generator().manual_seed(0)
    config = Phi3SmallConfig.resolve({**SIZE, **changes})
    model = Phi3SmallModel(config).initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request) -> Phi3SmallModel:
    return tiny(**VARIANTS[request.param])


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(3))


# --- The definition -----------------------------------------------------------------------------


def is_seen(config: Phi3SmallConfig, *, layer: int, head: int, query: int, key: int) -> bool:
    if key > query:
        return False
    if config.dense_every is not None and (layer + 1) % config.dense_every == 0:
        return True
    pattern = config.pattern
    step = max(1, pattern.vertical_stride // config.num_heads)
    offset = 0 if pattern.same_for_all_heads else head * step
    query_block, key_block = query // pattern.block, key // pattern.block
    is_local = query_block - key_block < pattern.local_blocks
    return is_local or (key_block + offset + 1) % pattern.vertical_stride == 0


def turned(x_H: Tensor, position: int, theta: float) -> Tensor:
    half = len(x_H) // 2
    angles = torch.tensor([position * theta ** (-i / half) for i in range(half)]).to(x_H)
    a, b = x_H[:half], x_H[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


def attended(config: Phi3SmallConfig, qkv_TX: Tensor, *, layer: int) -> Tensor:
    width, group = config.head_dim, config.num_heads // config.num_kv_heads
    multiplier = config.attention_multiplier
    scale = 1 / math.sqrt(width) if multiplier is None else multiplier / width
    heads = []
    for head in range(config.num_heads):
        first = head // group * (group + 2)  # of this key head: its queries, its key, its value
        q, k, v = (
            qkv_TX[:, (first + place) * width :][:, :width]
            for place in (head % group, group, group + 1)
        )
        k = [turned(row, t, config.rope_theta) for t, row in enumerate(k)]
        rows = []
        for query in range(len(q)):
            q_H = turned(q[query], query, config.rope_theta)
            seen = [
                key
                for key in range(len(q))
                if is_seen(config, layer=layer, head=head, query=query, key=key)
            ]
            weights = torch.stack([q_H @ k[key] * scale for key in seen]).softmax(0)
            rows.append(sum(w * v[key] for w, key in zip(weights, seen, strict=True)))
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=1)


def definition(config: Phi3SmallConfig, tensors: dict[str, Tensor], tokens_T: Tensor) -> Tensor:
    """Logits [T, V] from the tensors of a checkpoint, under its names."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return F.layer_norm(x, (config.d_model,), weight, bias, config.norm_eps)

    embedding = tensors["model.embed_tokens.weight"]
    x = embedding[tokens_T] * config.embedding_multiplier
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}"
        qkv = linear(f"{block}.self_attn.query_key_value", norm(f"{block}.input_layernorm", x))
        x = x + linear(f"{block}.self_attn.dense", attended(config, qkv, layer=layer))
        up = linear(f"{block}.mlp.up_proj", norm(f"{block}.post_attention_layernorm", x))
        gate, value = up[:, ::2], up[:, 1::2]
        gate = gate.clamp(max=config.gegelu_limit)
        value = value.clamp(-config.gegelu_limit, config.gegelu_limit)
        x = x + linear(f"{block}.mlp.down_proj", gate * (1.702 * gate).sigmoid() * (value + 1))
    head = embedding if config.tie_embeddings else tensors["lm_head.weight"]
    logits = norm("model.final_layernorm", x) @ head.T / config.width_multiplier
    return logits.index_fill(1, torch.tensor(config.dummy_tokens), -math.inf)


def doubles(model: Phi3SmallModel) -> dict[str, Tensor]:
    tensors = checkpoint_tensors(model, dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


# --- Against it ---------------------------------------------------------------------------------


def test_logits_and_gradients(model: Phi3SmallModel):
    config, tensors = model.config, doubles(model)
    tokens_T = random_tokens(37)
    expected = definition(config, tensors, tokens_T)
    logits = model(tokens_T[None])[0]
    torch.testing.assert_close(logits, expected.float(), atol=1e-5, rtol=0)
    assert (logits == -math.inf).nonzero()[:, 1].unique().tolist() == list(config.dummy_tokens)

    weights = torch.rand(37, 300, generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    for result in (logits, expected):
        (result.softmax(-1) * weights).sum().backward()
    compared = set()
    for key, parameter in model.named_parameters():
        [(name, _)] = checkpoint_parts(config, key)
        assert parameter.grad is not None
        true_grad = tensors[name].grad
        assert true_grad is not None
        distance = (parameter.grad - true_grad).norm() / true_grad.norm()
        assert distance <= 1e-4, (name, float(distance))
        compared.add(name)
    assert compared == set(tensors)


def test_greedy_with_cache_is_the_uncached_model(model: Phi3SmallModel):
    """Prompts of several lengths share a grid, so positions and places in the cache differ."""
    requests = [
        Request(random_tokens(40)[:length].tolist(), max_new_tokens=64, temperature=0.0)
        for length in (3, 17, 29, 40)
    ]
    for request, [completion] in zip(requests, Engine(model).generate(requests), strict=True):
        tokens = torch.tensor([[*request.prompt, *completion.tokens]])
        with torch.no_grad():
            greedy = model(tokens)[0, len(request.prompt) - 1 : -1].argmax(-1)
        assert completion.tokens == greedy.tolist()
        assert len(completion.tokens) == 64


@torch.no_grad()
def test_samples_have_the_log_probs_of_the_model(model: Phi3SmallModel):
    request = Request(random_tokens(21).tolist(), max_new_tokens=40, num_samples=3, seed=1)
    [samples] = Engine(model).generate([request])
    for sample in samples:
        assert not set(model.config.dummy_tokens) & set(sample.tokens)
        tokens = torch.tensor([[*request.prompt, *sample.tokens]])
        log_probs_TV = model(tokens)[0, 20:-1].log_softmax(-1)
        expected = log_probs_TV.gather(1, tokens[0, 21:, None])[:, 0]
        assert sample.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


@torch.no_grad()
def test_saved_and_loaded(model: Phi3SmallModel, nano_tokenizer, tmp_path: Path):
    save(tmp_path, Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini")))
    loaded = load(tmp_path)
    assert loaded.config == model.config
    tokens = random_tokens(2, 33)
    assert torch.equal(loaded.model(tokens), model(tokens))


@torch.no_grad()
def test_losses_know_scales_and_dummy_tokens(model: Phi3SmallModel):
    tokens_BT = random_tokens(2, 20)
    targets_BT = torch.where(tokens_BT % 3 == 0, IGNORE, (tokens_BT + 1) % 7)
    positions_BT = torch.arange(20).expand(2, 20)
    nll = cross_entropy(model, Batch(tokens_BT, targets_BT, positions_BT, None, 40, {})).total
    logits = model(tokens_BT)
    expected = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    torch.testing.assert_close(nll, expected, atol=1e-4, rtol=0)
    _, entropy_N = token_log_probs_and_entropy(
        model.hidden(tokens_BT).flatten(0, 1),
        model.lm_head.weight,
        targets_BT.flatten().clamp(min=0),
        bias_V=model.logit_bias,
        temperature=0.7,
    )
    distribution = torch.distributions.Categorical(logits=logits.flatten(0, 1).clamp(-1e4) / 0.7)
    torch.testing.assert_close(entropy_N, distribution.entropy(), atol=1e-4, rtol=0)


# --- The pattern --------------------------------------------------------------------------------


def test_the_pattern_in_a_picture():
    """Blocks of one token: the nearest two, and every third of the others, shifted by head."""
    positions = torch.arange(6)[None]
    visible = BlockSparse(block=1, local_blocks=2, vertical_stride=3).visible(
        positions, positions, num_heads=4
    )
    causal = visible[0] & torch.ones(6, 6).tril().bool()
    drawn = [["".join(".x"[int(seen)] for seen in row) for row in head] for head in causal]
    assert drawn[0] == ["x.....", "xx....", ".xx...", "..xx..", "..xxx.", "..x.xx"]
    assert drawn[1] == ["x.....", "xx....", ".xx...", ".xxx..", ".x.xx.", ".x..xx"]
    assert drawn[2] == ["x.....", "xx....", "xxx...", "x.xx..", "x..xx.", "x..xxx"]
    assert drawn[3] == drawn[0]


def test_short_sequences_are_dense():
    dense, sparse = tiny(dense_every=1), tiny()
    tokens = random_tokens(2, 9)
    reach = sparse.config.pattern.reach
    assert torch.equal(dense(tokens[:, :reach]), sparse(tokens[:, :reach]))
    assert not torch.allclose(dense(tokens), sparse(tokens), atol=1e-4)


@torch.no_grad()
def test_queries_in_parts_are_queries_at_once(monkeypatch: pytest.MonkeyPatch):
    model, tokens = tiny(), random_tokens(2, 50)
    at_once = model(tokens)
    monkeypatch.setattr(attention, "SPARSE_QUERIES", 7)
    torch.testing.assert_close(model(tokens), at_once, atol=1e-5, rtol=0)


@torch.no_grad()
def test_packed_documents_are_documents_alone():
    model, lengths = tiny(), (13, 22, 9)
    rows = [random_tokens(sum(lengths)), random_tokens(sum(lengths)).flip(0)]
    documents_T = torch.tensor([0, 1, 2, -1]).repeat_interleave(torch.tensor([*lengths, 1]))
    positions_T = torch.cat([torch.arange(n) for n in (*lengths, 1)])
    packed = torch.stack([F.pad(row, (0, 1)) for row in rows])
    hidden_BTD = model.hidden(
        packed,
        positions_BT=positions_T.expand(2, -1),
        attend=CausalAttention(documents_T.expand(2, -1)),
    )
    for row, hidden_TD in zip(rows, hidden_BTD, strict=True):
        alone = [model.hidden(part[None])[0] for part in row.split(lengths)]
        torch.testing.assert_close(hidden_TD[:-1], torch.cat(alone), atol=1e-5, rtol=0)


# --- The official config ------------------------------------------------------------------------


def test_published_size():
    config = config_from_hf(PHI_3_SMALL_8K)
    assert isinstance(config, Phi3SmallConfig)
    assert parameter_count(config) == 7_392_272_384
    assert config.pattern.reach == 1024
    assert config.tie_embeddings
    assert config.rope_theta == 1e6
    used = {100257, 100261, 100262, 100263, 100266}
    assert set(config.dummy_tokens) == set(range(100256, 100352)) - used


def test_longrope_of_the_128k_model():
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    scaling = {"type": "su", **factors, "short_mscale": 1.0, "long_mscale": 1.19}
    longer = {"max_position_embeddings": 131072, "original_max_position_embeddings": 8192}
    config = config_from_hf(PHI_3_SMALL_8K | longer | {"rope_scaling": scaling})
    assert config.longrope is not None
    assert (config.rope_theta, config.longrope.long_mscale) == (1e6, 1.19)
    assert config_from_hf(config_to_hf(config)) == config


def test_config_round_trip(model: Phi3SmallModel):
    assert config_from_hf(config_to_hf(model.config)) == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "silu"}, "'silu'"),
        ({"rope_position_scale": 2.0}, "rope_position_scale"),
        ({"ff_dim_multiplier": 4}, "ff_intermediate_size"),
        ({"mup_logit_multiplier": 2.0}, "mup_logit_multiplier"),
    ],
)
def test_what_we_do_not_run_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(PHI_3_SMALL_8K | changes)


@pytest.mark.parametrize(
    "changes", [{"head_dim": 8}, {"sliding_window": 9}, {"dummy_tokens": (300,)}]
)
def test_configs_that_fit_no_checkpoint(changes: dict[str, Any]):
    with pytest.raises(ConfigError, match="Phi3SmallConfig has 1 fault"):
        Phi3SmallConfig.resolve(SIZE | changes)
