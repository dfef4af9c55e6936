"""A media stage: from problems with pictures and speech to the objective that teaches a model.

The first such stage of a pipeline attaches the modalities. Encoders may start by themselves
(`train.encoders`) or with a reader, a decoder of a few million weights that is thrown away; either
costs a hundredth of what learning through the language model does.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from phikit.base.errors import ConfigError, DataError
from phikit.base.files import storage_errors, write_atomic
from phikit.base.media import SPEECH, VISION, MediaItem, of_items
from phikit.base.types import Example
from phikit.chat.image import ImageCrops
from phikit.data.media.marks import mark_classes, marked
from phikit.data.media.problem import MediaProblem, prepare, spelt
from phikit.models.decoder import Decoder
from phikit.models.dense import DenseConfig
from phikit.models.modality import ModalityConfig
from phikit.models.registry import build
from phikit.models.senses import Hearing
from phikit.recipes.config import MediaStage
from phikit.recipes.context import Prepared, StageContext, stage_seed
from phikit.train.contrastive import ContrastiveObjective, pair_of
from phikit.train.encoders import (
    CTCObjective,
    MarksConfig,
    MarksObjective,
    meanings,
    reply_units,
)
from phikit.train.media import MediaSFTObjective
from phikit.weights.load import Loaded
from phikit.weights.surgery import adapt, attach, parts, thaw_text, train_only

FAULTS = "faults.json"
"""The items of a stage that could not be read, in its folder."""
ENCODED_AT_ONCE, ENCODED_TOKENS = 64, 4096
"""Most examples whose items a frozen encoder is given together, and most tokens of such items: 4096
are five minutes and a half of sound. A single example may have more."""
MEASURED_CLIPS = 500
"""Clips whose mel bands are measured."""


def prepare_media(stage: MediaStage, context: StageContext) -> Prepared:
    """Attach what is missing, read the items, freeze what does not learn.

    Raises:
        DataError: an item cannot be read, and the stage is to stop at such items.
        ConfigError: the stage trains nothing, or a part that a modality has not.
    """
    model = context.loaded.model
    _complete(model, stage, context)
    problems = [problem for problem in context.problems if isinstance(problem, MediaProblem)]
    if not problems:
        raise DataError(
            f"stage {stage.name!r}: no problem of its source has anything to see or to hear",
            fix="give it a source with media",
        )
    context.progress.task(f"{stage.name}: items", len(problems))
    read = prepare(
        problems,
        context.loaded.renderer,
        modalities={name: _compact(sense.config) for name, sense in model.senses.items()},
        ids=model.media_ids,
        max_tokens=model.config.max_context,
        on_fault=stage.on_fault,
        on_item=lambda: context.progress.advance(1),
    )
    with storage_errors(context.folder):
        listed = {"read": len(read.examples), "faults": [f._asdict() for f in read.faults]}
        write_atomic(context.folder / FAULTS, json.dumps(listed, indent=1))
    if not read.examples:
        first = read.faults[0]
        raise DataError(
            f"stage {stage.name!r}: none of {len(problems)} items could be read; "
            f"the first: {first.item}: {first.reason}",
            fix=f"see {context.folder / FAULTS}",
        )
    spell = context.loaded.tokenizer
    examples = [
        spelt(example, problem, spell)
        for example, problem in zip(read.examples, read.problems, strict=True)
    ]
    taught = model
    if stage.reader is not None:
        taught, examples = _reader(stage.reader, stage, context, examples)
    if "encoder" in stage.learns.get(SPEECH, ()):
        _measure_bands(taught, examples)
    learning = train_only(taught, stage.learns)
    if stage.backbone or stage.reader is not None:
        learning += thaw_text(taught)
    if not learning:
        raise ConfigError(f"stage {stage.name!r} trains nothing", fix="name parts in its `learns`")
    seed = stage_seed(context.seed, stage.name, "order")
    if stage.alone is not None:
        return _alone(stage, context.loaded, examples, read.problems, seed)
    if stage.reader is None:
        examples = _encoded(examples, taught, stage)
    objective = _objective(stage, taught, examples, seed)

    def finish() -> None:
        if taught is not model:
            copy_encoders(taught, model, stage.learns)

    return Prepared(objective, stage.loop.num_steps(objective.steps_per_epoch), taught, finish)


def _complete(model: Decoder, stage: MediaStage, context: StageContext) -> None:
    """Attach what is missing. Encoders start without adapters, so that pipelines which differ in
    those have the same start."""
    for modality in context.modalities:
        name, seed = modality.name, stage_seed(context.seed, modality.name, "weights")
        if name not in model.senses:
            attach(model, modality.without_adapter(), seed=seed)
        if not stage.is_start and model.senses[name].config != modality:
            adapt(model, modality, seed=seed)


def _alone(
    stage: MediaStage,
    loaded: Loaded,
    examples: list[Example],
    problems: Sequence[MediaProblem],
    seed: int,
) -> Prepared:
    """An encoder by itself. Hearing is in float32 whatever the model's type: it is small, and clips
    are few; sight takes two thirds of the time in bfloat16."""
    [(name, learnt)] = stage.learns.items()
    model, encode = loaded.model, loaded.tokenizer.encode
    if isinstance(stage.alone, MarksConfig):
        classes = mark_classes(marks for problem in problems for marks in problem.marks)
        named = zip(examples, problems, strict=True)
        examples = [_marked(example, problem, classes) for example, problem in named]
        names = [encode(each) for each in (" ", *classes, "\n")]
        objective = MarksObjective(
            model,
            examples,
            stage.sft,
            classes=len(classes) + 1,
            meanings_CD=meanings(model, names) if "projector" in learnt else None,
            seed=seed,
        )
    else:
        model.senses[name].float()
        units = reply_units(examples)
        names = [encode(" "), *([token] for token in units)]
        said = meanings(model, names) if "projector" in learnt else None
        objective = CTCObjective(
            model, examples, stage.sft, units=units, meanings_CD=said, seed=seed
        )

    def finish() -> None:
        del model.namer
        model.senses[name].to(model.dtype)

    return Prepared(objective, stage.loop.num_steps(objective.steps_per_epoch), None, finish)


def _marked(example: Example, problem: MediaProblem, classes: Mapping[str, int]) -> Example:
    if example.media is None:
        return example
    pictures = zip(example.media.images, problem.media.get(VISION, ()), problem.marks, strict=True)
    images = tuple(
        marked(image, marks, size=(source.shape[1], source.shape[0]), classes=classes)
        for image, source, marks in pictures
        if isinstance(source, np.ndarray)
    )
    return replace(example, media=of_items({**example.media.items, VISION: images}))


def _objective(
    stage: MediaStage, model: Decoder, examples: Sequence[Example], seed: int
) -> MediaSFTObjective | ContrastiveObjective:
    if stage.contrastive is None:
        return MediaSFTObjective(examples, stage.sft, seed=seed)
    marks = [sense.token for sense in model.senses.values()]
    pairs = [pair_of(example, placeholders=marks) for example in examples]
    return ContrastiveObjective(model, pairs, stage.contrastive, seed=seed)


def _compact(modality: ModalityConfig) -> Callable[[Any], MediaItem]:
    """What makes the modality's items, with pixels in half precision: it holds all of their 256
    steps, and thousands of pictures lie in memory."""

    def make(source: Any) -> MediaItem:
        item = modality.prepare(source)
        if not isinstance(item, ImageCrops):
            return item
        return replace(item, pixels_MCHW=item.pixels_MCHW.astype(np.float16))

    return make


def _encoded(examples: Sequence[Example], model: Decoder, stage: MediaStage) -> list[Example]:
    """The examples with the work of frozen encoders done; clips that are masked stay sounds."""
    done = list(examples)
    for name, sense in model.senses.items():
        is_masked = name == SPEECH and stage.sft.spec_augment is not None
        if "encoder" in stage.learns.get(name, ()) or is_masked:
            continue
        having = [i for i, each in enumerate(done) if each.media and each.media.items.get(name)]
        sizes = [sum(item.num_tokens for item in _items(done[i])[name]) for i in having]
        for piece in pieces(sizes, most=ENCODED_AT_ONCE, total=ENCODED_TOKENS):
            chunk = having[piece.start : piece.stop]
            items = [_items(done[i])[name] for i in chunk]
            encoded = iter(sense.encoded([item for of in items for item in of]))
            for i, of in zip(chunk, items, strict=True):
                new = {**_items(done[i]), name: tuple(next(encoded) for _ in of)}
                done[i] = replace(done[i], media=of_items(new))
    return done


def pieces(sizes: Sequence[int], *, most: int, total: int) -> Iterator[range]:
    """Runs of at most so many things, of at most `total` together; a single one may be larger."""
    start, size = 0, 0
    for stop, of_one in enumerate(sizes):
        if stop > start and (stop - start == most or size + of_one > total):
            yield range(start, stop)
            start, size = stop, 0
        size += of_one
    if sizes:
        yield range(start, len(sizes))


def _items(example: Example) -> dict[str, tuple[Any, ...]]:
    assert example.media is not None
    return example.media.items


def copy_encoders(source: Decoder, target: Decoder, names: Collection[str]) -> None:
    """Give the encoders of `target` the weights and the statistics of those of `source`."""
    with torch.no_grad():
        for name in names:
            ours, theirs = (
                [*parts(model, name).encoder, *model.senses[name].buffers()]
                for model in (target, source)
            )
            for to, of in zip(ours, theirs, strict=True):
                to.copy_(of)


class Vocabulary(NamedTuple):
    """The token ids that occur in some examples, and what each is called among them."""

    size: int
    new: NDArray[np.int32]
    """By old id; 0 for one that does not occur."""

    @classmethod
    def of(cls, examples: Sequence[Example], *, placeholders: Sequence[int]) -> Self:
        """Placeholders get the ids behind all others, in this order."""
        found = np.unique(np.concatenate([example.tokens for example in examples]))
        text = np.setdiff1d(found, placeholders)
        new = np.zeros(max(int(found.max()), *placeholders) + 1, np.int32)
        new[text] = np.arange(len(text))
        new[list(placeholders)] = len(text) + np.arange(len(placeholders))
        return cls(len(text), new)


def _reader(
    shape: DenseConfig, stage: MediaStage, context: StageContext, examples: Sequence[Example]
) -> tuple[Decoder, list[Example]]:
    """A small decoder with the model's encoders, and the examples in its vocabulary.

    That is the ids that occur: a reader of a few million embeddings would learn little else.
    """
    model, seed = context.loaded.model, context.seed
    senses = [model.senses[name] for name in stage.learns]
    vocabulary = Vocabulary.of(examples, placeholders=[sense.token for sense in senses])
    generator = torch.Generator().manual_seed(stage_seed(seed, stage.name, "reader"))
    reader = build(shape.model_copy(update={"vocab_size": vocabulary.size}))
    reader = reader.initialise(generator).to(model.dtype)
    for sense in senses:
        config = sense.config.without_adapter()
        attach(reader, config, seed=stage_seed(seed, stage.name, config.name))
    copy_encoders(model, reader, stage.learns)
    return reader, [replace(example, tokens=vocabulary.new[example.tokens]) for example in examples]


def _measure_bands(model: Decoder, examples: Sequence[Example]) -> None:
    """Set the mel bands' mean and variance to those of the clips, unless a stage before has."""
    sense = model.senses[SPEECH]
    if not isinstance(sense, Hearing) or bool(sense.bands.global_mean.any()):
        return
    heard = [example.media.items.get(SPEECH, ()) for example in examples if example.media]
    sense.measure_bands([clip for clips in heard for clip in clips][:MEASURED_CLIPS])
