"""Which rows a step trains on: a pure function of (seed, rows consumed).

The stream is endless; every epoch is its own permutation. State is one integer, so resuming is
exact, and since ranks share one global stream, the same rows form a step on any number of ranks.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from phikit.base.device import Rank
from phikit.base.errors import DataError


class LoaderState(NamedTuple):
    """Rows consumed so far, over all ranks."""

    consumed: int = 0


class Loader:
    """Deals row numbers 0 … num_rows - 1 in shuffled epochs."""

    def __init__(self, num_rows: int, *, seed: int, rank: Rank = Rank()) -> None:
        if num_rows < 1:
            raise DataError("there is no row to train on", fix="check the data of this stage")
        self.num_rows, self.seed, self.rank = num_rows, seed, rank
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def take(self, state: LoaderState, count: int) -> tuple[npt.NDArray[np.int64], LoaderState]:
        """This rank's share of the next `count` rows of the global stream, and the state after."""
        stream = range(state.consumed + self.rank.index, state.consumed + count, self.rank.size)
        rows = np.array([self._row(k) for k in stream], np.int64)
        return rows, LoaderState(state.consumed + count)

    def _row(self, k: int) -> int:
        epoch, index = divmod(k, self.num_rows)
        if epoch != self._epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._order = epoch, random.permutation(self.num_rows)
        return int(self._order[index])
