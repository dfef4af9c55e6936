"""Which split a problem belongs to, decided by its content alone.

A problem's split is a hash of its canonical signature, so a held-out problem cannot be drawn for
training under another name, seed or phrasing: the sets are disjoint by construction, and
`assert_disjoint` checks them again at run time. The shares are fixed because changing one would
move problems between splits and silently contaminate every earlier result.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Literal

Split = Literal["train", "rl", "validation", "test"]

SHARES: Mapping[Split, float] = {"train": 0.60, "rl": 0.20, "validation": 0.08, "test": 0.12}


def content_hash(signature: str) -> str:
    """blake2b of the signature, 32 hex digits."""
    return blake2b(signature.encode(), digest_size=16).hexdigest()


def split_of(signature: str) -> Split:
    """The split of the problem with this canonical signature, with the shares of `SHARES`."""
    point = int(content_hash(signature)[:13], 16) / 16**13
    for split, share in SHARES.items():
        if point < share:
            return split
        point -= share
    return "test"  # reached only by rounding in the sum of the shares
