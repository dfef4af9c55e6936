"""Decoding on the CPU in few large steps: kernels in C++, called through ctypes.

A small model's decode step is some 750 operations of torch that each last less than their call, and
a large one's is a single pass over weights that torch's int4 and int8 products do not make at the
speed of memory. The kernels fuse the former and do the latter. They are compiled at first use
(`build.py`) and share torch's OpenMP threads; without a compiler everything runs on torch, and one
warning says why.

They record no gradients, so they run in inference mode alone: call `ready` first. Training and all
other callers take torch's operations, whose results they do not touch. A kernel's result for one
row does not depend, to the last bit, on the rows beside it; which kernel runs depends on how many
there are.

The environment variable PHIKIT_KERNELS chooses: "native" (the default), "portable" (no special
instructions, for comparison) or "off".
"""

import ctypes
import logging
import os
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.base.errors import ConfigError
from phikit.nn.kernels.build import BuildError, find_library

LINEAR_ROWS = {torch.float32: 16, torch.bfloat16: 8}
"""Up to so many rows `linear` beats torch's product, measured on a Sapphire Rapids."""
TILE_ROWS = range(5, 97)
"""Rows for which the matrix unit is the fastest in bfloat16, where there is one."""
TILE_DEPTH = 32
"""Widths that the matrix unit takes are multiples of this."""
PACKED_ROWS = 64
"""Up to so many rows packed weights beat unpacked ones and torch's product, measured there too."""
PANEL = 16
"""Rows of packed weights that lie together."""
SLAB_BYTES = 2 << 20
"""Weights unpacked at a time."""
VARIABLE = "PHIKIT_KERNELS"
CHOICES = ("native", "portable", "off")

_log = logging.getLogger(__name__)
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_COMPUTED = frozenset({torch.float32, torch.bfloat16})
_EVERY_KEY = 2**31 - 1

# What each function takes: p an address, i a 64-bit size, c a 32-bit code or count, f a float.
_SIGNATURES = {
    "rms_norm": "cpppiifc",
    "split_rotate": "cppppiiiippiic",
    "add": "cpppic",
    "gated_silu": "cppiic",
    "linear": "cppppiiic",
    "tile_linear": "ppppiiic",
    "packed_linear": "ccpppppiiiic",
    "unpack": "ccpppiiic",
    "store": "ccppppppiiipic",
    "paged_attention": "ccpppppiiippppiiiic",
    "replay": "pi",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "c": ctypes.c_int, "f": ctypes.c_float}


class _Library:
    """The functions of one compiled library."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        for name, letters in _SIGNATURES.items():
            function = getattr(library, f"phikit_{name}")
            function.argtypes = [_TYPES[letter] for letter in letters]
            function.restype = None
            setattr(self, name, function)
        self.has_tiles = bool(library.phikit_tiles_ready())


_library: Any = None
"""The loaded `_Library`, if there is one."""
_status: str | None = None
"""What `status` says; None until the first use."""
_loading = threading.Lock()
_thread = threading.local()


def _load() -> None:
    """Find, or make, the library that the environment asks for; at most once."""
    global _library, _status
    with _loading:
        if _status is not None:
            return
        choice = os.environ.get(VARIABLE) or CHOICES[0]
        if choice not in CHOICES:
            raise ConfigError(
                f"{VARIABLE} is {choice!r}", fix=f"choose from: {', '.join(CHOICES)}, or unset it"
            )
        if choice == "off":
            _status = f"off ({VARIABLE}=off)"
            return
        try:
            path, seconds = find_library(portable=choice == "portable")
            _library, _status = _Library(str(path)), f"{choice} ({path})"
        except (BuildError, OSError, AttributeError) as error:
            _status = f"off: {error}"
            _log.warning("CPU kernels are %s; torch operations run, more slowly", _status)
            return
        if seconds:
            _log.info("compiled the CPU kernels in %.1f s: %s", seconds, path)


def status() -> str:
    """Which kernels run: "native (library)", "portable (library)", or "off" and why."""
    _load()
    assert _status is not None
    return _status


def ready(*tensors: Tensor) -> bool:
    """Whether the kernels may run on these: inference mode, and all of them on the CPU,
    contiguous, float32 or bfloat16. Loads the library, or compiles it, at the first such call.

    Raises:
        ConfigError: PHIKIT_KERNELS is no known choice.
    """
    if not torch.is_inference_mode_enabled():
        return False
    for tensor in tensors:
        if not (tensor.is_cpu and tensor.dtype in _COMPUTED and tensor.is_contiguous()):
            return False
    if _status is None:
        _load()
    return _library is not None


def _functions() -> Any:
    """What this thread calls: the library, or what writes its calls down (`record.py`)."""
    return getattr(_thread, "recorder", None) or _library


# --- One pass over activations ------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension."""
    assert x.dtype == weight.dtype
    out, width = torch.empty_like(x), x.shape[-1]
    x_at, weight_at, out_at = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    rows, threads = x.numel() // width, torch.get_num_threads()
    _functions().rms_norm(_CODES[x.dtype], x_at, weight_at, out_at, rows, width, eps, threads)
    return out


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of every head; the tables are [B or 1, T, 1, rotary_dim / 2]."""
    batch, tokens, heads, _ = x_BTNH.shape
    out_BTNH = torch.empty_like(x_BTNH)
    _split_rotate(x_BTNH, [out_BTNH], cos, sin, tokens=batch * tokens, heads=(heads, 0))
    return out_BTNH


def split_rotate(
    qkv_BTD: Tensor, cos: Tensor, sin: Tensor, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, T, heads, H] of a fused projection, the first two rotated."""
    batch, tokens, width = qkv_BTD.shape
    head_dim = width // (heads + 2 * kv_heads)
    q = qkv_BTD.new_empty((batch, tokens, heads, head_dim))
    k = qkv_BTD.new_empty((batch, tokens, kv_heads, head_dim))
    v = qkv_BTD.new_empty((batch, tokens, kv_heads, head_dim))
    _split_rotate(qkv_BTD, [q, k, v], cos, sin, tokens=batch * tokens, heads=(heads, kv_heads))
    return q, k, v


def _split_rotate(
    x: Tensor, parts: list[Tensor], cos: Tensor, sin: Tensor, *, tokens: int, heads: tuple[int, int]
) -> None:
    assert x.dtype == cos.dtype
    half = cos.shape[-1]
    places = [part.data_ptr() for part in parts]
    q_at, k_at, v_at = places if len(places) == 3 else (places[0], None, None)
    _functions().split_rotate(
        *(_CODES[x.dtype], x.data_ptr(), q_at, k_at, v_at, tokens, *heads, parts[0].shape[-1]),
        *(cos.data_ptr(), sin.data_ptr(), cos.numel() // half, half, torch.get_num_threads()),
    )


def add(a: Tensor, b: Tensor) -> Tensor:
    """`a + b`, of one shape and dtype."""
    assert a.shape == b.shape and a.dtype == b.dtype
    out, threads = torch.empty_like(a), torch.get_num_threads()
    a_at, b_at, out_at = a.data_ptr(), b.data_ptr(), out.data_ptr()
    _functions().add(_CODES[a.dtype], a_at, b_at, out_at, a.numel(), threads)
    return out


def gated_silu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of the last dimension, gate first."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    rows, threads = out.numel() // width, torch.get_num_threads()
    _functions().gated_silu(
        _CODES[gate_up.dtype], gate_up.data_ptr(), out.data_ptr(), rows, width, threads
    )
    return out


# --- Products -----------------------------------------------------------------------------------


def serves(x: Tensor) -> bool:
    """Whether `linear` beats torch's product for so many rows, for tensors that are `ready`."""
    rows = x.numel() // x.shape[-1]
    return 0 < rows <= LINEAR_ROWS[x.dtype] or _suits_tiles(x, rows)


def _suits_tiles(x: Tensor, rows: int) -> bool:
    is_wide = x.dtype == torch.bfloat16 and x.shape[-1] % TILE_DEPTH == 0
    return is_wide and rows in TILE_ROWS and _library.has_tiles


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for few rows, [..., I] to [..., O], all in one dtype."""
    outputs, width = weight.shape
    assert x.dtype == weight.dtype and x.shape[-1] == width
    assert bias is None or bias.dtype == x.dtype
    y = x.new_empty((*x.shape[:-1], outputs))
    rows = x.numel() // width
    bias_at = None if bias is None else bias.data_ptr()
    places = (x.data_ptr(), weight.data_ptr(), bias_at, y.data_ptr())
    sizes = (rows, width, outputs, torch.get_num_threads())
    if _suits_tiles(x, rows):
        _functions().tile_linear(*places, *sizes)
    else:
        _functions().linear(_CODES[x.dtype], *places, *sizes)
    return y


def packed_linear(
    x: Tensor, packed: Tensor, scales: Tensor, *, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """`F.linear` with packed weights, [..., I] to [..., O]; `nn/quantised.py` has their layout.

    `packed` uint8 [P, G, 2 * bits * group] and `scales` bfloat16 [P, G, 16] are contiguous. Up to
    `PACKED_ROWS` rows of activations are rounded to 16 bits, with one scale for each row and group;
    more meet unpacked weights in x's dtype.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    assert bias is None or bias.dtype == x.dtype
    if rows > PACKED_ROWS:
        return _unpacked_linear(x, packed, scales, out_features=out_features, bias=bias)
    group, bits = _group_and_bits(packed, width)
    y = x.new_empty((*x.shape[:-1], out_features))
    bias_at = None if bias is None else bias.data_ptr()
    _functions().packed_linear(
        *(_CODES[x.dtype], bits, x.data_ptr(), packed.data_ptr(), scales.data_ptr(), bias_at),
        *(y.data_ptr(), rows, width, out_features, group, torch.get_num_threads()),
    )
    return y


def _unpacked_linear(
    x: Tensor, packed: Tensor, scales: Tensor, *, out_features: int, bias: Tensor | None
) -> Tensor:
    """Some panels at a time, in one buffer: a whole matrix would leave the cache, and pages that
    the system hands out anew for each product cost several times the unpacking."""
    width = x.shape[-1]
    step = max(1, SLAB_BYTES // (PANEL * width * x.itemsize))  # in panels
    slab = x.new_empty((min(step * PANEL, out_features), width))
    y = x.new_empty((*x.shape[:-1], out_features))
    for panel in range(0, len(packed), step):
        some = slice(panel, panel + step)
        first, last = panel * PANEL, min((panel + step) * PANEL, out_features)
        part = slab[: last - first]
        unpack(packed[some], scales[some], out=part)
        y[..., first:last] = F.linear(x, part, None if bias is None else bias[first:last])
    return y


def unpack(packed: Tensor, scales: Tensor, *, out: Tensor) -> Tensor:
    """Fill `out`, float32 or bfloat16 [O, I], with the matrix that packed weights stand for."""
    outputs, width = out.shape
    group, bits = _group_and_bits(packed, width)
    _functions().unpack(
        *(_CODES[out.dtype], bits, packed.data_ptr(), scales.data_ptr(), out.data_ptr()),
        *(outputs, width, group, torch.get_num_threads()),
    )
    return out


def _group_and_bits(packed: Tensor, width: int) -> tuple[int, int]:
    _, groups, size = packed.shape
    group = width // groups
    bits = size // (2 * group)
    assert group * groups == width and size == 2 * bits * group and bits in (4, 8)
    return group, bits


# --- The paged cache ----------------------------------------------------------------------------


def store(
    k_SKH: Tensor,
    v_SKH: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_S: Tensor,
    *,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write the keys and values of some tokens into one layer of a paged cache.

    Args:
        k_SKH: keys, contiguous like the values.
        v_SKH: values.
        keys: [blocks, block_tokens, K, H] of k's dtype, or int8.
        values: the same.
        slots_S: int64, block * block_tokens + offset.
        key_scales: float32 [blocks, block_tokens, K] of an int8 cache: max|.| / 127.
        value_scales: the same.
    """
    _functions().store(
        *(_CODES[k_SKH.dtype], _CODES[keys.dtype], k_SKH.data_ptr(), v_SKH.data_ptr()),
        *_cache_arguments(keys, values, key_scales, value_scales),
        *(slots_S.data_ptr(), len(slots_S), torch.get_num_threads()),
    )


def paged_attention(
    q_SNH: Tensor,
    keys: Tensor,
    values: Tensor,
    tables_RM: Tensor,
    rows_S: Tensor,
    lengths_S: Tensor,
    *,
    window: int | None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """What each token sees of its sequence, [S, N, H]; scores are scaled by H**-0.5.

    Args:
        q_SNH: queries, contiguous.
        keys: as in `store`, like `values` and the scales.
        values: [blocks, block_tokens, K, H]; N is a multiple of K.
        tables_RM: int32; row r lists the blocks of one sequence.
        rows_S: int32; token s belongs to the sequence of row rows_S[s].
        lengths_S: int32; token s sees positions max(0, length - window) to length - 1.
        window: None sees all.
        key_scales: of an int8 cache.
        value_scales: the same.
    """
    assert tables_RM.dtype == rows_S.dtype == lengths_S.dtype == torch.int32
    assert tables_RM.is_contiguous()
    tokens, heads, _ = q_SNH.shape
    out_SNH = torch.empty_like(q_SNH)
    _functions().paged_attention(
        *(_CODES[q_SNH.dtype], _CODES[keys.dtype], q_SNH.data_ptr()),
        *_cache_arguments(keys, values, key_scales, value_scales),
        *(tables_RM.data_ptr(), rows_S.data_ptr(), lengths_S.data_ptr(), out_SNH.data_ptr()),
        *(tokens, heads, tables_RM.shape[1], window or _EVERY_KEY, torch.get_num_threads()),
    )
    return out_SNH


def _cache_arguments(
    keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None
) -> tuple[int | None, ...]:
    """Addresses and sizes of one layer of a cache."""
    assert (keys.dtype == torch.int8) == (key_scales is not None)
    key_scales_at = None if key_scales is None else key_scales.data_ptr()
    value_scales_at = None if value_scales is None else value_scales.data_ptr()
    return (keys.data_ptr(), values.data_ptr(), key_scales_at, value_scales_at, *keys.shape[1:])
