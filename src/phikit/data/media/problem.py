"""Problems with pictures and sounds, and the way from them to examples.

A problem is the ordinary one with media beside its question, so tasks, scorers and transcripts
take it as it is. Media are arrays here, or files and their bytes where they come from outside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phikit.base.errors import ChatError, ConfigError, DataError
from phikit.base.media import Media, MediaItem, of_items, word_of
from phikit.base.types import Example
from phikit.chat.tokenizer import Tokenizer
from phikit.chat.turns import Renderer
from phikit.data.media.canvas import Mark
from phikit.data.problem import Problem


class Stored(NamedTuple):
    """An item in a larger file, which is looked into when its problem is prepared."""

    name: str
    """What messages call it."""
    load: Callable[[], NDArray[Any] | Path | bytes]
    """Raises DataError or ChatError for what cannot be read."""


Source = NDArray[Any] | Path | bytes | Stored
"""A picture as uint8 [H, W, 3], a sound as float32 samples at 16 kHz, or a file of either."""


@dataclass(frozen=True, slots=True)
class MediaProblem(Problem):
    """A problem about what is seen or heard; the question marks where: `<|image_1|>`."""

    media: Mapping[str, tuple[Source, ...]] = field(default_factory=dict)
    """By the name of the modality, in order of appearance."""
    styles: tuple[str, ...] = ()
    """The fonts, voices and palettes it was made with."""
    marks: tuple[tuple[Mark, ...], ...] = ()
    """What is where in each picture, of pictures that were drawn."""


class Fault(NamedTuple):
    """An item that could not be read, and why."""

    item: str
    reason: str


class Prepared(NamedTuple):
    """What became of problems."""

    examples: list[Example]
    faults: list[Fault]
    problems: list[MediaProblem]
    """Those that the examples came from."""


def prepare(
    problems: Sequence[MediaProblem],
    renderer: Renderer,
    *,
    modalities: Mapping[str, Callable[[Any], MediaItem]],
    ids: Mapping[str, int],
    max_tokens: int | None = None,
    on_fault: Literal["stop", "skip"] = "stop",
    on_item: Callable[[], object] = lambda: None,
) -> Prepared:
    """Problems as examples, in order, with the loss on the answers alone.

    Args:
        renderer: of the model that is to learn.
        modalities: what makes an item of a source, by name (`ModalityConfig.prepare`).
        ids: the placeholder tokens (`Decoder.media_ids`).
        max_tokens: a longer example is as one whose item cannot be read; None for no limit.
        on_fault: what to do with an item that cannot be read: raise, or leave its problem out and
            list it among the faults.
        on_item: called after each problem, for a progress bar.

    Raises:
        DataError: an item cannot be read, or its problem cannot be rendered; names the item.
        ConfigError: there is an item of a modality that is not among these.
        MissingExtraError: the package that reads an item is not installed.
    """
    examples: list[Example] = []
    faults: list[Fault] = []
    read: list[MediaProblem] = []
    for problem in problems:
        name = name_of(problem)
        try:
            example = _example(problem, renderer, modalities, ids)
            if max_tokens is not None and len(example) > max_tokens:
                raise DataError(
                    f"{len(example)} tokens with what it shows, and the model takes {max_tokens}",
                    fix="make the item smaller",
                )
            examples.append(example)
            read.append(problem)
        except (ChatError, DataError) as error:
            if on_fault == "stop":
                fix = error.fix or "repair the item"
                raise DataError(
                    f"{name}: {error.what}", fix=f'{fix}, or skip such items (on_fault="skip")'
                ) from error
            faults.append(Fault(name, error.what))
        on_item()
    return Prepared(examples, faults, read)


def media_of(
    problem: MediaProblem, modalities: Mapping[str, Callable[[Any], MediaItem]]
) -> Media | None:
    """The items of a problem.

    Raises ConfigError for a modality that is not among these, and ChatError or DataError for what
    cannot be read.
    """
    unknown = [name for name in problem.media if name not in modalities]
    if unknown:
        raise ConfigError(
            f"there is {word_of(unknown[0])} to a model without the modality {unknown[0]!r}",
            fix="attach it (weights.surgery.attach), or leave such problems out",
        )
    items = {
        name: tuple(
            modalities[name](source.load() if isinstance(source, Stored) else source)
            for source in sources
        )
        for name, sources in problem.media.items()
    }
    return of_items(items) if any(items.values()) else None


def _example(
    problem: MediaProblem,
    renderer: Renderer,
    modalities: Mapping[str, Callable[[Any], MediaItem]],
    ids: Mapping[str, int],
) -> Example:
    media = media_of(problem, modalities)
    tokens = media and media.tokens._replace(ids=ids)
    return replace(renderer.example(problem.messages(), media=tokens), media=media)


def spelt(example: Example, problem: MediaProblem, tokenizer: Tokenizer) -> Example:
    """A reply that the pictures show letter by letter is learnt letter by letter.

    The same text in other tokens: what is to be copied then lies there as it is to be written.
    """
    shown = {mark.name for marks in problem.marks for mark in marks}
    letters = [id_ for letter in problem.answer for id_ in tokenizer.encode(letter)]
    is_shown = shown.issuperset(problem.answer) and tokenizer.decode(letters) == problem.answer
    if not is_shown or problem.thinking is not None:
        return example
    reply = int(example.loss_mask.argmax())
    whole = tokenizer.encode(problem.answer)
    rest = reply + len(whole)
    assert example.tokens[reply:rest].tolist() == whole, "a reply begins with its text"
    tokens = np.concatenate([example.tokens[:reply], letters, example.tokens[rest:]])
    loss_mask = np.concatenate(
        [example.loss_mask[:reply], np.ones(len(letters), np.bool_), example.loss_mask[rest:]]
    )
    return replace(example, tokens=tokens.astype(example.tokens.dtype), loss_mask=loss_mask)


def name_of(problem: MediaProblem) -> str:
    """What to call a problem in messages: its files if it has any, else its number."""
    sources = [source for of in problem.media.values() for source in of]
    files = [str(source) for source in sources if isinstance(source, Path)]
    files += [source.name for source in sources if isinstance(source, Stored)]
    where = problem.provenance
    return ", ".join(files) or f"{where.source}, item {where.index}"


def length_buckets(
    lengths: Sequence[int], *, size: int, window: int, seed: int
) -> list[NDArray[np.int64]]:
    """Batches of `size` items of similar length, in random order.

    Items are shuffled, sorted by length within windows of that many batches, and cut. So padding
    is a small part of a batch, and which items meet still changes with the seed. The last batch may
    be smaller.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(lengths))
    span = size * window
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), span):
        part = order[start : start + span]
        part = part[np.argsort([lengths[i] for i in part], kind="stable")]
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    full = [batch for batch in batches if len(batch) == size]
    rest = [batch for batch in batches if len(batch) < size]
    return [full[i] for i in random.permutation(len(full))] + rest
