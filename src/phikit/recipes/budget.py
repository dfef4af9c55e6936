"""What a pipeline will cost, worked out before anything starts: parameters, tokens, memory.

Nothing is downloaded and no weight is allocated: models are built on the meta device, and the few
problems whose length is measured are generated on the spot. Every number says how far to trust it:
exact, an estimate, or an upper bound.
"""

from collections.abc import Iterable
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from torch import nn

from phikit.base.device import parse_dtype
from phikit.data.corpus import pretraining_documents
from phikit.data.problem import read_problems
from phikit.data.source import (
    FileSource,
    HubSource,
    MediaFileSource,
    MediaSource,
    ProceduralSource,
    Source,
    load_problems,
)
from phikit.generate.engine import CACHE_BYTES, MAX_ROWS
from phikit.models.dense import DenseConfig
from phikit.models.moe import MoEConfig
from phikit.models.registry import build
from phikit.nn.attention import EXPLICIT_MAX_TOKENS
from phikit.nn.lora import attach_lora
from phikit.nn.losses import CHUNK_ELEMENTS
from phikit.recipes.config import (
    DPOStage,
    MediaStage,
    MidStage,
    PipelineConfig,
    PretrainStage,
    RLStage,
    SFTStage,
    Stage,
)
from phikit.train.optim import OptimConfig, Optimiser
from phikit.weights.surgery import attach, thaw_text, train_only

CHARS_PER_TOKEN = 1.9
"""Of arithmetic in words, digits one by one: 1.9 under the nano vocabulary, 1.8 under SmolLM2's."""
HUB_QUESTION_TOKENS, HUB_REPLY_TOKENS = 120, 6000
"""Of long chains of thought about competition problems: 16 k characters in OpenR1-Math-220k."""
MEDIA_QUESTION_TOKENS, MEDIA_REPLY_TOKENS = 60, 6
"""Of generated problems about a picture of two crops or a clip of two seconds."""
READER_VOCABULARY = 1000
"""Token ids that occur in generated problems: a few hundred."""
MEASURED = 64
"""Documents or problems that are drawn to measure a length."""


class Amount(NamedTuple):
    """A number, None where only the data can tell it, and what kind of number it is."""

    value: int | None
    kind: Literal["exact", "estimate", "at most"] = "exact"


class Parameters(NamedTuple):
    """Numbers of weights: of the whole model, and those that some stage changes."""

    total: int
    trainable: int


class Memory(NamedTuple):
    """Bytes at the worst moment of a stage, the libraries (about 0.4 GB) and the data left out."""

    weights: int
    optimiser: int
    activations: int
    cache: int

    @property
    def peak(self) -> int:
        """Rollouts are made between updates, never during one."""
        return self.weights + self.optimiser + max(self.activations, self.cache)


class StageBudget(NamedTuple):
    """What one stage costs."""

    name: str
    steps: Amount
    trained_tokens: Amount
    generated_tokens: Amount
    memory: Memory


class Budget(NamedTuple):
    """What a pipeline costs; `evaluation_tokens` are generated after each stage."""

    parameters: Parameters
    stages: list[StageBudget]
    evaluation_tokens: Amount


def budget(config: PipelineConfig) -> Budget:
    """The budget of a pipeline.

    Raises:
        DataError: a source names a file that cannot be used.
    """
    evaluation = config.evaluation
    reply = min(_lengths(evaluation.source).reply, evaluation.max_new_tokens)
    generated = _times(_num_problems(evaluation.source), (1 + evaluation.samples) * reply)
    estimator = _Estimator(config)
    return Budget(
        parameters=estimator.parameters,
        stages=[estimator.stage(stage) for stage in config.stages],
        evaluation_tokens=generated._replace(kind="estimate"),
    )


class _Estimator:
    """One pipeline's model, on the meta device, and what its stages take."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config, self.shape, self.dtype = config, config.base.model, parse_dtype(config.dtype)
        with torch.device("meta"):
            self.model = build(self.shape).to(self.dtype)
            if config.lora is not None:
                attach_lora(self.model, name="adapter", **dict(config.lora))
        for modality in config.modalities:
            attach(self.model, modality)
        learning: set[nn.Parameter] = set()
        for stage in config.stages:
            self._learn(stage)
            learning |= {p for p in self.model.parameters() if p.requires_grad}
        sizes = [p.numel() for p in self.model.parameters()]
        self.parameters = Parameters(sum(sizes), sum(p.numel() for p in learning))

    def _learn(self, stage: Stage) -> None:
        """Freeze all but what the stage trains. An adapter of the text model has seen to that."""
        if isinstance(stage, MediaStage):
            train_only(self.model, stage.learns)
            if stage.backbone:
                thaw_text(self.model)
        elif self.config.modalities:
            self.model.requires_grad_(False)
            thaw_text(self.model)

    def stage(self, stage: Stage) -> StageBudget:
        self._learn(stage)
        match stage:
            case PretrainStage():
                return self._packed(stage, Amount(stage.documents), _document_tokens(stage))
            case MidStage():
                mean = _lengths(stage.source).example
                return self._packed(stage, _num_problems(stage.source), mean)
            case SFTStage():
                return self._sft(stage)
            case DPOStage():
                return self._dpo(stage)
            case RLStage():
                return self._rl(stage)
            case MediaStage():
                return self._media(stage)

    def _packed(self, stage: PretrainStage | MidStage, examples: Amount, mean: int) -> StageBudget:
        """Full rows: steps times rows times their length; padding makes it a little less."""
        lm = stage.lm
        step_tokens = lm.rows_per_step * lm.row_tokens
        steps = _steps(stage, examples, mean / step_tokens)
        tokens = _times(steps, step_tokens)
        if tokens.kind == "exact":
            tokens = tokens._replace(kind="at most")
        memory = self._memory(stage.loop.optim, rows=lm.micro_rows, length=lm.row_tokens)
        return StageBudget(stage.name, steps, tokens, Amount(0), memory)

    def _sft(self, stage: SFTStage) -> StageBudget:
        mean = _lengths(stage.source).example
        steps = _steps(stage, _num_problems(stage.source), 1 / stage.sft.examples_per_step)
        tokens = _times(steps, stage.sft.examples_per_step * mean)
        memory = self._memory(stage.loop.optim, rows=stage.sft.micro_examples, length=mean)
        return StageBudget(stage.name, steps, tokens._replace(kind="estimate"), Amount(0), memory)

    def _media(self, stage: MediaStage) -> StageBudget:
        """As fine-tuning, on the model that the stage trains.

        An encoder by itself is counted as if the language model ran: an upper bound.
        """
        trainer = self if stage.reader is None else self._of_reader(stage.reader, stage)
        mean = _lengths(stage.source).example
        steps = _steps(stage, _num_problems(stage.source), 1 / stage.sft.examples_per_step)
        tokens = _times(steps, stage.sft.examples_per_step * mean)
        memory = trainer._memory(stage.loop.optim, rows=stage.sft.micro_examples, length=mean)
        return StageBudget(stage.name, steps, tokens._replace(kind="estimate"), Amount(0), memory)

    def _of_reader(self, reader: DenseConfig, stage: MediaStage) -> "_Estimator":
        shape = reader.model_copy(update={"vocab_size": READER_VOCABULARY})
        base = self.config.base.model_copy(update={"model": shape})
        bare = [each.without_adapter() for each in self.config.modalities]
        alone = stage.model_copy(update={"reader": None, "backbone": True})
        changes = {"base": base, "modalities": bare, "stages": (alone,)}
        return _Estimator(self.config.model_copy(update=changes))

    def _dpo(self, stage: DPOStage) -> StageBudget:
        """As many pairs as the problems may give: how many they do, the rollouts will tell."""
        lengths, problems = _lengths(stage.source), _num_problems(stage.source)
        reply = min(lengths.reply, stage.max_new_tokens)
        length = lengths.question + reply
        pairs = _times(problems, stage.max_pairs_per_problem)._replace(kind="at most")
        steps = _steps(stage, pairs, 1 / stage.dpo.pairs_per_step)
        rollouts = _times(problems, stage.samples)
        memory = self._memory(
            stage.loop.optim,
            rows=2 * stage.dpo.micro_pairs,
            length=length,
            cached=(rollouts.value or MAX_ROWS, lengths.question + stage.max_new_tokens),
        )
        return StageBudget(
            stage.name,
            steps,
            _times(steps, 2 * stage.dpo.pairs_per_step * length),
            _times(rollouts, reply)._replace(kind="estimate"),
            memory,
        )

    def _rl(self, stage: RLStage) -> StageBudget:
        """All rollouts count as trained on, though selection inside groups leaves some out."""
        grpo, lengths = stage.grpo, _lengths(stage.source)
        reply = min(lengths.reply, grpo.max_new_tokens)
        length = lengths.question + reply
        rollouts = grpo.prompts_per_step * grpo.group_size
        chosen = grpo.selection
        selecting = 0 if chosen is None else chosen.candidates * chosen.samples
        steps = _steps(stage, _num_problems(stage.source), 1 / grpo.prompts_per_step)
        generated = _times(steps, rollouts * reply)
        if generated.value is not None:
            generated = Amount(generated.value + selecting * reply, "estimate")
        memory = self._memory(
            stage.loop.optim,
            rows=grpo.micro_rows,
            length=length,
            cached=(rollouts, lengths.question + grpo.max_new_tokens),
        )
        trained = _times(steps, rollouts * length)._replace(kind="at most")
        return StageBudget(stage.name, steps, trained, generated, memory)

    def _memory(
        self, optim: OptimConfig, *, rows: int, length: int, cached: tuple[int, int] = (0, 0)
    ) -> Memory:
        """Bytes on one device. P weights of b bytes, of which P' are trained:

        - weights: P b
        - optimiser, per trained weight: float32 master, gradient sum and momentum (12 bytes),
          under AdamW the second moment too (4), and the gradient of one micro-batch (b)
        - activations that the backward pass keeps, per token and layer:
          (4 D + (3 N + 2 K) H + 3 F) b, F of all experts that a token meets, and N T b for the
          attention weights where they are written out (up to 512 tokens on CPU); three float32
          copies of one chunk of logits
        - cache of rollouts: 2 K H b per row, token and layer, every reply at its full length, for
          as many rows at a time as the engine's bounds allow

        Args:
            rows, length: of a micro-batch, in tokens.
            cached: rows and tokens of the rollouts.
        """
        shape, size = self.shape, self.dtype.itemsize
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        state = Optimiser(self.model.named_parameters(), optim).state()
        kept = 4 * sum(tensor.numel() for tensor in state.values())
        heads = 3 * shape.num_heads + 2 * shape.num_kv_heads
        per_token = 4 * shape.d_model + heads * shape.head_dim + 3 * _hidden_width(shape)
        if length <= EXPLICIT_MAX_TOKENS:
            per_token += shape.num_heads * length
        per_cached_token = 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * size
        per_row = cached[1] * per_cached_token
        cache_rows = min(cached[0], MAX_ROWS, max(1, CACHE_BYTES // max(1, per_row)))
        return Memory(
            weights=self.parameters.total * size,
            optimiser=kept + trainable * (4 + size),
            activations=rows * length * shape.num_layers * per_token * size
            + 3 * 4 * CHUNK_ELEMENTS,
            cache=cache_rows * per_row,
        )


def _hidden_width(shape: DenseConfig | MoEConfig) -> int:
    """Hidden units of a block that one token meets."""
    if isinstance(shape, MoEConfig):
        return shape.top_k * shape.d_mlp + (shape.d_shared or 0)
    return shape.d_mlp


class _Lengths(NamedTuple):
    """Mean tokens of an example's two parts."""

    question: int
    reply: int

    @property
    def example(self) -> int:
        return self.question + self.reply


def _lengths(source: Source) -> _Lengths:
    if isinstance(source, HubSource):
        return _Lengths(HUB_QUESTION_TOKENS, HUB_REPLY_TOKENS)
    if isinstance(source, MediaSource | MediaFileSource):
        return _Lengths(MEDIA_QUESTION_TOKENS, MEDIA_REPLY_TOKENS)
    if isinstance(source, ProceduralSource):
        source = source.model_copy(update={"count": MEASURED})
        problems = load_problems(source, split="train", seed=0)
    else:
        problems = read_problems(source.path)[:MEASURED]
    replies = ["".join((p.thinking or "", p.solution or p.answer)) for p in problems]
    return _Lengths(_tokens(p.question for p in problems), _tokens(replies))


def _document_tokens(stage: PretrainStage) -> int:
    documents = pretraining_documents(seed=0, count=MEASURED, mixture=stage.mixture)
    return _tokens(
        document.content
        if isinstance(document.content, str)
        else "".join(message.content for message in document.content)
        for document in documents
    )


def _tokens(texts: Iterable[str]) -> int:
    """Mean tokens of the texts, estimated from their characters."""
    return max(1, round(fmean(map(len, texts)) / CHARS_PER_TOKEN))


def _num_problems(source: Source) -> Amount:
    """Exact where problems are generated; other sources may hold fewer than asked for."""
    if isinstance(source, ProceduralSource | MediaSource):
        return Amount(source.count)
    if isinstance(source, FileSource):
        found = len(read_problems(source.path))
        return Amount(min(found, source.count or found), "at most")
    return Amount(source.count, "at most")


def _steps(stage: Stage, examples: Amount, steps_per_example: float) -> Amount:
    """Exact when the config gives steps; otherwise as good as the number of examples."""
    if stage.loop.steps is not None:
        return Amount(stage.loop.steps)
    if examples.value is None:
        return examples
    kind = "at most" if examples.kind == "at most" else "estimate"
    return Amount(stage.loop.num_steps(examples.value * steps_per_example), kind)


def _times(amount: Amount, factor: int) -> Amount:
    return amount if amount.value is None else amount._replace(value=amount.value * factor)
