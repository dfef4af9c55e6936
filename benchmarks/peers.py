"""Engines that decoding is compared with: transformers' `generate`, and llama.cpp.

llama.cpp is called through the functions of its own C interface that `llama-cpp-python` exposes;
the class `Llama` of that package copies logits and would slow it down. It runs under several
settings and the fastest counts, each tried in a process of its own: some builds of it die.

Both get the default of OpenMP for how long threads wait actively, as they would without us.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.duel import Outcome, Play

ENVIRONMENT = (("GOMP_SPINCOUNT", "300000"),)
"""What libgomp takes by itself; phikit sets another number unless there is one."""
CHUNK = 512
"""Tokens of a prompt that llama.cpp takes at a time, its default."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a side does in each round.

    Attributes:
        folder: the models: "bf16", "int8" and "int4" are folders, the others `.gguf` files.
        weights: which of them.
        work: "decode" gives decoded tokens a second of the whole batch, prompts left out;
            "prefill" gives prompt tokens a second until the first token is there.
        setting: of llama.cpp, one of `SETTINGS`.
    """

    folder: Path
    weights: str
    threads: int
    work: str
    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 64
    setting: str = ""


def prompts(job: Job, number: int) -> list[list[int]]:
    """The prompts of a round: random, the same for all sides, and never the same twice."""
    draw = np.random.default_rng(number)
    return draw.integers(1000, 40_000, (job.batch, job.prompt_tokens)).tolist()


def rounds(job: Job, play: Callable[[list[list[int]]], float]) -> Play:
    """A `Play` that goes through the rounds; `play` takes the prompts and returns a rate."""
    numbers = iter(range(1_000_000))
    return lambda: Outcome(play(prompts(job, next(numbers))), {})


def phikit(job: Job) -> Play:
    """This library, as a user loads it."""
    import phikit as library
    from phikit.base.device import set_threads
    from phikit.generate.bench import steady_rates
    from phikit.generate.request import Request

    set_threads(job.threads)
    engine = library.load(job.folder / job.weights).engine

    def decode(tokens: list[list[int]]) -> float:
        requests = [Request(t, max_new_tokens=job.new_tokens, temperature=0.0) for t in tokens]
        [rate] = steady_rates(engine, requests, window=job.new_tokens)
        return rate

    def prefill(tokens: list[list[int]]) -> float:
        started = time.perf_counter()
        engine.generate([Request(tokens[0], max_new_tokens=1, temperature=0.0)])
        return job.prompt_tokens / (time.perf_counter() - started)

    return rounds(job, decode if job.work == "decode" else prefill)


def transformers(job: Job) -> Play:
    """`generate` of transformers in bfloat16, without an end token."""
    import torch

    torch.set_num_threads(job.threads)
    model = transformers_model(job.folder / job.weights)

    def generate(tokens: list[list[int]], new_tokens: int) -> list[float]:
        clock = _Clock()
        clock.times.append(time.perf_counter())
        model.generate(
            torch.tensor(tokens),
            attention_mask=torch.ones(len(tokens), len(tokens[0]), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        return clock.times

    def decode(tokens: list[list[int]]) -> float:
        _, _, first, *_, last = generate(tokens, job.new_tokens)
        return job.batch * (job.new_tokens - 1) / (last - first)

    def prefill(tokens: list[list[int]]) -> float:
        started, _, first = generate(tokens, 1)
        return job.prompt_tokens / (first - started)

    return rounds(job, decode if job.work == "decode" else prefill)


def transformers_model(folder: Path) -> Any:
    """A model of transformers in bfloat16 whose replies have no end but their length."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model


class _Clock:
    """Told of the prompt and then of each step's tokens, it notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flash": {"flash_attn_type": 1},
    "flash, bf16 cache": {"flash_attn_type": 1, "type_k": 30, "type_v": 30},
    "flash, q8_0 cache": {"flash_attn_type": 1, "type_k": 8, "type_v": 8},
    "as stored": {"use_extra_bufts": False},
}
"""Settings of llama.cpp worth a try; numbers are those of `ggml_type`. All but the last repack the
weights for the processor."""


def llama_cpp(job: Job) -> Play:
    """llama.cpp with weights of its own quantisation."""
    llama = _Llama(job)

    def decode(tokens: list[list[int]]) -> float:
        # One prompt copied to all sequences costs a step as much as prompts of their own.
        llama.clear()
        current = [llama.run(tokens[0], start=0, sequences=[0])[0]] * job.batch
        llama.copy_first(job.batch)
        times = []
        for step in range(job.new_tokens):
            sequences = range(job.batch)
            current = llama.run(current, start=job.prompt_tokens + step, sequences=sequences)
            times.append(time.perf_counter())
        return job.batch * (job.new_tokens - 1) / (times[-1] - times[0])

    def prefill(tokens: list[list[int]]) -> float:
        llama.clear()
        started = time.perf_counter()
        llama.run(tokens[0], start=0, sequences=[0])
        return job.prompt_tokens / (time.perf_counter() - started)

    return rounds(job, decode if job.work == "decode" else prefill)


class _Llama:
    """A model and a context of llama.cpp."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self.api = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        setting = SETTINGS[job.setting]
        about = llama_cpp.llama_model_default_params()
        about.use_extra_bufts = setting.get("use_extra_bufts", True)
        path = str(job.folder / job.weights).encode()
        model = llama_cpp.llama_model_load_from_file(path, about)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = job.batch * (-(-(job.prompt_tokens + job.new_tokens + 1) // 256) * 256)
        params.n_seq_max = job.batch
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = job.threads
        params.flash_attn_type = 0
        for name in setting.keys() - {"use_extra_bufts"}:
            setattr(params, name, setting[name])
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp refuses {job}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(max(CHUNK, job.batch), 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def copy_first(self, sequences: int) -> None:
        """Give all sequences what the first one has cached."""
        for sequence in range(1, sequences):
            self.api.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)

    def run(self, tokens: Sequence[int], *, start: int, sequences: Sequence[int]) -> list[int]:
        """The likeliest next token of each sequence.

        Tokens are one for each sequence, or several that follow each other in the only one.
        """
        batch, is_prompt = self.batch, len(sequences) == 1
        for first in range(0, len(tokens), CHUNK):
            part = tokens[first : first + CHUNK]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = start + first + i if is_prompt else start
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequences[0 if is_prompt else i]
                batch.logits[i] = not is_prompt or first + i == len(tokens) - 1
            if self.api.llama_decode(self.context, batch) != 0:
                raise RuntimeError("llama_decode failed")
        last = [batch.n_tokens - 1] if is_prompt else range(len(tokens))
        return [self._likeliest(i) for i in last]

    def _likeliest(self, index: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def write_gguf(loaded: Any, folder: Path) -> None:
    """A model as llama.cpp reads it: `bf16.gguf`, and what its own quantiser makes of that."""
    import llama_cpp

    from phikit.weights.gguf_out import save_gguf

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    source = folder / "bf16.gguf"
    save_gguf(source, loaded, quant="bf16")
    for name, kind in (
        ("q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
        ("q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0),
    ):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = kind
        target = str(folder / f"{name}.gguf").encode()
        failed = llama_cpp.llama_model_quantize(str(source).encode(), target, ctypes.byref(params))
        if failed:
            raise RuntimeError(f"llama.cpp cannot quantise to {name}")
