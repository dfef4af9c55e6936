"""The engine: many requests on one model, step by step.

One walk of a request: `submit` makes its samples and queues them; every `step` the scheduler picks
the tokens that go through the model next, of many sequences at once, and where their keys and
values lie (`schedule`, `blocks`); one pass runs them (`attend`, `cache`); the sequences whose last
token was among them draw their next one (`sample`). Requests come, end and are cancelled at any
step, without a trace in the others.

It knows token ids only; text is put around it by `language_model`. It belongs to one thread.

What is unusual:
- A draft is a guess of the very token that will be drawn, not of a distribution, and the draw of a
  place is fixed by (seed, sample, place). So a guess is kept if it is what is drawn there, and
  drafts never change a text, at any temperature.
- LongRoPE rotates every key anew once a sequence outgrows the original context, and what was cached
  before depends on the old rotation through all layers. Such a sequence computes its tokens again.
- Training changes weights under a living engine. It notices, and drops what it had cached.
"""

from collections.abc import Generator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phikit.base.errors import ContextOverflowError, PhikitError
from phikit.generate.attend import PagedAttention, Stretch
from phikit.generate.blocks import BLOCK_TOKENS, BlockPool, name_root
from phikit.generate.cache import PagedCache, block_bytes
from phikit.generate.draw import Draw, draw
from phikit.generate.media import check_media, embed_prompt, resolve_adapter, routed
from phikit.generate.replay import Replays
from phikit.generate.request import Completion, OnProgress, Request
from phikit.generate.schedule import Scheduler, Span
from phikit.generate.sequence import Event, Ticket
from phikit.generate.sequence import Sequence as Sample
from phikit.generate.speculate import Drafter
from phikit.models.decoder import Decoder
from phikit.nn.linear import padded_rows

MAX_ROWS = 512
"""Default bound on samples that run at once."""
STEP_TOKENS = 2048
"""Default bound on tokens of one step."""
CACHE_BYTES = 4 << 30
"""Default bound on cached keys and values."""


class Engine:
    """Runs requests on a model in this process.

    Args:
        max_rows: bounds the samples that run at once.
        step_tokens: bounds the tokens of one step, of which long prompts take what decoding leaves.
        cache_bytes: bounds the cached keys and values; they take memory only as they are used.
        cache_dtype: "int8" halves the cache of a bfloat16 model; None keeps the model's dtype.
        drafter: guesses tokens ahead, see `speculate`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_rows: int = MAX_ROWS,
        step_tokens: int = STEP_TOKENS,
        cache_bytes: int = CACHE_BYTES,
        cache_dtype: Literal["int8"] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.model, self.drafter = model, drafter
        self.cache_bytes = cache_bytes
        self.cache_dtype = torch.int8 if cache_dtype == "int8" else model.dtype
        context = model.config.max_context
        blocks = cache_bytes // block_bytes(model.config, self.cache_dtype)
        self.pool = BlockPool(min(blocks, max_rows * -(-context // BLOCK_TOKENS)))
        self.scheduler = Scheduler(
            self.pool, max_rows=max_rows, max_context=context, step_tokens=step_tokens
        )
        self._cache: PagedCache | None = None
        self._replays = Replays(model)
        self._weights: object = None
        self._places: list[int] = []

    @property
    def busy(self) -> bool:
        """Whether any request has tokens to come."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def generate(
        self, requests: Sequence[Request], *, on_progress: OnProgress | None = None
    ) -> list[list[Completion]]:
        """The samples of each request, in order.

        Raises as `check` does, before any work is done; and what a constraint raises.
        """
        for request in requests:
            self.check(request)
        tickets = [self.submit(request) for request in requests]
        try:
            while not all(ticket.done for ticket in tickets):
                events = self.step()
                if on_progress is not None and events:
                    ended = sum(event.finish_reason is not None for event in events)
                    on_progress(len(events), ended)
        finally:
            for ticket in tickets:
                self.cancel(ticket)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        return [ticket.completions for ticket in tickets]

    def stream(self, request: Request) -> Generator[int, None, None]:
        """The ids of a request's first sample as they are drawn, the stop token included.

        Leaving the loop cancels the request.
        """
        ticket = self.submit(request)
        sample, seen = ticket.samples[0], 0
        try:
            while True:
                while seen < sample.said:
                    seen += 1
                    yield sample.tokens[len(request.prompt) + seen - 1]
                if ticket.error is not None:
                    raise ticket.error
                if sample.finish_reason is not None:
                    return
                self.step()
        finally:
            self.cancel(ticket)

    def check(self, request: Request) -> None:
        """Refuse what cannot be run.

        Raises:
            ContextOverflowError: prompt and reply do not fit into the model's context or the cache.
            ChatError: the media fit neither the prompt's placeholders nor the model.
            ConfigError: the model has no such adapter.
        """
        prompt, new = len(request.prompt), request.max_new_tokens
        limit = self.model.config.max_context
        asked = f"{prompt} prompt tokens + {new} new tokens = {prompt + new}"
        if not request.prompt:
            raise ContextOverflowError("the prompt is empty", fix="pass at least one token")
        if prompt + new > limit:
            raise ContextOverflowError(
                f"{asked}, and the model's context is {limit}",
                fix="shorten the prompt or lower max_new_tokens",
            )
        if not self.scheduler.fits(prompt + new):
            raise ContextOverflowError(
                f"{asked}, and the cache holds {self.pool.size * BLOCK_TOKENS}",
                fix=f"shorten the prompt, lower max_new_tokens, or raise cache_bytes, which is "
                f"{self.cache_bytes}",
            )
        check_media(self.model, request)

    def submit(self, request: Request) -> Ticket:
        """Queue a request; raises as `check` does."""
        self.check(request)
        if not self.busy:
            self._notice_new_weights()
        adapter = resolve_adapter(self.model, request)
        media = b"" if request.media is None else request.media.digest()
        root = name_root((adapter or "").encode(), media)
        ticket = Ticket(request, adapter, root)
        ticket.samples = [Sample(ticket, i, root=root) for i in range(request.num_samples)]
        for sample in ticket.samples:
            self._choose_factors(sample)
        if request.max_new_tokens <= 0:
            for sample in ticket.samples:
                sample.finish_reason = "length"
        elif ticket.samples:
            first, *first.siblings = ticket.samples
            self.scheduler.waiting.append(first)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what is left of a request; its samples keep what they have said."""
        for sample in ticket.samples:
            if sample.finish_reason is None:
                self._end(sample)
                sample.finish_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One pass of the model; returns the tokens it gave, at most one per draft and sample."""
        spans = self.scheduler.plan(self._drafts())
        if not spans:
            return []
        hidden_SD = self._run(spans)
        draws, place = [], 0
        for span in spans:
            sample = span.sequence
            sample.computed = span.end - span.drafts
            self.scheduler.name_full_blocks(sample)
            last = place + len(span.tokens) - 1 - span.drafts
            place += len(span.tokens)
            if span.is_last:
                drafts = span.tokens[len(span.tokens) - span.drafts :]
                draws += [Draw(s, last, drafts) for s in (sample, *self._fork(sample))]
        return self._draw([each for each in map(self._held, draws) if each], hidden_SD)

    def _held(self, each: Draw) -> Draw | None:
        """The draw with what its constraint allows; None if the constraint fails."""
        constraint = each.sequence.constraint
        if constraint is None:
            return each
        try:
            return each._replace(allowed_V=constraint.allowed())
        except PhikitError as error:
            self._fail(each.sequence.ticket, error)
            return None

    def _fail(self, ticket: Ticket, error: PhikitError) -> None:
        """End one request, and no other."""
        ticket.error = error
        self.cancel(ticket)

    def _draw(self, draws: list[Draw], hidden_SD: Tensor) -> list[Event]:
        """Draw the next tokens of the sequences that are due, and let the finished go."""
        events = []
        for each, tokens in zip(draws, draw(self.model, draws, hidden_SD), strict=True):
            sample = each.sequence
            if sample.finish_reason is not None:  # a sibling's constraint has failed
                continue
            for place, drawn in enumerate(tokens):
                try:
                    sample.add(drawn.token, drawn.log_prob)
                except PhikitError as error:
                    self._fail(sample.ticket, error)
                    break
                if sample.request.top_log_probs:
                    sample.top_log_probs.append(drawn.top)
                reason = sample.finish_reason
                events.append(Event(sample.ticket, sample.number, drawn.token, reason))
                is_kept = place < len(each.drafts) and each.drafts[place] == drawn.token
                sample.computed += is_kept
                if reason is not None or not is_kept:
                    break
            if sample.finish_reason is not None:
                self._end(sample)
            elif self._choose_factors(sample):
                self.scheduler.restart(sample)
        return events

    def _run(self, spans: list[Span]) -> Tensor:
        """The model on the tokens of the spans, laid end to end; hidden states [S, D]."""
        device = self.model.device
        cache = self._ready_cache()
        tokens, positions, stretches, adapters = [], [], [], []
        for span in spans:
            sample, count = span.sequence, len(span.tokens)
            stretches.append(Stretch(len(tokens), count, span.start, sample.row))
            tokens += span.tokens
            positions += range(span.start, span.end)
            adapters += [sample.ticket.adapter] * count
        positions_S = torch.tensor(positions, device=device)
        attend = PagedAttention(
            cache,
            torch.from_numpy(self.scheduler.tables).to(device),
            stretches,
            positions_S=positions_S,
            window=self.model.config.sliding_window,
        )
        padding = padded_rows(len(tokens), device) - len(tokens)
        tokens, adapters = tokens + [0] * padding, adapters + [None] * padding
        x_BTD = self.model.embed(torch.tensor(tokens, device=device)[:, None])
        for span, stretch in zip(spans, stretches, strict=True):
            self._put_media(x_BTD, span, stretch)
        with routed(self.model, adapters):
            hidden_BTD = self.model.run_blocks(
                x_BTD,
                positions_BT=F.pad(positions_S, (0, padding))[:, None],
                ends_B=self._ends(spans, padding),
                attend=attend,
                walk=None if any(adapters) else self._replays,
            )
        return hidden_BTD[: len(positions), 0]

    def _put_media(self, x_BTD: Tensor, span: Span, stretch: Stretch) -> None:
        """Overwrite the embeddings of a prompt with media, which are made once per request."""
        ticket = span.sequence.ticket
        prompt = len(ticket.request.prompt)
        if ticket.request.media is None or span.start >= prompt:
            return
        if ticket.prompt_TD is None:
            ticket.prompt_TD = embed_prompt(self.model, ticket.request)
        end = min(span.end, prompt)
        x_BTD[stretch.first : stretch.first + end - span.start, 0] = ticket.prompt_TD[
            span.start : end
        ]

    def _ends(self, spans: list[Span], padding: int) -> Tensor | None:
        """For LongRoPE, a position that decides which factors a token's sequence is rotated by."""
        longrope = self.model.config.longrope
        if longrope is None:
            return None
        counts = torch.tensor([len(span.tokens) for span in spans])
        is_long = torch.tensor([span.sequence.is_long for span in spans])
        is_long_S = F.pad(is_long.repeat_interleave(counts), (0, padding)).to(self.model.device)
        return torch.where(is_long_S, longrope.original_context, 0)

    def _choose_factors(self, sample: Sample) -> bool:
        """Whether LongRoPE's long factors apply to a sequence from now on and did not before."""
        longrope = self.model.config.longrope
        if longrope is None or sample.is_long or len(sample.tokens) <= longrope.original_context:
            return False
        sample.become_long(name_root(sample.root, b"long"))
        return True

    def _drafts(self) -> dict[Sample, list[int]]:
        """What the drafter expects the decoding sequences to say."""
        if self.drafter is None:
            return {}
        longrope = self.model.config.longrope
        room = {}
        for sample in self.scheduler.running:
            ahead = sample.request.max_new_tokens - sample.said - 1
            if longrope is not None and not sample.is_long:
                ahead = min(ahead, longrope.original_context - len(sample.tokens))
            if sample.pending == 1 and ahead > 0 and sample.constraint is None:
                room[sample] = ahead
        if len(room) > self.pool.available:
            return {}
        return self.drafter.propose(room)

    def _fork(self, first: Sample) -> list[Sample]:
        """Start the siblings of a sample whose prompt has just been computed."""
        if not first.siblings:
            return []
        started = self.scheduler.fork(first)
        own = [s.blocks[-1] for s in started if s.blocks[-1] != first.blocks[-1]]
        if own:
            self._ready_cache().copy(first.blocks[-1], own)
        return started

    def _end(self, sample: Sample) -> None:
        self.scheduler.finish(sample)
        if self.drafter is not None:
            self.drafter.forget(sample)

    def _notice_new_weights(self) -> None:
        """Drop idle blocks if the weights have been written to since they were filled."""
        versions = [p._version for p in self.model.parameters() if not p.is_inference()]
        weights = (self.model.dtype, self.model.device, sum(versions))
        if weights != self._weights:
            self.pool.forget()
            self._weights = weights
        places = [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]
        if places != self._places:
            self._replays.forget()
            self._places = places

    def _ready_cache(self) -> PagedCache:
        if self._cache is None:
            self._cache = PagedCache(
                self.model.config,
                blocks=self.pool.size,
                dtype=self.cache_dtype,
                device=self.model.device,
            )
        return self._cache
