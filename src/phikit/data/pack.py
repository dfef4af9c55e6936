"""Examples to batches: packed several to a row, or padded one to a row.

Packing is best-fit decreasing (Ding et al., 2024, arXiv 2404.10830): the longest first, each
into the fullest row it fits. Documents in a row never see each other: every row carries document
numbers for the attention mask, positions start anew, and the first token of a document is never a
target, since nothing inside its document precedes it. What a row contains decides the adapter it
runs on, so only documents with media of the same modalities share a row.
"""

from collections.abc import Sequence

import numpy as np
import torch

from phikit.base.errors import DataError
from phikit.base.media import joined
from phikit.base.types import IGNORE, Batch, Example


def split_long(examples: Sequence[Example], length: int) -> list[Example]:
    """Cut examples longer than `length` tokens into pieces; nothing is dropped.

    Raises DataError for one with media, whose placeholders a cut could separate from it.
    """
    pieces: list[Example] = []
    for number, example in enumerate(examples):
        if example.media is not None and len(example) > length:
            raise DataError(
                f"example {number} has media and {len(example)} tokens; a row holds {length}",
                fix="raise the row length, or drop examples that long",
            )
        for i in range(0, len(example), length):
            tokens, mask = example.tokens[i : i + length], example.loss_mask[i : i + length]
            pieces.append(Example(tokens, mask, example.media))
    return pieces


def pack(examples: Sequence[Example], *, length: int) -> list[list[Example]]:
    """Rows of examples, each row at most `length` tokens together.

    Raises DataError for an example longer than a row: cut it first with `split_long`, or allow
    longer rows.
    """
    alike: dict[tuple[str, ...], list[Example]] = {}
    for example in examples:
        alike.setdefault(example.modalities, []).append(example)
    return [row for group in alike.values() for row in _pack(group, length)]


def _pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Best-fit decreasing, of examples that may share rows."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    rows: list[list[Example]] = []
    rows_with_space: list[list[int]] = [[] for _ in range(length + 1)]
    occupied = 0  # bit s is set when some row has exactly s free tokens
    for i in order:
        need = len(examples[i])
        if need > length:
            raise DataError(
                f"an example has {need} tokens and a row holds {length}",
                fix="raise the row length, or drop examples that long",
            )
        fitting = occupied >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                occupied ^= 1 << space
        else:
            space, row = length, len(rows)
            rows.append([])
        rows[row].append(examples[i])
        rows_with_space[space - need].append(row)
        occupied |= 1 << (space - need)
    return rows


WIDTH_STEP = 32
"""Batches without a fixed length are padded to a multiple of this: on CPU every new shape of a
matrix product first compiles a kernel, so few widths are faster than short ones."""


def batch_rows(rows: Sequence[Sequence[Example]], *, length: int | None = None) -> Batch:
    """One batch from rows of examples, padded to `length` (by default just above the longest row).

    Rows of one example each need no document numbers: padding stands behind the text, where causal
    attention does not look, so `documents_BT` is None.
    """
    longest = max(sum(map(len, row)) for row in rows)
    width = length or longest + -longest % WIDTH_STEP
    shape = (len(rows), width)
    tokens, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, documents = np.full(shape, IGNORE, np.int64), np.full(shape, -1, np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            end = start + len(example)
            tokens[r, start:end] = example.tokens
            learnt = np.where(example.loss_mask[1:], example.tokens[1:], IGNORE)
            targets[r, start : end - 1] = learnt
            positions[r, start:end] = np.arange(len(example))
            documents[r, start:end] = number
            start = end
    packed = any(len(row) > 1 for row in rows)
    media = tuple(joined(example.media for example in row) for row in rows)
    return Batch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        positions_BT=torch.from_numpy(positions),
        documents_BT=torch.from_numpy(documents) if packed else None,
        num_tokens=sum(len(example) for row in rows for example in row),
        extras={},
        media=media if any(media) else None,
    )
