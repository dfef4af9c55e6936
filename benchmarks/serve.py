"""What HTTP costs: the server beside its own engine, and many streams for many minutes.

    python -m benchmarks.serve [--model smollm2] [--streams 16] [--rounds 7] [--threads 2]
    python -m benchmarks.serve --soak 300 [--streams 64]

The first lets both take turns at the same prompts: the engine in a process of its own, and the
server with one client process that reads all streams. Wanted: 0.95 of the engine's tokens a second.

The second keeps so many streams open for so many seconds, each reply compared with what the engine
says to its prompt alone, and watches the server's memory. The cache takes memory as its blocks are
first written, up to its bound, so all of them are written before the clock starts.

Both write their part of docs/results/serve.json.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.duel import Outcome, Play, Side, machine, take_turns
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "serve.json"
WANTED = 0.95
CACHE_GIB = "0.5"
"""Of the server in the long run."""
FILLING_WORDS = 400
"""Of the prompts that fill its cache."""
TEXTS = (
    "Tell a story about a lighthouse and number {} of its keepers.",
    "Explain why {} is or is not a prime number, step by step.",
    "Write a letter to a friend who lives {} kilometres away.",
    "List the planets, then say something about the number {}.",
)


class Job(NamedTuple):
    """What both sides do in a round."""

    model: str
    dtype: str
    streams: int
    tokens: int
    threads: int


def prompts(count: int, first: int = 0) -> list[str]:
    """So many different ones."""
    return [TEXTS[i % len(TEXTS)].format(i + 2) for i in range(first, first + count)]


# --- the engine beside the server ----------------------------------------------------------------


def engine_alone(job: Job) -> Play:
    """All prompts in one batch, no server anywhere."""
    import torch

    from phikit.generate.language_model import load

    torch.set_num_threads(job.threads)
    speaker = load(job.model, dtype=job.dtype)
    requests = [
        speaker.request([{"role": "user", "content": text}], max_new_tokens=job.tokens)
        for text in prompts(job.streams)
    ]

    def play() -> Outcome:
        started, worked = time.perf_counter(), time.process_time()
        replies = speaker.engine.generate(requests)
        seconds, work = time.perf_counter() - started, time.process_time() - worked
        said = sum(len(completion.tokens) for [completion] in replies)
        return Outcome(said / seconds, {"tokens": said, "cpu_ms_per_token": 1000 * work / said})

    return play


def over_http(job: Job) -> Play:
    """The same through a server in this process and a client in another."""
    import threading

    import torch

    from phikit.generate.language_model import load
    from phikit.serve import server
    from phikit.serve.app import make_app
    from phikit.serve.limits import Limits
    from phikit.serve.models import ModelShelf, Source

    torch.set_num_threads(job.threads)
    speaker, limits = load(job.model, dtype=job.dtype), Limits()
    shelf = ModelShelf({"model": Source(lambda: speaker, lambda: 0)})
    listener = server.listen("127.0.0.1", 0)
    uvicorn = server.make_server(make_app(shelf), limits)
    serving = uvicorn.serve(sockets=[listener])
    threading.Thread(target=lambda: asyncio.run(serving), daemon=True).start()
    client = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serve", "--client", str(listener.getsockname()[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin is not None and client.stdout is not None
    ask, answer = client.stdin, client.stdout
    bodies = [body(text, job.tokens) for text in prompts(job.streams)]

    def play() -> Outcome:
        worked = time.process_time()
        ask.write(json.dumps(bodies) + "\n")
        ask.flush()
        told = json.loads(answer.readline())
        said, work = told["tokens"], time.process_time() - worked + told["cpu_seconds"]
        facts = {"tokens": said, "cpu_ms_per_token": 1000 * work / said}
        return Outcome(said / told["seconds"], facts)

    return play


def body(text: str, tokens: int, model: str = "model") -> dict[str, Any]:
    """A greedy chat completion that counts its tokens."""
    talk = [{"role": "user", "content": text}]
    counts = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": talk, "temperature": 0, "max_tokens": tokens, **counts}


def compare(job: Job, rounds: int) -> dict[str, Any]:
    """Let both take turns."""
    sides = [Side("engine alone", engine_alone, job), Side("over HTTP", over_http, job)]
    alone, http = take_turns(sides, rounds=rounds, console=Console())
    ratio = median(b / a for a, b in zip(alone.rates, http.rates, strict=True))
    assert alone.facts["tokens"] == http.facts["tokens"], "the sides did not say the same"
    print(f"engine alone {median(alone.rates):.1f} tokens/s, over HTTP {median(http.rates):.1f}")
    print(f"ratio {ratio:.3f}, wanted {WANTED}")
    costs = {side.name: side.facts["cpu_ms_per_token"] for side in (alone, http)}
    print(", ".join(f"{name} {cost:.2f}" for name, cost in costs.items()), "CPU ms a token")
    rates = {"engine alone": alone.rates, "over HTTP": http.rates}
    return {"job": job._asdict(), "rates": rates, "ratio": ratio, "cpu_ms_per_token": costs}


# --- a client that costs little ------------------------------------------------------------------


async def stream(port: int, request: dict[str, Any]) -> str:
    """The bytes of one streamed answer, as text; a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    content = json.dumps(request).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    received = bytearray()
    while chunk := await reader.read(1 << 16):
        received += chunk
    writer.close()
    return received.decode()


def read(answer: str) -> tuple[str, int, bool]:
    """The text of a streamed answer, its tokens, and whether it came to its end."""
    objects = [
        json.loads(line) for line in re.findall(r"^data: (\{.*\})\r?$", answer, re.MULTILINE)
    ]
    deltas = [c["delta"].get("content") or "" for o in objects for c in o.get("choices", ())]
    counts = [o["usage"]["completion_tokens"] for o in objects if o.get("usage")]
    return "".join(deltas), sum(counts), "data: [DONE]" in answer


def be_client(port: int) -> None:
    """For each line of request bodies on standard input, one line of counts."""

    async def ask(requests: list[dict[str, Any]]) -> list[str]:
        return await asyncio.gather(*(stream(port, request) for request in requests))

    for line in sys.stdin:
        started, worked = time.perf_counter(), time.process_time()
        answers = asyncio.run(ask(json.loads(line)))
        seconds, work = time.perf_counter() - started, time.process_time() - worked
        tokens = sum(read(answer)[1] for answer in answers)
        told = {"seconds": seconds, "tokens": tokens, "cpu_seconds": work}
        print(json.dumps(told), flush=True)


# --- the long run --------------------------------------------------------------------------------


def soak(job: Job, seconds: float) -> dict[str, Any]:
    """Streams for a while, their texts compared, the server's memory watched."""
    texts = prompts(2 * job.streams)
    expected = alone_texts(job, texts)
    command = [sys.executable, "-m", "phikit.cli", "serve", f"model={job.model}", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        server = subprocess.Popen(
            [*command, "--dtype", job.dtype, "--cache-gib", CACHE_GIB],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert server.stdout is not None
        port = int(server.stdout.readline().split("/v1")[0].rpartition(":")[2])
        report = asyncio.run(run_streams(server.pid, port, job, expected, seconds))
        server.terminate()
        server.wait(60)
        errors.seek(0)
        report["server said"] = errors.read()[-2000:]
    print(json.dumps(report, indent=1))
    return report


def alone_texts(job: Job, texts: Sequence[str]) -> dict[str, str]:
    """What the engine says to each prompt by itself."""
    import torch

    from phikit.generate.language_model import load

    torch.set_num_threads(job.threads)
    speaker = load(job.model, dtype=job.dtype)
    said = {}
    for text in texts:
        talk = [{"role": "user", "content": text}]
        said[text] = speaker.generate(talk, max_new_tokens=job.tokens).text
    return said


async def run_streams(
    pid: int, port: int, job: Job, expected: dict[str, str], seconds: float
) -> dict[str, Any]:
    """Keep the streams busy; count replies, errors and bytes."""
    await fill_cache(port, job)
    full = resident_mib(pid)
    texts, deadline = list(expected), time.monotonic() + seconds
    counts = {"replies": 0, "tokens": 0, "broken": 0, "different": 0}
    memory: list[float] = []

    async def keep_asking(number: int) -> None:
        turn = number
        while time.monotonic() < deadline:
            text = texts[turn % len(texts)]
            turn += job.streams + 1
            said, tokens, is_whole = read(await stream(port, body(text, job.tokens)))
            counts["replies"] += 1
            counts["tokens"] += tokens
            counts["broken"] += not is_whole
            counts["different"] += is_whole and said != expected[text]

    async def watch() -> None:
        while time.monotonic() < deadline:
            memory.append(resident_mib(pid))
            await asyncio.sleep(max(0.5, seconds / 60))

    await asyncio.gather(watch(), *(keep_asking(number) for number in range(job.streams)))
    await asyncio.sleep(1)
    return {
        "seconds": seconds,
        "streams": job.streams,
        **counts,
        "resident MiB, the cache full": round(full),
        "resident MiB, by tenths": [round(x) for x in memory[:: max(1, len(memory) // 10)]],
        "growth in the second half, MiB": round(memory[-1] - memory[len(memory) // 2], 1),
    }


async def fill_cache(port: int, job: Job) -> None:
    """Have every block of the cache written, by prompts that have no beginning in common."""
    from phikit.generate.blocks import BLOCK_TOKENS

    async def read_prompts(numbers: range) -> None:
        texts = (f"{number} " + "word " * FILLING_WORDS for number in numbers)
        asked = [stream(port, body(text, 1)) for text in texts]
        assert all("[DONE]" in answer for answer in await asyncio.gather(*asked))

    await read_prompts(range(1))  # the model is loaded when it is first asked
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    metrics = (await reader.read()).decode()
    writer.close()
    [blocks] = re.findall(r"^phikit_engine_blocks\{.*\} (\S+)", metrics, re.MULTILINE)
    prompts = int(float(blocks)) * BLOCK_TOKENS // FILLING_WORDS + 1
    for first in range(1, prompts + 1, job.streams):
        await read_prompts(range(first, min(prompts + 1, first + job.streams)))


def resident_mib(pid: int) -> float:
    """Memory that a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def main() -> None:
    """Compare, or soak."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--streams", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        be_client(options.client)
        return
    streams = options.streams or (64 if options.soak else 16)
    job = Job(options.model, options.dtype, streams, options.tokens, options.threads)
    part = "soak" if options.soak else "overhead"
    report = soak(job, options.soak) if options.soak else compare(job, options.rounds)
    record = json.loads(OUT.read_text()) if OUT.exists() else {}
    record |= {part: {**report, "machine": machine(("torch", "uvicorn", "fastapi"))}}
    OUT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
