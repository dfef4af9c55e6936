"""Fine-tuning on rows with media: every row once an epoch, masks that a resumed run repeats."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tests.laws.training import train_in
from tests.modalities import MODALITIES, clip, example, image, taught

from phikit.base.device import Rank
from phikit.base.media import Media
from phikit.base.types import Batch, Example
from phikit.data.media.augment import SpecAugmentConfig
from phikit.data.pack import batch_rows
from phikit.models.decoder import Decoder
from phikit.models.senses import Hearing
from phikit.recipes.media import copy_encoders
from phikit.train.loop import LoopConfig
from phikit.train.media import MediaSFTConfig, MediaSFTObjective
from phikit.train.optim import OptimConfig
from phikit.weights.surgery import attach, parts, train_only

MASKED = SpecAugmentConfig(bands=2, max_bands=20, times=2, max_share=0.4)
OPTIM = OptimConfig(adam_lr=0.02)


def rows(model: Decoder, count: int = 10) -> list[Example]:
    media = (None, Media(clips=(clip(),)), Media(images=(image(),)))
    return [
        example(model, media[k % 3], length=48 + 4 * (k % 4), seed=k) for k in range(count)
    ]  # fmt: skip


def objective(model: Decoder, *, masked: bool = True, seed: int = 3, rank: Rank = Rank()):
    config = MediaSFTConfig(
        examples_per_step=4,
        micro_examples=2,
        bucket_steps=2,
        spec_augment=MASKED if masked else None,
    )
    return MediaSFTObjective(rows(model), config, seed=seed, rank=rank)


def clips(data) -> list[np.ndarray]:
    found = [media for batch in data.batches for media in batch.media or () if media]
    return [heard.features_TF for media in found for heard in media.clips]


def test_an_epoch_shows_every_row_once(tiny_model: Callable[..., Decoder]):
    made = objective(taught(tiny_model(), *MODALITIES[:2]))
    orders = []
    for epoch in range(2):
        steps = [made._chosen(3 * epoch + index).tolist() for index in range(3)]
        assert [len(step) for step in steps] == [4, 4, 2]
        assert sorted(i for step in steps for i in step) == [*range(10)]
        orders.append(steps)
    assert orders[0] != orders[1]


def test_ranks_share_a_step(tiny_model: Callable[..., Decoder]):
    model = taught(tiny_model(), *MODALITIES[:2])
    whole = objective(model).step_data(0).batches
    shares = [objective(model, rank=Rank(k, 2)).step_data(0).batches for k in range(2)]

    def seen(batches: Sequence[Batch]) -> list[list[int]]:
        """Rows without their padding."""
        rows = [row for batch in batches for row in batch.tokens_BT.tolist()]
        return sorted([token for token in row if token] for row in rows)

    assert all(shares)
    assert seen([*shares[0], *shares[1]]) == seen(whole)


def test_every_row_is_shown_as_often_as_there_are_epochs(tiny_model: Callable[..., Decoder]):
    """However few rows there are, and however many make a step."""
    model = taught(tiny_model(), *MODALITIES[:2])
    for count, size, epochs in ((10, 16, 5), (5, 4, 1), (17, 16, 3), (8, 4, 2)):
        config = MediaSFTConfig(examples_per_step=size, micro_examples=size)
        made = MediaSFTObjective(rows(model, count), config, seed=3)
        loop = LoopConfig(epochs=epochs, optim=OPTIM)
        chosen = [made._chosen(step) for step in range(loop.num_steps(made.steps_per_epoch))]
        assert np.bincount(np.concatenate(chosen)).tolist() == [epochs] * count


def test_rows_of_text_are_spared_the_backward_pass(tiny_model: Callable[..., Decoder]):
    """They make batches of their own, and what is learnt is what one batch of all would teach."""
    model = taught(tiny_model(), *MODALITIES[:2])
    learning = train_only(model, {"vision": ("adapter",), "speech": ("adapter",)})
    config = MediaSFTConfig(examples_per_step=10, micro_examples=10)
    made = MediaSFTObjective(rows(model), config, seed=3)
    gradients = []
    together = batch_rows([[row] for row in rows(model)])
    for batches in ([together], made.step_data(0).batches):
        model.zero_grad()
        totals = [made.loss(model, batch).total for batch in batches]
        assert [total.requires_grad for total in totals] == [b.media is not None for b in batches]
        for total in totals:
            if total.requires_grad:
                total.backward()
        gradients.append([p.grad.clone() for p in learning if p.grad is not None])
    assert len(gradients[0]) == len(learning) and len(made.step_data(0).batches) == 2
    for whole, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, apart, atol=1e-4, rtol=1e-4)


def test_masks_follow_from_seed_step_and_row(tiny_model: Callable[..., Decoder]):
    model = taught(tiny_model(), *MODALITIES[:2])
    for step in range(3):
        once, again = (clips(objective(model).step_data(step)) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    plain = [x for step in range(3) for x in clips(objective(model, masked=False).step_data(step))]
    masked = [x for step in range(3) for x in clips(objective(model).step_data(step))]
    later = [x for step in range(3, 6) for x in clips(objective(model).step_data(step))]
    assert {x.shape for x in plain} == {x.shape for x in masked}
    shown = [{x.tobytes() for x in of} for of in (plain, masked, later)]
    assert not shown[0] & shown[1] and not shown[1] & shown[2]  # hidden anew each time


def test_it_resumes_exactly(tiny_model: Callable[..., Decoder], tmp_path: Path):
    results = []
    for name, stops in (("unbroken", (5,)), ("broken", (2, 5))):
        for steps in stops:
            model = taught(tiny_model(), *MODALITIES[:2])
            train_only(model, {"speech": ("projector", "encoder"), "vision": ("adapter",)})
            train_in(tmp_path / name, model, objective(model), optim=OPTIM, steps=steps)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_encoder_moves_to_another_decoder(tiny_model: Callable[..., Decoder]):
    """With its statistics, and without its projector, which is of another width."""
    source, target = tiny_model(), tiny_model()
    for model, seed in ((source, 1), (target, 2)):
        for modality in MODALITIES[:2]:
            attach(model, modality, seed=seed)
    heard, moved = source.senses["speech"], target.senses["speech"]
    assert isinstance(heard, Hearing) and isinstance(moved, Hearing)
    heard.measure_bands([clip(seed=1), clip(seed=2)])
    before = [p.clone() for p in parts(target, "speech").projector]
    copy_encoders(source, target, ["speech"])
    for a, b in zip(parts(source, "speech").encoder, parts(target, "speech").encoder, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(heard.bands.global_mean, moved.bands.global_mean)
    for a, b in zip(before, parts(target, "speech").projector, strict=True):
        assert torch.equal(a, b)
    sights = (parts(model, "vision").encoder for model in (source, target))
    assert not all(torch.equal(a, b) for a, b in zip(*sights, strict=True))
