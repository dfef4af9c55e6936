"""Guesses of what comes next, which one pass of the model checks together.

The engine keeps the guesses that are what it draws anyway, so a drafter may be wrong at the cost of
time, never of the text. A guess is one token per place: with the draw of a place fixed, that loses
nothing against rejection sampling (Leviathan et al., 2023, arXiv 2211.17192) for a drafter that is
sure of itself, and a little for one whose second choice is often right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from phikit.generate.attend import PagedAttention, Stretch
from phikit.generate.blocks import BLOCK_TOKENS, BlockPool
from phikit.generate.cache import PagedCache, block_bytes
from phikit.generate.replay import Replays
from phikit.generate.sequence import Sequence
from phikit.models.decoder import Decoder


class Drafter(Protocol):
    """Something that guesses."""

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Guesses for sequences that decode, at most as many as each has room for."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        ...


class PromptLookup:
    """What followed the last occurrence of a sequence's last tokens in itself.

    Costs nothing and guesses well where replies quote: summaries, edits, code, worked equations.
    Source: Saxena, "Prompt Lookup Decoding" (2023).

    Args:
        max_drafts: guesses per pass.
        longest, shortest: the number of last tokens that are looked for, longer ones first.
    """

    def __init__(self, *, max_drafts: int = 8, longest: int = 4, shortest: int = 2) -> None:
        assert 0 < shortest <= longest and max_drafts > 0
        self.max_drafts = max_drafts
        self.lengths = range(longest, shortest - 1, -1)
        self._indices: dict[Sequence, _Index] = {}

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        drafts = {}
        for sequence, most in room.items():
            index = self._indices.setdefault(sequence, _Index(self.lengths))
            found = index.guess(sequence.tokens, most=min(most, self.max_drafts))
            if found:
                drafts[sequence] = found
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)


class _Index:
    """Where each run of tokens of one sequence ended last."""

    def __init__(self, lengths: range) -> None:
        self.lengths = lengths
        self.ends: dict[tuple[int, ...], int] = {}
        self.read = 0

    def guess(self, tokens: list[int], *, most: int) -> list[int]:
        """What followed the latest earlier occurrence of the end of `tokens`."""
        # The last token begins no known run yet: what follows it is the question.
        for end in range(self.read + 1, len(tokens)):
            for length in self.lengths:
                if length <= end:
                    self.ends[tuple(tokens[end - length : end])] = end
        self.read = max(self.read, len(tokens) - 1)
        for length in self.lengths:
            if length <= len(tokens):
                end = self.ends.get(tuple(tokens[-length:]))
                if end is not None:
                    return tokens[end : end + most]
        return []


class DraftModel:
    """A smaller model of the same vocabulary, which says what it finds likeliest.

    It keeps a cache of its own and, before it guesses, catches up with what has been said since.

    Args:
        model: the small model.
        max_drafts: guesses per pass, each one pass of the small model.
        cache_bytes: bounds its cached keys and values; sequences beyond it go without drafts.
    """

    def __init__(
        self, model: Decoder, *, max_drafts: int = 4, cache_bytes: int = 1 << 30, max_rows: int = 64
    ) -> None:
        self.model, self.max_drafts = model, max_drafts
        size = cache_bytes // block_bytes(model.config, model.dtype)
        widest = -(-model.config.max_context // BLOCK_TOKENS)
        self.pool = BlockPool(min(size, max_rows * widest))
        self.rows = list(range(max_rows))
        self.tables_RM = torch.zeros(max_rows, widest, dtype=torch.int32)
        self.cache = PagedCache(
            model.config, blocks=self.pool.size, dtype=model.dtype, device=model.device
        )
        self._replays = Replays(model)
        self._followed: dict[Sequence, _Followed] = {}

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        most = {
            sequence: min(ahead, self.max_drafts)
            for sequence, ahead in room.items()
            if sequence.request.media is None  # which the small model does not perceive
        }
        drafts: dict[Sequence, list[int]] = {s: [] for s in most if self._follow(s, most[s])}
        for place in range(self.max_drafts):
            going = [sequence for sequence in drafts if place < most[sequence]]
            if not going:
                break
            for sequence, token in zip(going, self._step(going, drafts), strict=True):
                drafts[sequence].append(token)
        for sequence in drafts:
            # Keys of guesses are rotated right, but the guesses may be wrong.
            self._followed[sequence].computed = len(sequence.tokens)
        return drafts

    def forget(self, sequence: Sequence) -> None:
        followed = self._followed.pop(sequence, None)
        if followed is not None:
            for block in followed.blocks:
                self.pool.release(block)
            self.rows.append(followed.row)

    def _follow(self, sequence: Sequence, ahead: int) -> bool:
        """Make room for a sequence and its guesses; False if there is none."""
        length = len(sequence.tokens) + ahead
        longrope = self.model.config.longrope
        limit = self.model.config.max_context
        if length > (limit if longrope is None else min(limit, longrope.original_context)):
            return False
        if sequence not in self._followed:
            if not self.rows:
                return False
            self._followed[sequence] = _Followed(self.rows.pop())
        followed = self._followed[sequence]
        while len(followed.blocks) * BLOCK_TOKENS < length:
            block = self.pool.take()
            if block is None:
                return False
            self.tables_RM[followed.row, len(followed.blocks)] = block
            followed.blocks.append(block)
        return True

    def _step(self, going: list[Sequence], drafts: dict[Sequence, list[int]]) -> list[int]:
        """The likeliest next token of each, after what was said and guessed."""
        tokens: list[int] = []
        positions: list[int] = []
        stretches: list[Stretch] = []
        for sequence in going:
            followed = self._followed[sequence]
            new = (sequence.tokens + drafts[sequence])[followed.computed :]
            stretches.append(Stretch(len(tokens), len(new), followed.computed, followed.row))
            positions += range(followed.computed, followed.computed + len(new))
            tokens += new
            followed.computed += len(new)
        device = self.model.device
        positions_S = torch.tensor(positions, device=device)
        attend = PagedAttention(
            self.cache,
            self.tables_RM.to(device),
            stretches,
            positions_S=positions_S,
            window=self.model.config.sliding_window,
        )
        hidden_BTD = self.model.run_blocks(
            self.model.embed(torch.tensor(tokens, device=device)[:, None]),
            positions_BT=positions_S[:, None],
            attend=attend,
            walk=self._replays,
        )
        last = torch.tensor([s.first + s.count - 1 for s in stretches], device=device)
        return self.model.logits(hidden_BTD[last, 0]).argmax(-1).tolist()


@dataclass
class _Followed:
    """What the draft model has read of a sequence."""

    row: int
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
