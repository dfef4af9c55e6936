"""Packed documents are as if each stood alone, and packing loses nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phikit.base.errors import DataError
from phikit.base.types import IGNORE, Batch, Example
from phikit.data.pack import batch_rows, pack, split_long
from phikit.models.dense import DenseModel
from phikit.nn import attention
from phikit.nn.attention import CausalAttention
from phikit.nn.losses import linear_cross_entropy

VARIANTS = {"plain": {}, "window": {"sliding_window": 4}}


def example(tokens: list[int], mask: list[bool] | None = None) -> Example:
    learnt = np.array([True] * len(tokens) if mask is None else mask)
    return Example(tokens=np.array(tokens, np.int32), loss_mask=learnt)


def random_examples(count: int, *, longest: int, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, size=count)
    return [
        example(draw.integers(0, 300, n).tolist(), (draw.random(n) < 0.6).tolist()) for n in lengths
    ]


def contents(examples: list[Example]) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return sorted((tuple(e.tokens.tolist()), tuple(e.loss_mask.tolist())) for e in examples)


some_examples = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=30).map(
        lambda pairs: example([t for t, _ in pairs], [m for _, m in pairs])
    ),
    max_size=30,
)


@given(some_examples, st.integers(1, 40))
def test_nothing_is_lost(examples: list[Example], length: int):
    pieces = split_long(examples, length)
    rows = pack(pieces, length=length)
    assert all(0 < sum(map(len, row)) <= length for row in rows)
    assert contents([piece for row in rows for piece in row]) == contents(pieces)
    tokens = [t for e in examples for t in e.tokens.tolist()]
    assert [t for piece in pieces for t in piece.tokens.tolist()] == tokens
    # Any two rows together exceed one: otherwise the later one's examples had fitted.
    fill = sorted(sum(map(len, row)) for row in rows)
    assert len(rows) < 2 or fill[0] + fill[1] > length


@given(some_examples.filter(bool))
def test_batches_hold_every_example_and_every_target(examples: list[Example]):
    rows = pack(examples, length=30)
    batch = batch_rows(rows, length=33)
    assert batch.tokens_BT.shape == (len(rows), 33)
    if batch.documents_BT is None:
        assert all(len(row) == 1 for row in rows)
    for r, row in enumerate(rows):
        start = 0
        for number, one in enumerate(row):
            span = slice(start, start + len(one))
            assert batch.tokens_BT[r, span].tolist() == one.tokens.tolist()
            assert batch.positions_BT[r, span].tolist() == list(range(len(one)))
            if batch.documents_BT is not None:
                assert set(batch.documents_BT[r, span].tolist()) == {number}
            # What follows the last token is another document or nothing: never a target.
            learnt = [t if m else IGNORE for t, m in zip(one.tokens, one.loss_mask, strict=True)]
            assert batch.targets_BT[r, span].tolist() == [*learnt[1:], IGNORE]
            start += len(one)
        assert (batch.targets_BT[r, start:] == IGNORE).all()
        if batch.documents_BT is not None:
            assert (batch.documents_BT[r, start:] == -1).all()


def test_an_example_longer_than_a_row_is_an_error():
    with pytest.raises(DataError, match="9 tokens and a row holds 8"):
        pack([example([1] * 9)], length=8)


def hidden(model: DenseModel, batch: Batch) -> torch.Tensor:
    attend = CausalAttention(batch.documents_BT, window=model.config.sliding_window)
    return model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, attend=attend)


def losses(model: DenseModel, batch: Batch) -> torch.Tensor:
    learnt = batch.targets_BT != IGNORE
    return linear_cross_entropy(
        hidden(model, batch)[learnt], model.lm_head.weight, batch.targets_BT[learnt]
    )


@pytest.mark.parametrize("explicit", [True, False], ids=["written out", "fused"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_packed_is_unpacked(tiny_model, monkeypatch: pytest.MonkeyPatch, variant, explicit):
    if not explicit:
        monkeypatch.setattr(attention, "EXPLICIT_MAX_TOKENS", 0)
    model = tiny_model(**VARIANTS[variant])
    rows = pack(random_examples(14, longest=20), length=48)
    batch = batch_rows(rows, length=50)
    assert batch.documents_BT is not None
    packed = model.lm_head(hidden(model, batch))
    total = torch.zeros(())
    for r, row in enumerate(rows):
        start = 0
        for one in row:
            alone = torch.as_tensor(one.tokens, dtype=torch.long)[None]
            span = packed[r, start : start + len(one)]
            torch.testing.assert_close(span, model(alone)[0], atol=1e-5, rtol=0)
            total = total + losses(model, batch_rows([[one]])).sum()
            start += len(one)
    torch.testing.assert_close(losses(model, batch).sum(), total, atol=1e-3, rtol=1e-6)

    gradients = []
    for value in (losses(model, batch).sum(), total):
        model.zero_grad()
        value.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=0)


@torch.no_grad()
def test_padding_changes_nothing(tiny_model):
    model = tiny_model()
    examples = random_examples(5, longest=20, seed=1)
    padded = model.lm_head(hidden(model, batch_rows([[one] for one in examples], length=31)))
    for logits, one in zip(padded, examples, strict=True):
        alone = model(torch.as_tensor(one.tokens, dtype=torch.long)[None])[0]
        torch.testing.assert_close(logits[: len(one)], alone, atol=1e-5, rtol=0)
