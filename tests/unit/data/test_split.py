from collections import Counter

import pytest

from phikit.data.split import SHARES, content_hash, split_of


def test_shares_are_as_stated():
    found = Counter(split_of(f"problem {i}") for i in range(20_000))
    assert sum(SHARES.values()) == pytest.approx(1)
    for split, share in SHARES.items():
        assert found[split] / 20_000 == pytest.approx(share, abs=0.012)


def test_a_split_never_moves():
    """Frozen values: if one of them changes, every earlier result is contaminated."""
    assert {signature: split_of(signature) for signature in FROZEN} == FROZEN


FROZEN = {
    "story|14+18": "train",
    "story|9-32|14+18": "rl",
    "money|3*6": "test",
    "what is 2 + 2?": "test",
    "": "rl",
    "é": "validation",
}


def test_hash_is_of_the_content():
    assert content_hash("a") == content_hash("a") != content_hash("b")
    assert len(content_hash("a")) == 32
