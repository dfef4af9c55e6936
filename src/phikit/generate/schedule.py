"""Which tokens the model is given in the next step, and in which blocks their keys will lie.

Every step serves all sequences that run, the oldest first. One that decodes gets one token (and its
drafts); one in its prefill gets as many as the budget of the step leaves, so a long prompt is taken
in chunks between the tokens of the others. Then waiting sequences are admitted, in order, while
rows, budget and blocks last; each takes up the blocks of its beginning that are still there.

Nothing is reserved for what a sequence may say. When the blocks are all held, the youngest sequence
gives its own back and waits at the head of the queue; later its tokens, prompt and said, are its
prompt. The oldest always has its way, and fits by itself (`Scheduler.fits`), so all will finish.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from phikit.generate.blocks import BLOCK_TOKENS, BlockPool
from phikit.generate.sequence import Sequence, State


class Span(NamedTuple):
    """Tokens of one sequence that go through the model together."""

    sequence: Sequence
    start: int
    """Position of the first one."""
    tokens: list[int]
    """Some of the sequence's own and, if these are its last, drafts of what may follow."""
    drafts: int

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token can be drawn after this step."""
        return self.end - self.drafts == len(self.sequence.tokens)


class Scheduler:
    """Holds the queue, the running sequences, and their blocks.

    Invariants between steps: a sequence holds blocks only while it runs, and those of its computed
    tokens at least; `running` is ordered by admission; every row has at most one owner, whose
    blocks it lists.
    """

    def __init__(
        self, pool: BlockPool, *, max_rows: int, max_context: int, step_tokens: int
    ) -> None:
        self.pool = pool
        self.tables = np.zeros((max_rows, -(-max_context // BLOCK_TOKENS)), np.int32)
        """Row r lists the blocks of the sequence that owns it."""
        self.step_tokens = step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._rows = list(reversed(range(max_rows)))

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this length fits, if need be alone."""
        return -(-tokens // BLOCK_TOKENS) <= self.pool.size

    def plan(self, drafts: dict[Sequence, list[int]]) -> list[Span]:
        """The spans of the next step."""
        spans: list[Span] = []
        decoding = sum(sequence.pending == 1 for sequence in self.running)
        budget = max(1, self.step_tokens - decoding)
        number, preempted = 0, False
        while number < len(self.running):
            sequence = self.running[number]
            is_decoding = sequence.pending == 1
            count = 1 if is_decoding else min(sequence.pending, budget)
            ahead = drafts.get(sequence, []) if is_decoding else []
            before = len(self.running)
            if count and self._grow(sequence, sequence.computed + count + len(ahead)):
                spans.append(_span(sequence, count, ahead))
                budget -= 0 if is_decoding else count
            preempted = preempted or len(self.running) < before
            number += 1
        while self.waiting and self._rows and budget > 0 and not preempted:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            count = min(sequence.pending, budget)
            has_grown = self._grow(sequence, sequence.computed + count)
            assert has_grown
            spans.append(_span(sequence, count, []))
            budget -= count
        return spans

    def fork(self, first: Sequence) -> list[Sequence]:
        """Start the siblings of a sequence whose prompt has been computed; those that run now.

        They share its full blocks. A last one that is not full must be copied, from
        `first.blocks[-1]` to each sibling's own. Where rows or blocks run out the rest waits.
        """
        siblings, first.siblings = first.siblings, []
        full = first.computed // BLOCK_TOKENS
        wanted = len(first.blocks) - full
        assert wanted <= 1
        room = min(len(self._rows), self.pool.available if wanted else len(siblings))
        for sibling in siblings[:room]:
            for block in first.blocks[:full]:
                self.pool.share(block)
            sibling.blocks, sibling.computed = first.blocks[:full], first.computed
            self._start(sibling)
            has_grown = self._grow(sibling, sibling.computed)
            assert has_grown
        for sibling in reversed(siblings[room:]):
            self.waiting.appendleft(sibling)
        return siblings[:room]

    def finish(self, sequence: Sequence) -> None:
        """Let go of a sequence, wherever it is; its siblings no longer wait for it."""
        if sequence.state is State.RUNNING:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        for sibling in reversed(sequence.siblings):
            self.waiting.appendleft(sibling)
        sequence.siblings = []

    def restart(self, sequence: Sequence) -> None:
        """A running sequence gives its blocks back and computes all its tokens anew."""
        self._release(sequence)

    def name_full_blocks(self, sequence: Sequence) -> None:
        """Let later sequences find the blocks that a sequence has filled."""
        full = sequence.computed // BLOCK_TOKENS
        for index in range(sequence.named, full):
            self.pool.name(sequence.blocks[index], sequence.name(index))
        sequence.named = full

    def _admit(self, sequence: Sequence) -> bool:
        """Move the head of the queue to the running ones, if the blocks for its tokens are free."""
        for index in range((len(sequence.tokens) - 1) // BLOCK_TOKENS):
            block = self.pool.find(sequence.name(index))
            if block is None:
                break
            sequence.blocks.append(block)
        needed = len(sequence.tokens) // BLOCK_TOKENS + 1 - len(sequence.blocks)
        alone = not self.running
        if needed > self.pool.available and not alone:
            self._release(sequence)
            return False
        self.waiting.popleft()
        sequence.computed = len(sequence.blocks) * BLOCK_TOKENS
        self._start(sequence)
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence blocks for its first `tokens`; False if it had to yield."""
        while len(sequence.blocks) * BLOCK_TOKENS < tokens:
            block = self.pool.take()
            if block is not None:
                self.tables[sequence.row, len(sequence.blocks)] = block
                sequence.blocks.append(block)
                continue
            youngest = self.running[-1]
            self._stop(youngest)
            youngest.state = State.WAITING
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _start(self, sequence: Sequence) -> None:
        sequence.row = self._rows.pop()
        self.tables[sequence.row, : len(sequence.blocks)] = sequence.blocks
        sequence.state = State.RUNNING
        self.running.append(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        # The last first: the beginning, which others are likelier to share, stays idle longest.
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        sequence.blocks, sequence.computed, sequence.named = [], 0, 0


def _span(sequence: Sequence, count: int, drafts: list[int]) -> Span:
    start = sequence.computed
    return Span(sequence, start, sequence.tokens[start : start + count] + drafts, len(drafts))
