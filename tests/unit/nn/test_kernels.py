"""Every kernel against float64 over random shapes, with and without special instructions."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phikit.nn import kernels
from phikit.nn.kernels import build
from phikit.nn.linear import Linear
from phikit.nn.mlp import gated_silu
from phikit.nn.norm import RMSNorm
from phikit.nn.quantised import pack, pack_scales
from phikit.nn.quantised import unpack as reference_unpack
from phikit.nn.rope import RopeTables, rotate, split_rotate

BLOCK = 16
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Of the largest result; bfloat16 rounds each by up to 2^-9 of itself."""


def compiled(*, portable: bool) -> str | None:
    try:
        return str(build.find_library(portable=portable)[0])
    except build.BuildError:
        return None


@pytest.fixture(scope="module", params=["native", "portable"], autouse=True)
def library(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each test of this file runs with both libraries, in inference mode."""
    path = compiled(portable=request.param == "portable")
    if path is None:
        pytest.skip("needs a C++ compiler: there is none here")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(kernels, "_library", kernels._Library(path))
        patch.setattr(kernels, "_status", request.param)
        yield request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """`found` is `expected`, in float64, to the accuracy of its dtype."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max()
    assert error <= TOLERANCES[found.dtype] * expected.abs().max(), error


dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@given(rows=st.integers(1, 5), width=st.integers(1, 100), dtype=dtypes)
def test_rms_norm(rows: int, width: int, dtype: torch.dtype):
    x, weight = normal(rows, 2, width, dtype=dtype), normal(width, seed=1, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_close(kernels.rms_norm(x, weight, 1e-6), expected)


@given(
    batch=st.sampled_from([1, 3]),
    tokens=st.integers(1, 4),
    heads=st.integers(1, 3),
    half=st.integers(1, 20),
    rest=st.integers(0, 20),
    shared=st.booleans(),
    dtype=dtypes,
)
def test_rotation(
    batch: int, tokens: int, heads: int, half: int, rest: int, shared: bool, dtype: torch.dtype
):
    x = normal(batch, tokens, heads, 2 * half + rest, dtype=dtype)
    angles = 3 * normal(1 if shared else batch, tokens, 1, half, seed=1)
    tables = RopeTables(angles.cos().to(dtype), angles.sin().to(dtype))
    cos, sin = (table.double() for table in tables)
    a, b, same = x.double().split([half, half, rest], dim=-1)
    expected = torch.cat([a * cos - b * sin, b * cos + a * sin, same], -1)
    assert_close(kernels.rotate(x, *tables), expected)

    fused = torch.cat([x, x + 1, x + 2], dim=2).flatten(2)
    q, k, v = split_rotate(fused, tables, heads=heads, kv_heads=heads)
    assert torch.equal(q, rotate(x, tables)) and torch.equal(k, rotate(x + 1, tables))
    assert torch.equal(v, x + 2)


@given(rows=st.integers(1, 5), width=st.integers(1, 100), dtype=dtypes)
def test_gated_silu(rows: int, width: int, dtype: torch.dtype):
    gate_up = 5 * normal(rows, 2 * width, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_close(kernels.gated_silu(gate_up), F.silu(gate) * up)


def test_extreme_gates():
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30, float("nan")])
    found = kernels.gated_silu(torch.cat([gate, torch.ones(8)]))
    torch.testing.assert_close(found, F.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-30)


@given(
    rows=st.integers(1, 9),
    outputs=st.integers(1, 70),
    width=st.integers(1, 100),
    bias=st.booleans(),
    dtype=dtypes,
)
def test_linear(rows: int, outputs: int, width: int, bias: bool, dtype: torch.dtype):
    x, weight = normal(rows, width, dtype=dtype), normal(outputs, width, seed=1, dtype=dtype)
    b = normal(outputs, seed=2, dtype=dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    found = kernels.linear(x, weight, b)
    assert_close(found, expected)
    for row in range(rows):  # alone as in company, to the last bit
        assert torch.equal(kernels.linear(x[row : row + 1], weight, b)[0], found[row])


@given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 100),
    steps=st.integers(1, 5),
    bias=st.booleans(),
)
def test_linear_by_the_matrix_unit(rows: int, outputs: int, steps: int, bias: bool):
    if not kernels._library.has_tiles:
        pytest.skip("needs AMX: this processor, or this library, does without")
    width = 32 * steps
    x = normal(rows, width, dtype=torch.bfloat16)
    weight = normal(outputs, width, seed=1, dtype=torch.bfloat16)
    b = normal(outputs, seed=2, dtype=torch.bfloat16) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "TILE_ROWS", range(1, 100))
        found = kernels.linear(x, weight, b)
        assert_close(found, expected)
        for row in range(rows):
            assert torch.equal(kernels.linear(x[row : row + 1], weight, b)[0], found[row])


def test_the_matrix_unit_is_left_as_it_was():
    """torch's products in bfloat16 use it too, with shapes of their own."""
    x, weight = normal(64, 64, dtype=torch.bfloat16), normal(96, 64, seed=1, dtype=torch.bfloat16)
    alone = F.linear(x, weight)
    for rows in (64, 5, 33):
        assert_close(kernels.linear(x[:rows], weight), F.linear(x[:rows].double(), weight.double()))
        assert torch.equal(F.linear(x, weight), alone)


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96]),
    groups=st.integers(1, 3),
    rows=st.integers(1, 33),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=dtypes,
)
def test_packed_linear(
    bits: int, group: int, groups: int, rows: int, outputs: int, bias: bool, dtype: torch.dtype
):
    q_OI, scales_OG = random_weights(bits, group=group, groups=groups, outputs=outputs)
    packed, scales = pack(q_OI, bits=bits, group=group), pack_scales(scales_OG)
    shape = (outputs, groups * group)
    weight = reference_unpack(packed, scales, shape=shape, dtype=torch.float32)
    x = normal(rows, groups * group, dtype=dtype)
    b = normal(outputs, seed=2, dtype=dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    found = kernels.packed_linear(x, packed, scales, out_features=outputs, bias=b)
    size = x.double().norm(dim=-1)[:, None] * weight.double().norm(dim=-1) / shape[1] ** 0.5
    rounding = 2**-8 * expected.abs() if dtype == torch.bfloat16 else 0
    assert ((found.double() - expected).abs() <= 2e-4 * size + rounding).all()
    alone = kernels.packed_linear(x[-1:], packed, scales, out_features=outputs, bias=b)
    assert torch.equal(alone[0], found[-1])

    for kind in (torch.float32, torch.bfloat16):
        copy = kernels.unpack(packed, scales, out=torch.empty(shape, dtype=kind))
        assert torch.equal(copy, reference_unpack(packed, scales, shape=shape, dtype=kind))


@pytest.mark.parametrize("bias", [None, normal(72, seed=2)])
def test_many_rows_meet_unpacked_weights(bias: Tensor | None, monkeypatch: pytest.MonkeyPatch):
    q_OI, scales_OG = random_weights(4, group=32, groups=2, outputs=72)
    weights = pack(q_OI, bits=4, group=32), pack_scales(scales_OG)
    weight = reference_unpack(*weights, shape=(72, 64), dtype=torch.float32)
    x = normal(2, kernels.PACKED_ROWS, 64)
    expected = F.linear(x, weight, bias)
    for slab in (1, 2 * 16 * 64 * 4, 1 << 20):
        monkeypatch.setattr(kernels, "SLAB_BYTES", slab)
        found = kernels.packed_linear(x, *weights, out_features=72, bias=bias)
        torch.testing.assert_close(found, expected)


def random_weights(bits: int, *, group: int, groups: int, outputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    q_OI = torch.randint(low, high, (outputs, groups * group), generator=generator)
    return q_OI.to(torch.int8), 0.01 + torch.rand(outputs, groups, generator=generator)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_sums_of_a_long_group_do_not_overflow(bits: int):
    width = 2048
    q_OI = torch.full((16, width), 7 if bits == 4 else 127, dtype=torch.int8)
    packed = pack(q_OI, bits=bits, group=width)
    scales = pack_scales(torch.ones(16, 1))
    found = kernels.packed_linear(torch.ones(1, width), packed, scales, out_features=16)
    torch.testing.assert_close(
        found, torch.full_like(found, width * int(q_OI[0, 0])), rtol=1e-3, atol=0
    )


def test_nan_and_zero_activations():
    q_OI, scales_OG = random_weights(4, group=32, groups=2, outputs=16)
    weights = pack(q_OI, bits=4, group=32), pack_scales(scales_OG)
    x = torch.zeros(2, 64)
    x[1, 40] = float("nan")
    found = kernels.packed_linear(x, *weights, out_features=16)
    assert torch.equal(found[0], torch.zeros(16)) and found[1].isnan().all()


class Paged:
    """Random sequences in a shuffled cache, and what plain softmax makes of them."""

    def __init__(
        self, lengths: list[int], *, heads: tuple[int, int], width: int, seed: int
    ) -> None:
        self.num_heads, kv_heads = heads[0] * heads[1], heads[1]
        generator = torch.Generator().manual_seed(seed)
        most = -(-max(lengths) // BLOCK)
        order = torch.randperm(len(lengths) * most, generator=generator).int()
        self.tables_RM = order.view(len(lengths), most)
        self.shape = (len(order), BLOCK, kv_heads, width)
        self.k = [torch.randn(n, kv_heads, width, generator=generator) for n in lengths]
        self.v = [torch.randn(n, kv_heads, width, generator=generator) for n in lengths]

    def slots(self, row: int) -> Tensor:
        positions = torch.arange(len(self.k[row]))
        return self.tables_RM[row, positions // BLOCK].long() * BLOCK + positions % BLOCK

    def expected(self, q_NH: Tensor, row: int, seen: slice) -> Tensor:
        k, v = (x[row][seen].double().transpose(0, 1) for x in (self.k, self.v))
        q = q_NH.double().unflatten(0, (len(k), -1))
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).flatten(0, 1)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    heads=st.tuples(st.integers(1, 6), st.integers(1, 3)),
    width=st.sampled_from([8, 24, 64, 80]),
    window=st.sampled_from([None, 1, 40, 200]),
    kind=st.sampled_from(["float32", "bfloat16", "int8"]),
    seed=st.integers(0, 5),
)
def test_paged_attention(
    lengths: list[int], heads: tuple[int, int], width: int, window: int | None, kind: str, seed: int
):
    paged = Paged(lengths, heads=heads, width=width, seed=seed)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    stored = torch.int8 if kind == "int8" else dtype
    keys, values = (torch.zeros(paged.shape, dtype=stored) for _ in range(2))
    scales = [torch.zeros(paged.shape[:3]) if kind == "int8" else None for _ in range(2)]
    named = {"key_scales": scales[0], "value_scales": scales[1]}
    for row, (k, v) in enumerate(zip(paged.k, paged.v, strict=True)):
        kernels.store(k.to(dtype), v.to(dtype), keys, values, paged.slots(row), **named)
        for parts, cache, scale in ((paged.k, keys, scales[0]), (paged.v, values, scales[1])):
            held = cache.flatten(0, 1)[paged.slots(row)].float()
            held = (
                held if scale is None else held * scale.flatten(0, 1)[paged.slots(row)][..., None]
            )
            limit = parts[row].abs().amax(-1, keepdim=True) / (254 if kind == "int8" else 256)
            assert ((held - parts[row]).abs() <= 1.001 * limit).all()
            parts[row] = held
    # The last token of every sequence and an earlier one, in one call.
    spans = [(row, end) for row, n in enumerate(lengths) for end in {n, 1 + n // 2}]
    q_SNH = normal(len(spans), paged.num_heads, width, seed=seed, dtype=dtype)
    rows_S, lengths_S = torch.tensor(spans, dtype=torch.int32).unbind(1)
    arguments = (keys, values, paged.tables_RM, rows_S.contiguous(), lengths_S.contiguous())
    found = kernels.paged_attention(q_SNH, *arguments, window=window, **named)
    expected = [
        paged.expected(q, row, slice(max(0, end - (window or end)), end))
        for q, (row, end) in zip(q_SNH, spans, strict=True)
    ]
    assert_close(found, torch.stack(expected))


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    paged = Paged([900], heads=(3, 2), width=64, seed=0)
    keys, values = torch.zeros(paged.shape), torch.zeros(paged.shape)
    kernels.store(paged.k[0], paged.v[0], keys, values, paged.slots(0))
    q, row, length = normal(1, 6, 64), torch.zeros(1).int(), torch.tensor([900]).int()
    x, weight = normal(8, 512), normal(600, 512, seed=1)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        one = kernels.paged_attention(q, keys, values, paged.tables_RM, row, length, window=None)
        many = kernels.paged_attention(
            q.repeat(9, 1, 1),
            *(keys, values, paged.tables_RM, row.repeat(9), length.repeat(9)),
            window=None,
        )
        results.append((one, many[4:5], kernels.linear(x, weight)))
    assert all(
        torch.equal(a, b) for some in results[1:] for a, b in zip(some, results[0], strict=True)
    )
    assert torch.equal(results[0][0], results[0][1])


# --- Dispatch -----------------------------------------------------------------------------------


def test_ready_wants_inference_mode_and_plain_tensors():
    x = torch.zeros(4, 4)
    assert kernels.ready(x, x.bfloat16()) and kernels.ready()
    assert not kernels.ready(x.T[1:]) and not kernels.ready(x.double())
    assert not kernels.ready(x.to("meta"))
    with torch.inference_mode(mode=False):
        assert not kernels.ready(torch.zeros(1))


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_layers_agree_with_torch(rows: int):
    linear, norm = Linear(40, 24), RMSNorm(24, eps=1e-5)
    x = normal(rows, 1, 40)
    fast = gated_silu(norm(linear(x)))
    with torch.inference_mode(mode=False), torch.no_grad():
        plain = gated_silu(norm(linear(x.clone())))
    torch.testing.assert_close(fast, plain)
    with pytest.raises(RuntimeError):  # as torch has it
        linear(x.bfloat16())
