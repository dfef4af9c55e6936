"""Who holds which block of the cache: a pool of numbers, nothing else.

A block holds the keys and values of `BLOCK_TOKENS` consecutive tokens. Its state is one of four:
never used, free, held (by one sequence or, shared, by several), or idle: held by nobody, but full
and named, so that a later sequence with the same beginning may take it up. Idle blocks go when
nothing else is left, the least recently used first.

A name is a digest of everything the keys and values depend on: the tokens of the block, all those
before it, the adapter and the media. It is cryptographic, because prompts are untrusted: whoever
finds two prompts of one name reads another's cache.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

BLOCK_TOKENS = 16


class BlockPool:
    """Hands out block numbers below `size`.

    Invariants: a block is free, idle or held, never two of them; it is held as often as `take`,
    `share` and `find` gave it and `release` has not taken it back; idle blocks are named.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._unused = 0
        self._free: list[int] = []
        self._holders: dict[int, int] = {}
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return self.size - len(self._holders)

    @property
    def idle(self) -> int:
        """Blocks kept for a later sequence."""
        return len(self._idle)

    def take(self) -> int | None:
        """A block of one's own, its contents undefined; None if all are held."""
        if self._free:
            block = self._free.pop()
        elif self._unused < self.size:
            block = self._unused
            self._unused += 1
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """Hold a held block once more."""
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """Hold a block once less."""
        self._holders[block] -= 1
        if self._holders[block] == 0:
            del self._holders[block]
            if block in self._names:
                self._idle[block] = None
            else:
                self._free.append(block)

    def find(self, name: bytes) -> int | None:
        """Hold the block of this name, if there is one."""
        block = self._named.get(name)
        if block is not None:
            self._idle.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
        return block

    def name(self, block: int, name: bytes) -> None:
        """Let others find a held block, which is full; where two are alike, the first is found."""
        if name not in self._named and block not in self._names:
            self._named[name], self._names[block] = block, name

    def forget(self) -> None:
        """Unname all blocks: what they hold is no longer what their names say."""
        for block in self._idle:
            self._free.append(block)
        self._idle.clear()
        self._names.clear()
        self._named.clear()

    def _forget(self, block: int) -> None:
        del self._named[self._names.pop(block)]


def name_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of the block that holds `tokens` after everything `parent` stands for."""
    return blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=16, key=parent).digest()


def name_root(*facts: bytes) -> bytes:
    """The parent of a sequence's first block: a digest of whatever it depends on but tokens."""
    digest = blake2b(digest_size=16)
    for fact in facts:
        digest.update(len(fact).to_bytes(8, "little") + fact)
    return digest.digest()
