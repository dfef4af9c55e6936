"""The engine: batches of prompts with shared prefixes over a static cache.

One walk of a request: `generate` sorts requests by length and fills grids of P prompts x G samples;
a grid is prefilled once per prompt, then all samples step together; samples that have ended are
dropped from the grid when enough have; results go back in the order of the requests.

LongRoPE rotates every key anew once a sequence outgrows the original context, and what was cached
before depends on the old rotation through all layers. So a prompt whose samples reach that length
is prefilled again with all it has said, at that one step; other rows of the grid go on undisturbed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phikit.base.errors import ContextOverflowError
from phikit.generate.cache import Decode, GroupCache, Prefill
from phikit.generate.media import adapters_of, check_media, embed_prompts, routed
from phikit.generate.request import Completion, OnProgress, Request
from phikit.generate.sample import Sampling, sample, stream_ids
from phikit.models.decoder import Decoder
from phikit.nn.attention import Attend

SHRINK = 0.7
"""A grid is compacted when that leaves at most this share of its rows."""
MAX_ROWS = 512
"""Default bound on samples decoded together."""
CACHE_BYTES = 4 << 30
"""Default bound on their cached keys and values."""
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

    Args:
        max_rows: bounds the samples decoded together.
        prefill_tokens: bounds the tokens of one prefill call, unless one prompt alone is longer.
        cache_bytes: bounds the keys and values of the samples decoded together, unless one sample
            alone needs more.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_rows: int = MAX_ROWS,
        prefill_tokens: int = 8192,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        config = model.config
        width = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        self.model = model
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.cache_tokens = cache_bytes // (width * model.lm_head.weight.element_size())

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
        """Refuse what cannot be run.

        Raises:
            ContextOverflowError: prompt and reply do not fit into the model's context.
            ChatError: the media fit neither the prompt's placeholders nor the model.
            ConfigError: the model has no such adapter.
        """
        limit = self.model.config.max_context
        needed = len(request.prompt) + request.max_new_tokens
        if not request.prompt:
            raise ContextOverflowError("the prompt is empty", fix="pass at least one token")
        if needed > limit:
            raise ContextOverflowError(
                f"{len(request.prompt)} prompt tokens + {request.max_new_tokens} new tokens = "
                f"{needed}, and the model's context is {limit}",
                fix="shorten the prompt or lower max_new_tokens",
            )
        check_media(self.model, request)

    def _grids(self, requests: Sequence[Request]) -> Iterator[list[_Group]]:
        """Fill grids with groups of like size and length, the longest first."""
        groups = []
        for i, request in enumerate(requests):
            step = min(self.max_rows, self.cache_tokens // max(1, request.max_new_tokens)) or 1
            groups += [
                _Group(i, first, min(step, request.num_samples - first), request)
                for first in range(0, request.num_samples, step)
            ]
        groups.sort(key=lambda g: (g.count, len(g.request.prompt)), reverse=True)
        grid: list[_Group] = []
        for group in groups:
            if grid and (grid[0].count != group.count or not self._has_room(grid, group)):
                yield sorted(grid, key=lambda g: (g.index, g.first))
                grid = []
            grid.append(group)
        if grid:
            yield sorted(grid, key=lambda g: (g.index, g.first))

    def _has_room(self, grid: list[_Group], group: _Group) -> bool:
        """Whether a grid may take one more group; its first prompt is its longest."""
        groups = [*grid, group]
        longest = max(g.request.max_new_tokens for g in groups)
        tokens = len(groups) * (len(grid[0].request.prompt) + group.count * longest)
        return len(groups) * group.count <= self.max_rows and tokens <= self.cache_tokens

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
        self.prefill_tokens = engine.prefill_tokens
        self.group = groups[0].count
        requests = [g.request for g in groups for _ in range(self.group)]
        self.adapters = adapters_of(self.model, requests)
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
        self.hidden = self._prefill()

    @property
    def rows(self) -> int:
        return len(self.finished)

    @property
    def live(self) -> int:
        return int((~self.finished).sum())

    def _prefill(self) -> Tensor:
        """Fill the prefix cache; return the hidden state after each prompt, once per sample."""
        device = self.model.lm_head.weight.device
        lengths = torch.tensor([len(g.request.prompt) for g in self.groups], device=device)
        longest = int(lengths.max())
        width = longest + -longest % PROMPT_STEP
        positions = torch.arange(width, device=device)[None]
        if self.model.config.longrope is not None:
            # Padding repeats the last position: the largest of a row chooses its factors.
            positions = torch.minimum(positions, lengths[:, None] - 1)
        positions = positions.expand(len(lengths), -1)
        tokens = torch.zeros(len(self.groups), width, dtype=torch.long, device=device)
        for row, group in zip(tokens, self.groups, strict=True):
            row[: len(group.request.prompt)] = torch.as_tensor(group.request.prompt)
        parts: list[list[tuple[Tensor, Tensor]]] = []
        last: list[Tensor] = []
        chunk = max(1, self.prefill_tokens // width)
        for start in range(0, len(tokens), chunk):
            part, rows = GroupCache(self.model.config), slice(start, start + chunk)
            requests = [g.request for g in self.groups[rows]]
            hidden = self._run(
                embed_prompts(self.model, tokens[rows], requests),
                self.adapters[:: self.group][rows],
                positions_BT=positions[rows],
                attend=Prefill(part),
            )
            ends = lengths[rows] - 1
            last.append(hidden[torch.arange(len(hidden), device=device), ends])
            parts.append(part.prefix)
        self.cache.prefix = [
            (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
            for layer in zip(*parts, strict=True)
        ]
        self.cache.fork(lengths, group=self.group)
        return torch.cat(last).repeat_interleave(self.group, dim=0)

    def _run(
        self,
        x_BTD: Tensor,
        adapters: Sequence[str | None],
        *,
        attend: Attend,
        positions_BT: Tensor | None = None,
    ) -> Tensor:
        """The model on embedded tokens, each row on its adapter."""
        with routed(self.model, adapters):
            return self.model.run_blocks(x_BTD, positions_BT=positions_BT, attend=attend)

    def step(self) -> Tensor:
        """Draw one token per row; if any row goes on, run the model on them; return the ids."""
        logits = self.model.logits(self.hidden)
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
            self.hidden = self._run(
                self.model.embed(ids[:, None]),
                self.adapters,
                positions_BT=positions[:, None],
                attend=Decode(self.cache),
            )[:, 0]
            self._switch_factors()
        return ids

    def _switch_factors(self) -> None:
        """Prefill anew the prompts whose samples have just outgrown LongRoPE's original context."""
        longrope = self.model.config.longrope
        if longrope is None:
            return
        last_P = self.cache.lengths_P + self.steps - 1
        for prompt in (last_P == longrope.original_context).nonzero().flatten().tolist():
            first = prompt * self.group
            request = self.groups[int(self.origin[first]) // self.groups[0].count].request
            given = torch.as_tensor(request.prompt, device=self.tokens.device)
            given_1TD = embed_prompts(self.model, given[None], [request])
            step = max(1, self.prefill_tokens // (longrope.original_context + 1))
            for start in range(first, first + self.group, step):
                rows = slice(start, min(start + step, first + self.group))
                said = self.tokens[self.origin[rows], : self.steps]
                part = GroupCache(self.model.config)
                prompt_BTD = given_1TD.expand(len(said), -1, -1)
                x_BTD = torch.cat([prompt_BTD, self.model.embed(said)], dim=1)
                run = self._run(x_BTD, self.adapters[rows], attend=Prefill(part))
                self.hidden[rows] = run[:, -1]
                self.cache.replace(prompt, rows, part.prefix)

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
        self.adapters = [self.adapters[row] for row in rows.tolist()]

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
