"""The engine: batches of prompts with shared prefixes over a static cache.

One walk of a request: `generate` sorts requests by length and fills grids of P prompts x G samples;
a grid is prefilled once per prompt, then all samples step together; samples that have ended are
dropped from the grid when enough have; results go back in the order of the requests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phikit.base.errors import ContextOverflowError
from phikit.generate.cache import Decode, GroupCache, Prefill
from phikit.generate.request import Completion, OnProgress, Request
from phikit.generate.sample import Sampling, sample, stream_ids
from phikit.models.dense import DenseModel

SHRINK = 0.7
"""A grid is compacted when that leaves at most this share of its rows."""
PROMPT_STEP = 16
"""Prompts are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Some samples [first, first + count) of request number `index`."""

    index: int
    first: int
    count: int
    request: Request


class Engine:
    """Runs requests on a model in this process.

    `max_rows` bounds the samples decoded together, `prefill_tokens` the tokens of one prefill call.
    """

    def __init__(
        self, model: DenseModel, *, max_rows: int = 512, prefill_tokens: int = 8192
    ) -> None:
        self.model = model
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], *, on_progress: OnProgress | None = None
    ) -> list[list[Completion]]:
        """The samples of each request, in order.

        Raises ContextOverflowError, naming both numbers, if a prompt and its reply do not fit.
        """
        for request in requests:
            self.check(request)
        results: list[list[Completion]] = [[] for _ in requests]
        for groups in self._grids(requests):
            for group, completions in zip(groups, self._run(groups, on_progress), strict=True):
                results[group.index] += completions
        return results

    @torch.inference_mode()
    def stream(self, request: Request) -> Iterator[int]:
        """The ids of one sample as they are drawn, the stop token included."""
        self.check(request)
        grid = _Grid(self, [_Group(0, 0, 1, request)])
        for _ in range(request.max_new_tokens):
            token = int(grid.step()[0])
            yield token
            if token in request.stop_ids:
                return

    def check(self, request: Request) -> None:
        """Raise ContextOverflowError if the request cannot fit the model's context."""
        config = self.model.config
        limit = config.max_context
        needed = len(request.prompt) + request.max_new_tokens
        if config.longrope is not None and len(request.prompt) <= config.longrope.original_context:
            limit = config.longrope.original_context
        if not request.prompt:
            raise ContextOverflowError("the prompt is empty", fix="pass at least one token")
        if needed > limit:
            raise ContextOverflowError(
                f"{len(request.prompt)} prompt tokens + {request.max_new_tokens} new tokens = "
                f"{needed}, and the model's context is {limit}",
                fix="shorten the prompt or lower max_new_tokens",
            )

    def _grids(self, requests: Sequence[Request]) -> Iterator[list[_Group]]:
        """Fill grids with groups of like size and length, the longest first."""
        groups = [
            _Group(i, first, min(self.max_rows, request.num_samples - first), request)
            for i, request in enumerate(requests)
            for first in range(0, request.num_samples, self.max_rows)
        ]
        groups.sort(key=lambda g: (*self._kind(g), len(g.request.prompt)), reverse=True)
        grid: list[_Group] = []
        for group in groups:
            if grid and (self._kind(grid[0]) != self._kind(group) or self._is_full(grid)):
                yield sorted(grid, key=lambda g: (g.index, g.first))
                grid = []
            grid.append(group)
        if grid:
            yield sorted(grid, key=lambda g: (g.index, g.first))

    def _kind(self, group: _Group) -> tuple[bool, int]:
        """What all groups of a grid share: LongRoPE has one set of factors per call."""
        longrope = self.model.config.longrope
        is_long = longrope is not None and len(group.request.prompt) > longrope.original_context
        return is_long, group.count

    def _is_full(self, grid: list[_Group]) -> bool:
        return (len(grid) + 1) * grid[0].count > self.max_rows

    def _run(self, groups: list[_Group], on_progress: OnProgress | None) -> list[list[Completion]]:
        grid = _Grid(self, groups)
        while grid.live:
            before = grid.live
            grid.step()
            if on_progress is not None:
                on_progress(before, before - grid.live)
            if 0 < grid.live < SHRINK * grid.rows:
                grid.compact()
        return grid.completions()


class _Grid:
    """P prompts x G samples decoding together; every per-row tensor is in row order p * G + g."""

    def __init__(self, engine: Engine, groups: list[_Group]) -> None:
        self.model, self.groups = engine.model, groups
        self.group = groups[0].count
        requests = [g.request for g in groups for _ in range(self.group)]
        device = self.model.lm_head.weight.device
        column = lambda values, dtype: torch.tensor(values, dtype=dtype, device=device)  # noqa: E731
        self.sampling = Sampling(
            column([r.temperature for r in requests], torch.float32),
            column([r.top_k or 0 for r in requests], torch.long),
            column([1.0 if r.top_p is None else r.top_p for r in requests], torch.float32),
            stream_ids(
                column([r.seed for r in requests], torch.long),
                column([g.first + i for g in groups for i in range(self.group)], torch.long),
            ),
        )
        self.limits = column([r.max_new_tokens for r in requests], torch.long)
        width = max(1, *(len(r.stop_ids) for r in requests))
        padded = [list(r.stop_ids) + [-1] * (width - len(r.stop_ids)) for r in requests]
        self.stop_ids = column(padded, torch.long)
        self.finished = self.limits <= 0
        self.origin = torch.arange(len(requests), device=device)
        steps = int(self.limits.max())
        self.tokens = torch.zeros(len(requests), steps, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(len(requests), steps, device=device)
        self.counts = torch.zeros(len(requests), dtype=torch.long, device=device)
        self.stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self.cache = GroupCache(self.model.config)
        self.steps = 0
        self.hidden = self._prefill(engine.prefill_tokens)

    @property
    def rows(self) -> int:
        return len(self.finished)

    @property
    def live(self) -> int:
        return int((~self.finished).sum())

    def _prefill(self, prefill_tokens: int) -> Tensor:
        """Fill the prefix cache; return the hidden state after each prompt, once per sample."""
        device = self.model.lm_head.weight.device
        lengths = torch.tensor([len(g.request.prompt) for g in self.groups], device=device)
        longest = int(lengths.max())
        width = longest + -longest % PROMPT_STEP
        # Padding repeats the last position: LongRoPE chooses its factors by the largest one.
        positions = torch.arange(width, device=device).clamp_(max=longest - 1)[None]
        tokens = torch.zeros(len(self.groups), width, dtype=torch.long, device=device)
        for row, group in zip(tokens, self.groups, strict=True):
            row[: len(group.request.prompt)] = torch.as_tensor(group.request.prompt)
        parts: list[list[tuple[Tensor, Tensor]]] = []
        last: list[Tensor] = []
        chunk = max(1, prefill_tokens // width)
        for start in range(0, len(tokens), chunk):
            part = GroupCache(self.model.config)
            hidden = self.model.hidden(
                tokens[start : start + chunk], positions_BT=positions, attend=Prefill(part)
            )
            ends = lengths[start : start + chunk] - 1
            last.append(hidden[torch.arange(len(hidden), device=device), ends])
            parts.append(part.prefix)
        self.cache.prefix = [
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*parts, strict=True)
        ]
        self.cache.fork(lengths, group=self.group)
        return torch.cat(last).repeat_interleave(self.group, dim=0)

    def step(self) -> Tensor:
        """Draw one token per row; if any row goes on, run the model on them; return the ids."""
        logits = self.model.lm_head(self.hidden)
        ids, log_probs = sample(logits, self.sampling, step=self.steps)
        going = ~self.finished
        where = self.origin[going]
        self.tokens[where, self.steps] = ids[going]
        self.log_probs[where, self.steps] = log_probs[going]
        self.counts[where] += 1
        stopped = (ids[:, None] == self.stop_ids).any(-1)
        self.stopped[where] = stopped[going]
        self.steps += 1
        self.finished = self.finished | stopped | (self.steps >= self.limits)
        if not bool(self.finished.all()):
            self.cache.advance()
            positions = self.cache.lengths_P.repeat_interleave(self.group) + self.steps - 1
            self.hidden = self.model.hidden(
                ids[:, None], positions_BT=positions[:, None], attend=Decode(self.cache)
            )[:, 0]
        return ids

    def compact(self) -> None:
        """Drop finished prompts and columns if that shrinks the grid enough.

        Sizes are rounded up to few values: on CPU every new number of rows compiles new kernels,
        which costs more than a few rows carried along.
        """
        live_PG = (~self.finished).view(-1, self.group)
        counts = live_PG.sum(1)
        width = min(self.group, _round_size(int(counts.max())))
        prompts = min(len(counts), _round_size(int((counts > 0).sum())))
        if prompts * width > SHRINK * self.rows:
            return
        kept = torch.argsort(counts > 0, descending=True, stable=True)[:prompts].sort().values
        columns = torch.argsort(live_PG[kept].int(), dim=1, descending=True, stable=True)[:, :width]
        grid = kept[:, None] * self.group + columns
        rows = grid.flatten()
        self.cache.keep(grid)
        self.group = width
        self.sampling = self.sampling.rows(rows)
        self.limits, self.stop_ids = self.limits[rows], self.stop_ids[rows]
        self.finished, self.origin = self.finished[rows], self.origin[rows]
        self.hidden = self.hidden[rows]

    def completions(self) -> list[list[Completion]]:
        """The finished samples, one list per group."""
        count = self.groups[0].count
        counts, stopped = self.counts.tolist(), self.stopped.tolist()
        tokens, log_probs = self.tokens.tolist(), self.log_probs.tolist()
        made = [
            Completion(tokens[i][:n], log_probs[i][:n], "stop" if stopped[i] else "length")
            for i, n in enumerate(counts)
        ]
        return [made[i : i + count] for i in range(0, len(made), count)]


def _round_size(n: int) -> int:
    """`n` rounded up to one of four values between one power of two and the next."""
    step = 1 << max(0, n.bit_length() - 3)
    return n + -n % step
