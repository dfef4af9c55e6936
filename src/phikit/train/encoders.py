"""Encoders learn by themselves, before a language model listens: their initialisation.

A reply of three words says little about a hundred patches or frames, so an encoder that starts from
nothing would learn slowly through a decoder. What is drawn or spoken is known in more detail:

- sight: which letter, shape or digit each patch shows, as classes (`data.media.marks`)
- hearing: which words were said and in what order, as connectionist temporal classification

Both put one linear layer on the encoder, which is thrown away. Phi-4-multimodal's encoders come
from such a start too: a SigLIP tower, and the encoder of a speech recogniser (arXiv 2503.01743,
section 2.2). Source of CTC: Graves et al., 2006.

The projector may learn beside: where the encoder names a class, it is to say the language model's
own embedding of that name (`meanings`). A picture of a word then comes to the model as letters, a
clip as words with blanks between, and much of what follows is copying. Neither needs the language
model to run.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from phikit.base.config import Config
from phikit.base.device import Rank
from phikit.base.errors import DataError
from phikit.base.media import SPEECH, VISION
from phikit.base.types import Batch, Example
from phikit.data.media.marks import IGNORED, NOTHING, MarkedImage
from phikit.models.decoder import Decoder
from phikit.models.senses import Hearing, Sight
from phikit.nn.vision import pool_patches
from phikit.train.media import MediaSFTConfig, MediaSFTObjective
from phikit.train.objective import LossOutput

BLANK = 0
"""The unit of frames that say nothing new."""


class MarksConfig(Config):
    """Sight: name what each patch shows."""

    kind: Literal["marks"] = "marks"
    balance: float = 0.5
    """A class weighs in by its count to the power of minus this: most patches show nothing at all,
    and a shape covers as many as a line of letters."""


class CTCConfig(Config):
    """Hearing: the reply's tokens in the order of the frames, blanks between them."""

    kind: Literal["ctc"] = "ctc"


class MarksObjective(MediaSFTObjective):
    """Cross-entropy of a linear layer on every patch's feature, whose images are `MarkedImage`s.

    Gives the model that layer, as the module `namer`, before its optimiser is made.

    Args:
        model: has sight.
        classes: how many, that of nothing included.
        meanings_CD: what the projector is to say for each class, float32 [classes, D], and at the
            ends of rows the last line, which is one more; None leaves the projector alone.

    Raises DataError if no image has a mark.
    """

    def __init__(
        self,
        model: Decoder,
        examples: Sequence[Example],
        config: MediaSFTConfig,
        marks: MarksConfig,
        *,
        classes: int,
        meanings_CD: Tensor | None = None,
        seed: int,
        rank: Rank = Rank(),
    ) -> None:
        if classes < 2:
            raise DataError(
                "no picture has marks, so there is nothing to name in them",
                fix="train on generated pictures, or start this encoder with pairs (contrastive)",
            )
        super().__init__(examples, config, seed=seed, rank=rank)
        sight = model.senses[VISION]
        assert isinstance(sight, Sight), "only sight has patches"
        self.meanings_CD = meanings_CD
        self.weights_C = _balanced(examples, classes=classes, power=marks.balance)
        _add_namer(model, sight.img_projection_up.in_features, classes, seed=seed)

    def weight(self, batch: Batch) -> float:
        labels = np.concatenate([image.labels_MPP.ravel() for image in _images(batch)])
        return float(self.weights_C[labels[labels != IGNORED]].sum())

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        images = _images(batch)
        labels_MPP = np.concatenate([image.labels_MPP for image in images])
        is_asked_M = (labels_MPP != IGNORED).any((1, 2))
        pixels = np.concatenate([image.pixels_MCHW for image in images])[is_asked_M]
        masks = np.concatenate([image.mask_MPP for image in images])[is_asked_M]
        namer, sight = model.namer, model.senses[VISION]
        assert isinstance(namer, nn.Linear) and isinstance(sight, Sight)
        device = namer.weight.device
        features_MTD = sight.patch_features(
            torch.from_numpy(pixels).to(device, namer.weight.dtype),
            torch.from_numpy(masks).to(device),
        )
        logits_MTC = namer(features_MTD)
        logits_SC = logits_MTC.flatten(0, 1)
        labels_S = torch.from_numpy(labels_MPP[is_asked_M]).to(device).flatten()
        weights = self.weights_C.to(device)
        total = F.cross_entropy(logits_SC, labels_S, weight=weights, reduction="sum")
        if self.meanings_CD is not None:
            total = total + _shown(sight, features_MTD, logits_MTC, self.meanings_CD)
        is_shown_S = labels_S != NOTHING
        right = (logits_SC.argmax(-1) == labels_S)[is_shown_S].float().mean().nan_to_num()
        return LossOutput(total, {"named": right * self.weight(batch)})


class CTCObjective(MediaSFTObjective):
    """Connectionist temporal classification of the replies' tokens by a linear layer on the frames.

    Gives the model that layer, as the module `namer`, before its optimiser is made. A clip too
    short for its reply, a frame a token and one more between equal ones, teaches nothing.

    Args:
        model: has hearing.
        units: a number from 1 for every token that occurs in a reply.
        meanings_CD: what the projectors are to say for the blank and for each unit, float32
            [1 + units, D]; None leaves them alone.

    Raises DataError unless every example has one clip.
    """

    def __init__(
        self,
        model: Decoder,
        examples: Sequence[Example],
        config: MediaSFTConfig,
        *,
        units: Mapping[int, int],
        meanings_CD: Tensor | None = None,
        seed: int,
        rank: Rank = Rank(),
    ) -> None:
        if any(len(example.media.clips if example.media else ()) != 1 for example in examples):
            raise DataError(
                "an example has no clip, or several: frames follow one reply",
                fix="start hearing on what is written down as it was said, such as spoken_digits",
            )
        super().__init__(examples, config, seed=seed, rank=rank)
        hearing = model.senses[SPEECH]
        assert isinstance(hearing, Hearing), "only hearing has frames"
        self.units, self.meanings_CD = units, meanings_CD
        _add_namer(model, hearing.up_proj_for_speech.in_features, len(units) + 1, seed=seed)

    def weight(self, batch: Batch) -> float:
        return float(sum(map(len, self._said(batch))))

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        namer, hearing = model.namer, model.senses[SPEECH]
        assert isinstance(namer, nn.Linear) and isinstance(hearing, Hearing)
        clips = [clip for media in batch.media or () if media for clip in media.clips]
        heard = hearing.listened(clips)
        log_probs_BSV = F.log_softmax(namer(pad_sequence(heard, batch_first=True)).float(), -1)
        said = self._said(batch)
        total = F.ctc_loss(
            log_probs_BSV.transpose(0, 1),
            torch.tensor([unit for units in said for unit in units]),
            torch.tensor([len(each) for each in heard]),
            torch.tensor([len(units) for units in said]),
            blank=BLANK,
            reduction="sum",
            zero_infinity=True,
        )
        if self.meanings_CD is not None:
            total = total + _spoken(hearing, heard, namer, self.meanings_CD)
        return LossOutput(total, {})

    def _said(self, batch: Batch) -> list[list[int]]:
        """The units of each row's reply, the end of the turn left out."""
        return [
            [self.units[token] for token in row[row >= 0].tolist()[:-1]]
            for row in batch.targets_BT.cpu()
        ]


def _shown(sight: Sight, features_MTD: Tensor, logits_MTC: Tensor, meanings_CD: Tensor) -> Tensor:
    """How far the projector is from saying what the patches of each token are named."""
    side = round(features_MTD.shape[1] ** 0.5) // 2
    names_MTD = logits_MTC.detach().softmax(-1) @ meanings_CD[:-1]
    features_SD, names_SD = (
        pool_patches(each, side=side).flatten(0, 2) for each in (features_MTD.detach(), names_MTD)
    )
    ends_SD = torch.cat([part.flatten(0, -2) for part in sight.separators])
    total = _distance(sight.project(features_SD), names_SD, meanings_CD)
    # Once for every crop, so that a sum over micro-batches is the sum over the step.
    ends = _distance(sight.project(ends_SD), meanings_CD[-1], meanings_CD)
    return total + len(features_MTD) * ends


def _spoken(
    hearing: Hearing, heard: Sequence[Tensor], namer: nn.Linear, meanings_CD: Tensor
) -> Tensor:
    """How far the projectors are from saying what each frame is named."""
    features_SD = torch.cat(list(heard)).detach()
    names_SD = namer(features_SD).softmax(-1).detach() @ meanings_CD
    modes: tuple[Literal["speech", "vision"], ...] = ("speech", "vision")
    said = [torch.cat(hearing.tell([features_SD], mode=mode)) for mode in modes]
    return torch.stack([_distance(each, names_SD, meanings_CD) for each in said]).sum()


def _distance(said_SD: Tensor, wanted_SD: Tensor, meanings_CD: Tensor) -> Tensor:
    """Squared, in units of the meanings' own size, summed over tokens."""
    return (said_SD - wanted_SD).square().mean(-1).sum() / meanings_CD.square().mean()


def meanings(model: Decoder, names: Sequence[Sequence[int]]) -> Tensor:
    """The language model's embeddings of names, float32 [names, D]; of many tokens their mean."""
    with torch.no_grad():
        made = [model.embed_text(torch.tensor([ids], device=model.device))[0] for ids in names]
        return torch.stack([each.float().mean(0) for each in made])


def reply_units(examples: Sequence[Example]) -> dict[int, int]:
    """A number from 1 for every token of the replies, their ends left out."""
    said = {int(token) for example in examples for token in example.tokens[example.loss_mask][:-1]}
    return {token: number for number, token in enumerate(sorted(said), start=1)}


def _balanced(examples: Sequence[Example], *, classes: int, power: float) -> Tensor:
    """Weights of the classes, whose mean over all patches is 1."""
    counts = np.zeros(classes, np.int64)
    for example in examples:
        for image in example.media.images if example.media else ():
            labels = image.labels_MPP[image.labels_MPP != IGNORED]
            counts += np.bincount(labels, minlength=classes)
    weights = np.maximum(counts, 1.0) ** -power
    return torch.tensor(weights * counts.sum() / (weights * counts).sum(), dtype=torch.float32)


def _images(batch: Batch) -> list[MarkedImage]:
    return [image for media in batch.media or () if media for image in media.images]


def _add_namer(model: Decoder, width: int, classes: int, *, seed: int) -> None:
    """Give the model its linear layer, whose draw disturbs no other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.namer = nn.Linear(width, classes).to(model.device)
