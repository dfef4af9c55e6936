"""The walk through the blocks, recorded and replayed where steps repeat each other.

Steps of equally many rows, each row one token of a plain sequence, make the same kernel calls
(`nn.kernels.record`). Such a step is recorded when its number of rows comes for the second time;
from then on its like are replayed. A step that cannot be recorded runs as ever.
"""

import torch
from torch import Tensor

from phikit.generate.attend import PagedAttention
from phikit.models.decoder import Decoder
from phikit.nn import kernels
from phikit.nn.attention import Attend
from phikit.nn.kernels.record import NotRecordable, Recording, record
from phikit.nn.rope import RopeTables

MOST_BYTES = 64 << 20
"""Memory that recordings may keep; beyond, the oldest goes."""

Kind = tuple[int, ...]
"""What steps that make the same calls have in common."""


class Replays:
    """A `Walk` through one model's blocks over one paged cache; every walk overwrites the last's
    result.

    Weights that move must be followed by `forget`.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._met: set[Kind] = set()
        self._recordings: dict[Kind, Recording | None] = {}
        """None for a kind that cannot be recorded."""

    def __call__(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        assert isinstance(attend, PagedAttention)
        kind = (*x_BTD.shape, *rope.cos.shape, torch.get_num_threads())
        is_plain = attend.reads_blocks(len(x_BTD)) and kernels.ready(x_BTD, *rope)
        recording = self._recordings.get(kind)
        inputs = (x_BTD, *rope, *attend.inputs)
        if is_plain and recording is not None:
            return recording.replay(inputs)
        if is_plain and kind in self._met and kind not in self._recordings:
            try:
                recording = record(lambda: self.model.through_blocks(x_BTD, rope, attend), inputs)
            except NotRecordable:
                self._recordings[kind] = None
            else:
                self._keep(kind, recording)
                return recording.output
        self._met.add(kind)
        return self.model.through_blocks(x_BTD, rope, attend)

    def forget(self) -> None:
        """Drop all recordings."""
        self._met.clear()
        self._recordings.clear()

    def _keep(self, kind: Kind, recording: Recording) -> None:
        self._recordings[kind] = recording
        sizes = {k: each.num_bytes for k, each in self._recordings.items() if each is not None}
        while sum(sizes.values()) > MOST_BYTES and len(sizes) > 1:
            oldest = next(iter(sizes))
            del sizes[oldest], self._recordings[oldest]
