"""Tensors under other names than those in their files."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from phikit.base.errors import WeightsError
from phikit.weights.build import TensorSource


class Renamed:
    """A TensorSource over tensors of several others, each under a name of its own.

    Raises WeightsError if two tensors would take the same name.
    """

    def __init__(self, main: TensorSource) -> None:
        self.where = main.where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unreadable: dict[str, str] = {}
        self._main = main
        self._stored: dict[str, tuple[TensorSource, str]] = {}

    def add(self, source: TensorSource, names: Iterable[tuple[str, str]]) -> None:
        """Show tensors of `source`; `names` are pairs of ours and theirs."""
        for name, theirs in names:
            if name in self._stored:
                raise WeightsError(
                    f"{self.where} holds {name} twice: as {self._stored[name][1]} and as {theirs}",
                    fix="fetch the checkpoint again",
                )
            self._stored[name] = source, theirs
            self.shapes[name] = source.shapes[theirs]
            if theirs in source.unreadable:
                self.unreadable[name] = source.unreadable[theirs]

    def blocks(self, name: str) -> Iterator[Tensor]:
        source, theirs = self._stored[name]
        return source.blocks(theirs)

    def read(self, name: str) -> Tensor:
        source, theirs = self._stored[name]
        return source.read(theirs)

    def stored_dtype(self) -> torch.dtype:
        return self._main.stored_dtype()
