"""Damaged headers of safetensors and GGUF files: typed errors only, in bounded memory and time.

Hypothesis draws the seeds, each seed gives a row of mutations: 12,000 files of either format. Those
that still pass as a model are built and read to the end.
"""

import contextlib
import json
import random
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.chat.vocabularies import small
from tests.unit.weights.test_gguf_out import with_split

from phikit.base.errors import PhikitError
from phikit.chat.render import renderer_for
from phikit.models.dense import DenseConfig, DenseModel
from phikit.weights.build import build_model
from phikit.weights.gguf import GGUFFile
from phikit.weights.gguf_out import save_gguf
from phikit.weights.load import Loaded
from phikit.weights.safetensors_files import open_file, write_tensors
from phikit.weights.save import checkpoint_tensors

pytest.importorskip("gguf", reason="needs the gguf package")

SEEDS, PER_SEED = 60, 100
MAX_SECONDS = 2.0  # of processor time, for one file
MAX_BYTES = 200_000_000  # that all of them together may add to the process

SIZES = (0, 1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 8, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, "", "F32", "I64", "F4", [], {}, [0], [0, 0], [8, 0], -1, 0.5, float("nan")),
    *(
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        10**40,
        [2**62, 2**62],
        [0, 2**63],
        [1] * 70,
        {"dtype": "F32"},
    ),
)


@pytest.fixture(scope="module")
def model() -> DenseModel:
    config = DenseConfig(
        vocab_size=340, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        d_mlp=32, max_context=64,
    )  # fmt: skip
    return DenseModel(config).initialise(torch.Generator().manual_seed(0))


def mutations(whole: bytes, header: int, seed: int) -> Iterator[bytes]:
    """`PER_SEED` variants of a file: bytes, numbers, cuts, gaps and repeats in its header."""
    draw = random.Random(seed)
    for _ in range(PER_SEED):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(min(header, len(damaged)))
            match draw.randrange(7):
                case 0:
                    damaged[at] ^= 1 << draw.randrange(8)
                case 1:
                    damaged[at] = draw.choice(b'\0\x01\x7f\x80\xff"{}[]:,0189.eE-\\')
                case 2:
                    damaged[at : at + 8] = struct.pack("<Q", draw.choice(SIZES))
                case 3:
                    damaged[at : at + 4] = struct.pack("<I", draw.choice(SIZES) & 0xFFFFFFFF)
                case 4:
                    del damaged[at : at + draw.randint(1, 40)]
                case 5:
                    damaged[at:at] = damaged[at : at + draw.randint(1, 40)]
                case _:
                    del damaged[draw.randrange(len(damaged) or 1) :]
            if not damaged:
                break
        yield bytes(damaged)


def json_mutations(whole: bytes, seed: int) -> Iterator[bytes]:
    """The safetensors file with other values in its JSON, of the right length."""
    draw = random.Random(seed)
    length = int.from_bytes(whole[:8], "little")
    for _ in range(PER_SEED):
        header = json.loads(whole[8 : 8 + length])
        about = header[draw.choice(sorted(header))]
        about[draw.choice(["dtype", "shape", "data_offsets", "more"])] = draw.choice(ODD_VALUES)
        if draw.random() < 0.3:
            del about[draw.choice(sorted(about))]
        if draw.random() < 0.3:
            header[draw.choice(sorted(header))] = draw.choice(ODD_VALUES)
        text = json.dumps(header).encode()
        yield struct.pack("<Q", len(text)) + text + whole[8 + length :]


def survive(path: Path, variants: Iterator[bytes], read: Callable[[Path], None]) -> None:
    """Read each variant; only PhikitError may come out of it, and soon."""
    for damaged in variants:
        path.write_bytes(damaged)
        started = time.process_time()
        with contextlib.suppress(PhikitError):
            read(path)
        assert time.process_time() - started < MAX_SECONDS


def check(read: Callable[[Path], None], path: Path, *makers: Callable[[int], Iterator[bytes]]):
    """`SEEDS` x `PER_SEED` files from each maker, and what they cost in memory together."""

    @settings(max_examples=SEEDS)
    @given(seed=st.integers(0, 2**32 - 1))
    def run(seed: int) -> None:
        for maker in makers:
            survive(path, maker(seed), read)

    read(path)  # the first call brings in code, which stays in memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MAX_BYTES


def test_safetensors(model: DenseModel, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    write_tensors(path, checkpoint_tensors(model))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")

    def read(path: Path) -> None:
        with open_file(path) as source:
            build_model(model.config, source, dtype=None)

    check(read, path, lambda s: mutations(whole, header, s), lambda s: json_mutations(whole, s))


def test_gguf(model: DenseModel, tmp_path: Path):
    path = tmp_path / "model.gguf"
    tokenizer = with_split(small("chatml"), "gpt-4o")
    save_gguf(path, Loaded(model, tokenizer, renderer_for(tokenizer, "smollm2")), quant="q8_0")
    whole = path.read_bytes()
    tables = whole.index(b"tokenizer.ggml.tokens")
    names = whole.rindex(b"token_embd.weight") - 8
    header = whole.rindex(b"output_norm.weight") + 60

    def read(path: Path) -> None:
        source = GGUFFile(path)
        build_model(source.config, source, dtype=None)

    def read_all(path: Path) -> None:
        read(path)
        GGUFFile(path).tokenizer()

    def outside_tables(seed: int) -> Iterator[bytes]:
        """Damage in the metadata of the model, or, with odd seeds, in the list of tensors."""
        if seed % 2:
            for damaged in mutations(whole[names:], header - names, seed):
                yield whole[:names] + damaged
        else:
            yield from mutations(whole, tables, seed)

    check(read, path, outside_tables)
    path.write_bytes(whole)
    check(read_all, path, lambda seed: mutations(whole, header, seed))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": 1e999}'])
def test_json_that_is_hard_on_a_parser(text: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(PhikitError, match="damaged"):
        open_file(path)
