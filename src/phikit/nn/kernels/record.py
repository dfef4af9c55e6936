"""Writing a computation's kernel calls down once, and running them again as one call.

A decode step of a small model calls some 400 kernels, and finding out in Python what to call takes
longer than all of them. But the next step makes the same calls, on other numbers. So one step is
recorded: each call with its addresses, whose memory the recording keeps. Replaying copies the new
inputs over the old ones and makes all calls from C++, without Python's lock. CUDA's graphs are this
for GPUs.

What is unusual: while recording, torch hands over every operation it is asked for. All but views,
new memory and sums of equal shapes end the recording, so that nothing a replay would leave out goes
unnoticed: adapters, experts, attention over gathered keys stay what they are, unrecorded.

The caller answers for what no operation shows: weights must lie where they lay, and whatever Python
decided by must be the same.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phikit.nn import kernels

ARGUMENTS = 19
"""The most that a kernel takes."""

_aten = torch.ops.aten
_MEMORY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default}
_VIEWS = {
    _aten.alias.default,
    _aten.detach.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.squeeze.dim,
    _aten.unsqueeze.default,
    _aten.view.default,
}


class NotRecordable(Exception):
    """The computation does something a replay would leave out."""


class Recording:
    """Calls that were made once, and the memory they work on."""

    def __init__(
        self, calls: list[list[int]], inputs: Sequence[Tensor], output: Tensor, kept: list[Tensor]
    ) -> None:
        self._calls, self._inputs = torch.tensor(calls, dtype=torch.int64), inputs
        self.output, self._kept = output, kept
        self.num_bytes = sum(tensor.nbytes for tensor in kept)
        """Memory of the results in between."""

    def replay(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output for other inputs of the same shapes; it lasts until the next replay."""
        for recorded, new in zip(self._inputs, inputs, strict=True):
            recorded.copy_(new)
        kernels._library.replay(self._calls.data_ptr(), len(self._calls))
        return self.output


def record(compute: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recording:
    """Run a computation that reads `inputs`, and write down how.

    Raises:
        NotRecordable: it is no plain sequence of kernels; it was left where it first strayed.
    """
    recorder = _Recorder()
    kernels._thread.recorder = recorder
    try:
        with recorder:
            output = compute()
    finally:
        kernels._thread.recorder = None
    return Recording(recorder.calls, inputs, output, recorder.kept)


class _Recorder(TorchDispatchMode):
    """Stands in for the kernels' library, and listens to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[int]] = []
        self.kept: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten.add.Tensor and not kwargs and _alike(*args):
            with self:
                return kernels.add(*args)
        if func not in _VIEWS and func not in _MEMORY:
            return self._parts(func, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _MEMORY:
            self.kept.append(result)
        return result

    def _parts(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What an operation made of others gives, with an ear to those."""
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise NotRecordable(str(func))
        return result

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(kernels._library, name)
        number = list(kernels._SIGNATURES).index(name)

        def call(*arguments: Any) -> None:
            function(*arguments)
            words = [_word(argument) for argument in arguments]
            self.calls.append([number, *words, *[0] * (ARGUMENTS - len(words))])

        return call


def _alike(a: Any, b: Any) -> bool:
    """Whether the kernels can add them."""
    return (
        isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and kernels.ready(a, b)
    )


def _word(argument: float | None) -> int:
    """An address, a size, a code, or the bits of a number."""
    if isinstance(argument, float):
        return struct.unpack("q", struct.pack("d", argument))[0]
    return argument or 0
