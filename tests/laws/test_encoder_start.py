"""Encoders by themselves: labels lie where the marks do, and what is thrown away leaves nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
from phikit.data.media.canvas import Mark
from phikit.data.media.marks import IGNORED, NOTHING, MarkedImage, mark_classes, marked
from phikit.models.decoder import Decoder
from phikit.train.encoders import (
    CTCObjective,
    MarksConfig,
    MarksObjective,
    meanings,
    reply_units,
)
from phikit.train.media import MediaSFTConfig
from phikit.train.optim import OptimConfig
from phikit.weights.surgery import parts, train_only

Image = pytest.importorskip("PIL.Image", reason="pip install phikit[media]")
SFT = MediaSFTConfig(examples_per_step=4, micro_examples=2)
OPTIM = OptimConfig(adam_lr=0.02)


@given(
    size=st.tuples(st.integers(20, 150), st.integers(20, 90)),
    box=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_patch_is_named_by_what_lies_at_its_centre(size, box):
    width, height = size
    left, right = sorted((box[0] * width, box[1] * width))
    top, bottom = sorted((box[2] * height, box[3] * height))
    picture = Image.new("RGB", size, (255, 255, 255))
    cut = load_image(picture, crop_size=28, patch_size=7, max_crops=100)
    mark = Mark("a", left, top, right, bottom)
    labels = marked(cut, [mark, Mark("unknown", 0, 0, 9, 9)], size=size, classes={"a": 1})
    scale = min(28 * cut.width_crops / width, 28 * cut.height_crops / height)
    stitched = labels.labels_MPP[1:].reshape(cut.height_crops, cut.width_crops, 4, 4)
    for row, column in np.ndindex(4 * cut.height_crops, 4 * cut.width_crops):
        x, y = 7 * (column + 0.5) / scale, 7 * (row + 0.5) / scale
        edges = np.array([x - left, right - x, y - top, bottom - y])
        if (np.abs(edges) > 1).all():  # the picture is scaled to whole pixels
            said = stitched[row // 4, column // 4, row % 4, column % 4]
            assert said == (1 if (edges > 0).all() else NOTHING)
    is_shrunk = cut.height_crops * cut.width_crops > 1
    assert (labels.labels_MPP[0] == IGNORED).all() == is_shrunk


def sights(model: Decoder) -> list[Example]:
    """Pictures of noise whose brighter patches are of class 1."""
    rows = []
    for seed in range(8):
        shown = image(seed)
        patches = shown.pixels_MCHW.reshape(2, 3, 4, 7, 4, 7).mean((1, 3, 5))
        labels = (patches > 0).astype(np.int64)
        named = MarkedImage(shown.pixels_MCHW, shown.mask_MPP, 1, 1, labels_MPP=labels)
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
    config = MarksConfig()
    return MarksObjective(
        model, sights(model), SFT, config, classes=classes, meanings_CD=said, seed=0
    )


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
