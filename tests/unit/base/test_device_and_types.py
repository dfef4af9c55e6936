import numpy as np
import pytest
import torch

from phikit.base.device import Rank, one_thread, parse_dtype, peak_memory_bytes, set_threads
from phikit.base.errors import ConfigError
from phikit.base.types import Example


def test_threads_and_dtypes():
    assert set_threads(1) == 1
    assert set_threads(None) == 1
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="unknown dtype 'fp16'"):
        parse_dtype("fp16")
    with pytest.raises(ConfigError, match="threads is 0"):
        set_threads(0)


def test_rank_and_memory():
    assert Rank().is_first and not Rank(index=1, size=2).is_first
    assert peak_memory_bytes() > 10 * 2**20


def test_example_length():
    example = Example(tokens=np.arange(3, dtype=np.int32), loss_mask=np.zeros(3, dtype=bool))
    assert len(example) == 3
    with pytest.raises(AssertionError):
        Example(tokens=np.arange(3, dtype=np.int32), loss_mask=np.zeros(2, dtype=bool))


def test_one_thread_for_a_while():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
