"""Encoders by themselves: labels lie where the marks do, and what is thrown away leaves nothing."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.laws.training import metrics_of, train_in
from tests.modalities import MODALITIES, clip, example, image, taught

from phikit.base.errors import DataError
from phikit.base.media import Media
from phikit.base.types import Example
from phikit.chat.image import load_image
from phikit.data.media import canvas
from phikit.data.media.canvas import Mark
from phikit.data.media.marks import MarkedImage, mark_classes, marked
from phikit.models.decoder import Decoder
from phikit.models.senses import Sight
from phikit.recipes.see_and_hear import vision
from phikit.train.encoders import (
    CTCObjective,
    MarksObjective,
    in_order,
    meanings,
    reply_units,
)
from phikit.train.media import MediaSFTConfig
from phikit.train.optim import OptimConfig
from phikit.weights.surgery import Part, parts, train_only

Image = pytest.importorskip("PIL.Image", reason="pip install phikit[media]")
SFT = MediaSFTConfig(examples_per_step=4, micro_examples=2)
OPTIM = OptimConfig(adam_lr=0.005)


@given(
    size=st.tuples(st.integers(20, 150), st.integers(20, 90)),
    boxes=st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=6),
)
def test_marks_are_named_where_they_lie(size, boxes):
    width, height = size
    marks = [
        Mark("a", *(low * width, top * height, high * width, bottom * height))
        for x, y, to_x, to_y in boxes
        for (low, high), (top, bottom) in [(sorted((x, to_x)), sorted((y, to_y)))]
    ]
    cut = load_image(
        Image.new("RGB", size, (255, 255, 255)), crop_size=28, patch_size=7, max_crops=100
    )
    named = marked(cut, [*marks, Mark("unknown", 0, 0, 9, 9)], size=size, classes={"a": 1})
    scale = min(28 * cut.width_crops / width, 28 * cut.height_crops / height)
    across = 2 * cut.width_crops
    assert len(named.classes_U) <= len(marks) and (named.classes_U == 1).all()
    middles = [scale * (mark.left + mark.right) / 28 for mark in marks]
    free = 0
    for places in named.places_UT:  # each can be named by a token of its own, in order
        open_to = np.flatnonzero(places)
        rows, columns = np.divmod(open_to, across)
        assert any(
            rows.min() - 0.4 <= scale * (mark.top + mark.bottom) / 28 <= rows.max() + 1.4
            and columns.min() <= scale * mark.right / 14 + 1
            and columns.max() + 1 >= scale * mark.left / 14 - 1
            for mark in marks
        )
        if len(named.classes_U) == len(marks):
            start, stop = columns.min(), columns.max() + 1
            assert any(start - 0.1 <= middle <= stop + 0.1 for middle in middles)
        assert (open_to >= free).any()
        free = open_to[open_to >= free].min() + 1


def test_a_word_is_named_letter_by_letter():
    """In the order of reading, line by line, also letters of which two lie in one token."""
    style = canvas.draw_style(np.random.default_rng(3), "train")
    drawn = canvas.words(["Billet", "480"], style, np.random.default_rng(0))
    size = (drawn.picture.shape[1], drawn.picture.shape[0])
    classes = mark_classes([drawn.marks])
    shown = marked(vision().prepare(drawn.picture), drawn.marks, size=size, classes=classes)
    names = {number: name for name, number in classes.items()}
    assert "".join(names[label] for label in shown.classes_U) == "Billet480"


@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 6), marks=st.integers(0, 3))
def test_the_probability_of_names_is_that_of_all_ways_to_say_them(seed, tokens, marks):
    random = np.random.default_rng(seed)
    pictures, wanted = [], []
    for picture in range(2):  # of different lengths, so that one is padded
        count, asked = tokens + picture, min(marks, tokens)
        log_probs = torch.tensor(random.normal(size=(count, 4))).log_softmax(-1)
        classes = random.integers(1, 4, size=asked)
        may = random.random((asked, count)) < 0.6
        total = 0.0
        for places in combinations(range(count), asked):
            if may[range(asked), places].all():
                said = np.zeros(count, np.int64)
                said[list(places)] = classes
                total += float(log_probs[torch.arange(count), torch.tensor(said)].sum().exp())
        pictures.append((log_probs, torch.tensor(classes), torch.tensor(may)))
        wanted.append(total)
    found = in_order(*([*each] for each in zip(*pictures, strict=True))).exp()
    assert found.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-8)


def sights(model: Decoder) -> list[Example]:
    """Pictures of noise with one or two brighter tokens."""
    rows = []
    for seed in range(8):
        shown, random = image(seed), np.random.default_rng(seed)
        places = np.sort(random.choice(4, size=1 + seed % 2, replace=False))
        light = np.zeros(4, np.float32)
        light[places] = 1
        spread = light.reshape(2, 2).repeat(14, axis=0).repeat(14, axis=1)
        named = MarkedImage(
            shown.pixels_MCHW + spread,
            shown.mask_MPP,
            1,
            1,
            classes_U=np.ones(len(places), np.int64),
            places_UT=np.eye(4, dtype=np.bool_)[places],
        )
        rows.append(example(model, Media(images=(named,)), seed=seed))
    return rows


def sounds(model: Decoder) -> list[Example]:
    """Clips long enough for their replies, of eight tokens."""
    rows = []
    for seed in range(8):
        row = example(model, Media(clips=(clip(160, seed),)), length=36, seed=seed)
        mask = np.arange(len(row)) >= len(row) - 9
        rows.append(replace(row, loss_mask=mask))
    return rows


def marks_objective(model: Decoder, *, classes: int = 2, speaks: bool = False) -> MarksObjective:
    said = meanings(model, [[7], [8, 9], [10]]) if speaks else None
    return MarksObjective(model, sights(model), SFT, classes=classes, meanings_CD=said, seed=0)


def ctc_objective(model: Decoder, *, speaks: bool = False) -> CTCObjective:
    rows = sounds(model)
    units = reply_units(rows)
    said = meanings(model, [[7], *([token] for token in units)]) if speaks else None
    return CTCObjective(model, rows, SFT, units=units, meanings_CD=said, seed=0)


KINDS = {"vision": marks_objective, "speech": ctc_objective}


@pytest.mark.parametrize("name", KINDS)
def test_it_learns_and_resumes_exactly(name, tiny_model: Callable[..., Decoder], tmp_path: Path):
    results = []
    for run, stops in (("unbroken", (12,)), ("broken", (5, 12))):
        for steps in stops:
            model = taught(tiny_model(), *MODALITIES[:2])
            learnt = train_only(model, {name: ("encoder", "projector")})
            objective = KINDS[name](model, speaks=True)
            train_in(tmp_path / run, model, objective, optim=OPTIM, steps=steps)
        results.append([parameter.detach().clone() for parameter in learnt])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    losses = [line["loss"] for line in metrics_of(tmp_path / "unbroken")]
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_change_nothing(name, tiny_model: Callable[..., Decoder]):
    """Sums over the rows of a step, divided once by the sum of their weights."""
    model = taught(tiny_model(), *MODALITIES[:2])
    objective = KINDS[name](model, speaks=True)
    model.eval()
    batches = objective.step_data(0).batches
    assert len(batches) == 2
    loss = sum(float(objective.loss(model, batch).total.detach()) for batch in batches)
    objective.config = SFT.model_copy(update={"micro_examples": 4})
    [batch] = objective.step_data(0).batches
    assert objective.weight(batch) == pytest.approx(sum(map(objective.weight, batches)))
    assert float(objective.loss(model, batch).total.detach()) == pytest.approx(loss, rel=1e-5)


def test_a_tower_that_does_not_learn_sees_a_picture_once(
    tiny_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
):
    losses, looks = [], []
    stages: tuple[tuple[Part, ...], ...] = (("encoder", "projector"), ("projector",))
    for learnt in stages:
        model = taught(tiny_model(), *MODALITIES[:2])
        train_only(model, {"vision": learnt})
        objective = marks_objective(model, speaks=True)
        sight = model.senses["vision"]
        assert isinstance(sight, Sight)
        looked = Mock(wraps=sight.crop_features)
        monkeypatch.setattr(sight, "crop_features", looked)
        batch = objective.step_data(0).batches[0]
        losses += [float(objective.loss(model, batch).total.detach()) for _ in range(2)]
        looks.append(looked.call_count)
    assert looks == [2, 1] and len(set(losses)) == 1


@pytest.mark.parametrize("name", KINDS)
def test_what_the_projector_learns_is_no_matter_to_the_encoder(
    name, tiny_model: Callable[..., Decoder]
):
    gradients = []
    for speaks in (False, True):
        model = taught(tiny_model(), *MODALITIES[:2])
        train_only(model, {name: ("encoder", "projector")})
        objective = KINDS[name](model, speaks=speaks)
        [first, _] = objective.step_data(0).batches
        objective.loss(model, first).total.backward()
        of = parts(model, name)
        gradients.append([p.grad for p in of.encoder if p.grad is not None])
        reached = [p for p in of.projector if p.grad is not None and bool(p.grad.any())]
        assert len(reached) == (len(of.projector) if speaks else 0)
    assert gradients[0] and all(map(torch.equal, *gradients))


def test_meanings_are_the_embeddings_of_names(tiny_model: Callable[..., Decoder]):
    model = tiny_model()
    table = model.model.embed_tokens.weight
    said = meanings(model, [[3], [4, 6]])
    torch.testing.assert_close(said, torch.stack([table[3], (table[4] + table[6]) / 2]))


def test_ctc_sums_over_all_ways_to_say_it(tiny_model: Callable[..., Decoder]):
    """Beside the definition: every path of the frames that collapses to the reply."""
    model = taught(tiny_model(), *MODALITIES[:2])
    row = example(model, Media(clips=(clip(24, 5),)), length=20, seed=1)
    row = replace(row, loss_mask=np.arange(len(row)) >= len(row) - 3)
    units = reply_units([row])
    objective = CTCObjective(model, [row], SFT, units=units, seed=0)
    model.eval()
    [batch] = objective.step_data(0).batches
    loss = float(objective.loss(model, batch).total.detach())
    [heard] = model.senses["speech"].listened([clip(24, 5)])  # pyright: ignore
    log_probs = F.log_softmax(model.namer(heard), -1).detach()  # pyright: ignore
    wanted = [units[int(token)] for token in row.tokens[-3:-1]]
    total = 0.0
    for path in np.ndindex(*[log_probs.shape[1]] * len(heard)):
        said = [u for k, u in enumerate(path) if u and (k == 0 or path[k - 1] != u)]
        if said == wanted:
            total += float(log_probs[range(len(heard)), list(path)].sum().exp())
    assert loss == pytest.approx(-np.log(total), rel=1e-4)


def test_pictures_without_marks_are_refused(tiny_model: Callable[..., Decoder]):
    model = taught(tiny_model(), *MODALITIES[:2])
    with pytest.raises(DataError, match="no picture has marks"):
        marks_objective(model, classes=1)


def test_replies_without_a_clip_are_refused(tiny_model: Callable[..., Decoder]):
    model = taught(tiny_model(), *MODALITIES[:2])
    rows = [*sounds(model), *sights(model)]
    with pytest.raises(DataError, match="no clip, or several"):
        CTCObjective(model, rows, SFT, units=reply_units(rows), seed=0)


def test_classes_are_numbered_by_name():
    marks = [[Mark("b", 0, 0, 1, 1)], [Mark("a", 0, 0, 1, 1), Mark("b", 0, 0, 2, 2)]]
    assert mark_classes(marks) == {"a": 1, "b": 2}
