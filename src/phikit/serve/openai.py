"""The engine's replies as OpenAI's clients read them: whole, or as server-sent events."""

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phikit.base.errors import ContextOverflowError
from phikit.chat.message import Message
from phikit.chat.tokenizer import Tokenizer
from phikit.generate.language_model import LanguageModel
from phikit.generate.reply import Piece, ReplyReader, token_text
from phikit.generate.request import FinishReason
from phikit.generate.sequence import Event
from phikit.generate.sequence import Sequence as Sample
from phikit.serve import openai_schema as schema
from phikit.serve.faults import encode, fault_of
from phikit.serve.jobs import Job
from phikit.serve.limits import Limits
from phikit.serve.models import ModelShelf, ServedModel
from phikit.serve.openai_ask import check_ids

log = logging.getLogger("phikit.serve")


class Said(NamedTuple):
    """What one sample has said since it was last looked at."""

    choice: int
    piece: Piece
    sample: Sample
    first: int
    """Place of the first of the new tokens."""
    end: int
    message: Message | None
    """The whole, if it has ended."""
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Form:
    """What is in every object of one answer."""

    id: str
    kind: str
    created: int
    model: str

    def made(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One object."""
        head = {"id": self.id, "object": self.kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


def form(prefix: str, kind: str, model: str) -> Form:
    """With an id of its own."""
    return Form(f"{prefix}-{secrets.token_hex(12)}", kind, int(time.time()), model)


async def said(job: Job) -> AsyncIterator[list[Said]]:
    """What the samples say, in pieces, those of one moment together.

    Raises as `Job.hear`.
    """
    loaded = job.served.loaded
    readers: dict[int, tuple[ReplyReader, int]] = {}
    async for prompt, events in job.hear():
        asked = job.asked[prompt]
        count = asked.request.num_samples
        by_sample: dict[int, list[Event]] = {}
        for event in events:
            by_sample.setdefault(event.sample, []).append(event)
        pieces = []
        for number, own in by_sample.items():
            choice = prompt * count + number
            reader, first = readers.get(choice) or (asked.reader(loaded), 0)
            piece, message, reason = Piece(), None, own[-1].finish_reason
            for event in own:
                piece = _joined(piece, reader.push(event.token))
            if reason is not None:
                last, message = reader.finish(closes=asked.closes if reason == "stop" else ())
                piece = _joined(piece, last)
            end = len(reader.tokens)
            sample = own[-1].ticket.samples[number]
            shown = piece != Piece() or reason is not None
            readers[choice] = (reader, end if shown else first)
            if shown:
                pieces.append(Said(choice, piece, sample, first, end, message, reason))
        if pieces:
            yield pieces


async def everything(job: Job) -> list[Said]:
    """The whole replies, in order."""
    whole = []
    for prompt, completions in enumerate(await job.completions()):
        asked = job.asked[prompt]
        for number, completion in enumerate(completions):
            reader = asked.reader(job.served.loaded)
            reader.tokens = completion.tokens
            reason = completion.finish_reason
            piece, message = reader.finish(closes=asked.closes if reason == "stop" else ())
            ticket = job.streams[prompt].ticket
            assert ticket is not None
            end, sample = len(completion.tokens), ticket.samples[number]
            whole.append(Said(len(whole), piece, sample, 0, end, message, reason))
    return whole


# --- chat ----------------------------------------------------------------------------------------


async def chat_whole(job: Job, body: schema.ChatRequest) -> dict[str, Any]:
    """A chat completion in one object."""
    choices = []
    for each in await everything(job):
        message = each.message
        assert message is not None
        calls = calls_of(message)
        answer: dict[str, Any] = {"role": "assistant", "content": message.content}
        if calls:
            answer |= {"content": message.content or None, "tool_calls": calls}
        if message.thinking is not None:
            answer["reasoning_content"] = message.thinking
        choices.append(
            {
                "index": each.choice,
                "message": answer,
                "logprobs": _chat_log_probs(job, each) if body.logprobs else None,
                "finish_reason": _reason(each),
            }
        )
    made = form("chatcmpl", "chat.completion", body.model)
    return made.made(choices, usage=usage(job))


async def chat_events(job: Job, body: schema.ChatRequest) -> AsyncIterator[dict[str, Any]]:
    """A chat completion in pieces."""
    made = form("chatcmpl", "chat.completion.chunk", body.model)

    def chunk(choice: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        fields = {"logprobs": None, "finish_reason": None, **more}
        return made.made([{"index": choice, "delta": delta, **fields}])

    for choice in range(body.n or 1):
        yield chunk(choice, {"role": "assistant", "content": ""})
    async for pieces in said(job):
        for each in pieces:
            delta: dict[str, Any] = {}
            if each.piece.thinking:
                delta["reasoning_content"] = each.piece.thinking
            if each.piece.content:
                delta["content"] = each.piece.content
            calls = calls_of(each.message) if each.message is not None else []
            if calls:
                delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(calls)]
            log_probs = _chat_log_probs(job, each) if body.logprobs else None
            if delta or log_probs:
                yield chunk(each.choice, delta, logprobs=log_probs)
            if each.finish_reason is not None:
                yield chunk(each.choice, {}, finish_reason=_reason(each))
    if body.stream_options is not None and body.stream_options.include_usage:
        yield made.made([], usage=usage(job))


def calls_of(message: Message) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
            },
        }
        for call in message.tool_calls
    ]


def _reason(said: Said) -> str:
    if said.message is not None and said.message.tool_calls:
        return "tool_calls"
    return "length" if said.finish_reason == "length" else "stop"


def _chat_log_probs(job: Job, said: Said) -> dict[str, Any]:
    """Of all sampled tokens, thinking included, but those that end the reply."""
    tokenizer = job.served.loaded.tokenizer
    content = [
        {
            **_log_prob(tokenizer, token, log_prob),
            "top_logprobs": [_log_prob(tokenizer, *pair) for pair in top],
        }
        for token, log_prob, top in _sampled(job.served.loaded, said)
    ]
    return {"content": content, "refusal": None}


def _sampled(
    loaded: LanguageModel, said: Said
) -> Iterable[tuple[int, float, list[tuple[int, float]]]]:
    """Tokens with their log-probabilities, and those of the likeliest in their place."""
    sample, ends = said.sample, loaded.renderer.stop_ids
    start = len(sample.request.prompt)
    for place in range(said.first, said.end):
        token = sample.tokens[start + place]
        if token not in ends:
            top = sample.top_log_probs[place] if sample.top_log_probs else []
            yield token, sample.log_probs[place], top


def _log_prob(tokenizer: Tokenizer, token: int, log_prob: float) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    # A token may hold a part of a character; its bytes are then not to be had from its text.
    whole = None if "\ufffd" in text else list(text.encode())
    # JSON has no infinity, which a token the grammar forbids has.
    return {"token": text, "logprob": max(log_prob, -9999.0), "bytes": whole}


# --- text ----------------------------------------------------------------------------------------


async def text_whole(job: Job, body: schema.CompletionRequest) -> dict[str, Any]:
    """A text completion in one object."""
    choices = [
        {
            "index": each.choice,
            "text": each.message.content if each.message is not None else "",
            "logprobs": None if body.logprobs is None else _text_log_probs(job, each, 0)[0],
            "finish_reason": _reason(each),
        }
        for each in await everything(job)
    ]
    return form("cmpl", "text_completion", body.model).made(choices, usage=usage(job))


async def text_events(job: Job, body: schema.CompletionRequest) -> AsyncIterator[dict[str, Any]]:
    """A text completion in pieces."""
    made = form("cmpl", "text_completion", body.model)
    offsets: dict[int, int] = {}
    async for pieces in said(job):
        for each in pieces:
            log_probs = None
            if body.logprobs is not None:
                offset = offsets.get(each.choice, 0)
                log_probs, offsets[each.choice] = _text_log_probs(job, each, offset)
            reason = None if each.finish_reason is None else _reason(each)
            choice = {"index": each.choice, "text": each.piece.content, "logprobs": log_probs}
            yield made.made([{**choice, "finish_reason": reason}])
    if body.stream_options is not None and body.stream_options.include_usage:
        yield made.made([], usage=usage(job))


def _text_log_probs(job: Job, said: Said, offset: int) -> tuple[dict[str, Any], int]:
    """The older shape, whose offsets count characters from the reply's beginning; and the next."""
    tokenizer = job.served.loaded.tokenizer
    tokens, log_probs, tops, offsets = [], [], [], []
    for token, log_prob, top in _sampled(job.served.loaded, said):
        text = token_text(tokenizer, token)
        tokens.append(text)
        log_probs.append(max(log_prob, -9999.0))
        tops.append({token_text(tokenizer, id_): max(value, -9999.0) for id_, value in top})
        offsets.append(offset)
        offset += len(text)
    shape = {
        "tokens": tokens,
        "token_logprobs": log_probs,
        "top_logprobs": tops if said.sample.request.top_log_probs else None,
        "text_offset": offsets,
    }
    return shape, offset


# --- all -----------------------------------------------------------------------------------------


def usage(job: Job) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of all replies."""
    prompt, sampled = job.prompt_tokens, job.sampled_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


async def as_events(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events; one that failed ends with an error in place of `[DONE]`."""
    try:
        async for each in objects:
            yield b"data: " + encode(each) + b"\n\n"
    except Exception as error:
        fault = fault_of(error)
        if fault.status == 500:
            log.exception("a stream failed")
        yield b"data: " + fault.body("") + b"\n\n"
    else:
        yield b"data: [DONE]\n\n"


def model_list(shelf: ModelShelf) -> dict[str, Any]:
    """The models by name."""
    return {"object": "list", "data": [model_entry(shelf, name) for name in shelf.names]}


def model_entry(shelf: ModelShelf, name: str) -> dict[str, Any]:
    """One model."""
    created = int(shelf.sources[name].about.get("modified_s", 0))
    return {"id": name, "object": "model", "created": created, "owned_by": "phikit"}


async def embeddings(
    served: ServedModel,
    body: schema.EmbeddingRequest,
    inputs: Sequence[str | list[int]],
    limits: Limits,
) -> dict[str, Any]:
    """Vectors for the inputs, one pass of the model each, between the steps of the engine.

    A vector is the mean of the final normalised hidden states over all places of the input, scaled
    to length 1. None of these models was trained for it: good enough to find near duplicates, no
    match for a model made for retrieval.
    """
    loaded = served.loaded
    ids = await asyncio.to_thread(_embedding_ids, loaded, inputs, limits)
    data = []
    for index, tokens in enumerate(ids):
        vector = await asyncio.wrap_future(served.worker.call(_mean_state(loaded, tokens)))
        numbers = vector.numpy().astype(np.float32)
        in_base64 = body.encoding_format == "base64"
        made = base64.b64encode(numbers.tobytes()).decode() if in_base64 else numbers.tolist()
        data.append({"object": "embedding", "index": index, "embedding": made})
    total = sum(map(len, ids))
    counts = {"prompt_tokens": total, "total_tokens": total}
    return {"object": "list", "data": data, "model": body.model, "usage": counts}


def _embedding_ids(
    loaded: LanguageModel, inputs: Sequence[str | list[int]], limits: Limits
) -> list[list[int]]:
    longest = min(limits.max_embedding_tokens, loaded.config.max_context)
    encode_text = loaded.tokenizer.encode
    found = [
        encode_text(i) if isinstance(i, str) else check_ids(i, loaded, param="input")
        for i in inputs
    ]
    for place, ids in enumerate(found):
        if not 0 < len(ids) <= longest:
            raise ContextOverflowError(
                f"input {place} has {len(ids)} tokens",
                fix=f"embed 1 to {longest} at a time",
            )
    return found


def _mean_state(loaded: LanguageModel, tokens: list[int]) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        tokens_BT = torch.tensor([tokens], device=loaded.model.device)
        mean_D = loaded.model.hidden(tokens_BT)[0].float().mean(0)
        return torch.nn.functional.normalize(mean_D, dim=0).cpu()

    return run


def _joined(a: Piece, b: Piece) -> Piece:
    return Piece(a.content + b.content, a.thinking + b.thinking)
