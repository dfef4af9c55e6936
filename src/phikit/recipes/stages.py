"""From a stage's config and the model before it to the objective it trains."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phikit.base.errors import DataError
from phikit.base.files import write_atomic
from phikit.base.types import Example
from phikit.chat.message import Message
from phikit.chat.render import Renderer
from phikit.data.corpus import Document, pretraining_documents
from phikit.data.problem import Problem
from phikit.generate.engine import Engine
from phikit.recipes.config import (
    DPOStage,
    MediaStage,
    MidStage,
    PretrainStage,
    RLStage,
    SFTStage,
    Stage,
)
from phikit.recipes.context import Prepared, StageContext, stage_seed
from phikit.recipes.media import prepare_media
from phikit.solve.plain import SamplingConfig, plain
from phikit.solve.solver import Reply
from phikit.train.dpo import DPOObjective, Pair, Rollout, add_reference, match_rollouts
from phikit.train.grpo import GRPOObjective, rate, reward_from, select_prompts
from phikit.train.lm import LMObjective
from phikit.train.sft import SFTObjective
from phikit.weights.load import Loaded


def prepare(stage: Stage, context: StageContext) -> Prepared:
    """Build the stage's data and objective; what was sampled for it is kept in its folder."""
    match stage:
        case PretrainStage():
            return _prepare_pretrain(stage, context)
        case MidStage():
            return _prepare_mid(stage, context)
        case SFTStage():
            return _prepare_sft(stage, context)
        case DPOStage():
            return _prepare_dpo(stage, context)
        case RLStage():
            return _prepare_rl(stage, context)
        case MediaStage():
            return prepare_media(stage, context)


def corpus(stage: PretrainStage, seed: int, *, count: int | None = None) -> list[Document]:
    """The stage's pre-training documents, or the first `count` of them."""
    documents = pretraining_documents(
        seed=stage_seed(seed, stage.name, "corpus"),
        mixture=stage.mixture,
        count=stage.documents if count is None else count,
    )
    return list(documents)


def _prepare_pretrain(stage: PretrainStage, context: StageContext) -> Prepared:
    documents = corpus(stage, context.seed)
    examples = [_document_example(document, context.loaded) for document in documents]
    objective = LMObjective(examples, stage.lm, seed=stage_seed(context.seed, stage.name, "order"))
    return Prepared(objective, stage.loop.num_steps(objective.steps_per_epoch))


def _document_example(document: Document, loaded: Loaded) -> Example:
    if not isinstance(document.content, str):
        return _learn_all(loaded.renderer.example(document.content))
    ids = [*loaded.tokenizer.encode(document.content), loaded.tokenizer.special("<|endoftext|>")]
    return Example(tokens=np.array(ids, np.int32), loss_mask=np.ones(len(ids), np.bool_))


def _learn_all(example: Example) -> Example:
    return Example(tokens=example.tokens, loss_mask=np.ones(len(example), np.bool_))


def _prepare_mid(stage: MidStage, context: StageContext) -> Prepared:
    renderer = context.loaded.renderer
    examples = [_learn_all(renderer.example(p.messages())) for p in context.problems]
    objective = LMObjective(examples, stage.lm, seed=stage_seed(context.seed, stage.name, "order"))
    return Prepared(objective, stage.loop.num_steps(objective.steps_per_epoch))


def _prepare_sft(stage: SFTStage, context: StageContext) -> Prepared:
    renderer = context.loaded.renderer
    examples = [renderer.example(p.messages()) for p in context.problems]
    objective = SFTObjective(
        examples, stage.sft, seed=stage_seed(context.seed, stage.name, "order")
    )
    return Prepared(objective, stage.loop.num_steps(objective.steps_per_epoch))


def _prepare_dpo(stage: DPOStage, context: StageContext) -> Prepared:
    def make() -> list[Any]:
        sampling = SamplingConfig(
            temperature=stage.temperature,
            max_new_tokens=stage.max_new_tokens,
            num_samples=stage.samples,
            seed=stage_seed(context.seed, stage.name, "rollouts"),
        )
        replies = _sample(context, context.problems, sampling, name=f"{stage.name}: rollouts")
        rated = rate(context.problems, replies, reward_from(context.scorer))
        groups = [
            [
                Rollout(_reply_example(context.loaded.renderer, g.problem, r), v > 0, r.finished)
                for r, v in zip(g.replies, g.rewards, strict=True)
            ]
            for g in rated
        ]
        matched = match_rollouts(groups, max_pairs=stage.max_pairs_per_problem)
        pairs = add_reference(context.loaded.model, matched, micro_pairs=stage.dpo.micro_pairs)
        return [[*map(_plain, pair[:2]), *pair[2:]] for pair in pairs]

    kept = _kept(context.folder / "pairs.json", make)
    if not kept:
        raise DataError(
            f"stage {stage.name!r} found no pair: no question had both a correct and a wrong reply",
            fix="give it more problems or samples, or leave the stage out",
        )
    pairs = [Pair(_example(a), _example(b), ra, rb) for a, b, ra, rb in kept]
    objective = DPOObjective(pairs, stage.dpo, seed=stage_seed(context.seed, stage.name, "order"))
    return Prepared(objective, stage.loop.num_steps(objective.steps_per_epoch))


def _prepare_rl(stage: RLStage, context: StageContext) -> Prepared:
    config, selection = stage.grpo, stage.grpo.selection
    problems = list(context.problems)
    if selection is not None:
        sampling = SamplingConfig(
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            num_samples=selection.samples,
            seed=stage_seed(context.seed, stage.name, "selection"),
        )
        candidates = problems[: selection.candidates]

        def make() -> list[str]:
            replies = _sample(context, candidates, sampling, name=f"{stage.name}: prompt selection")
            rated = rate(candidates, replies, reward_from(context.scorer))
            return [problem.content_hash for problem in select_prompts(rated, selection)]

        chosen = set(_kept(context.folder / "prompts.json", make))
        problems = [problem for problem in candidates if problem.content_hash in chosen]
    steps = stage.loop.num_steps(len(problems) / config.prompts_per_step)
    objective = GRPOObjective(
        context.loaded.model,
        context.loaded.renderer,
        problems,
        reward_from(context.scorer),
        config,
        steps=steps,
        seed=stage_seed(context.seed, stage.name, "order"),
    )
    return Prepared(objective, steps)


def _sample(
    context: StageContext, problems: Sequence[Problem], sampling: SamplingConfig, *, name: str
) -> list[list[Reply]]:
    context.progress.task(name, len(problems) * sampling.num_samples)
    started, tokens = time.perf_counter(), 0

    def on_progress(sampled: int, finished: int) -> None:
        nonlocal tokens
        tokens += sampled
        rate = tokens / (time.perf_counter() - started)
        context.progress.advance(finished, tokens_per_s=rate)

    engine = Engine(context.loaded.model)
    return plain(engine, context.loaded.renderer, sampling, on_progress=on_progress)(problems)


def _reply_example(renderer: Renderer, problem: Problem, reply: Reply) -> Example:
    prompt = renderer.prompt([Message(role="user", content=problem.question)])
    tokens = np.array([*prompt, *reply.tokens], np.int32)
    return Example(tokens=tokens, loss_mask=np.arange(len(tokens)) >= len(prompt))


def _plain(example: Example) -> list[Any]:
    """An example of one prompt and one reply as (tokens, prompt length)."""
    return [example.tokens.tolist(), int(example.loss_mask.argmax())]


def _example(plain: list[Any]) -> Example:
    tokens, prompt_length = plain
    mask = np.arange(len(tokens)) >= prompt_length
    return Example(tokens=np.array(tokens, np.int32), loss_mask=mask)


def _kept(path: Path, make: Callable[[], list[Any]]) -> list[Any]:
    """What `make` returned the first time, from `path` ever after."""
    if not path.exists():
        write_atomic(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))
