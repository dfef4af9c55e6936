"""Encoders learn by themselves, before a language model listens: their initialisation.

A reply of three words says little about a hundred tokens or frames, so an encoder that starts from
nothing would learn slowly through a decoder. What is drawn or spoken is known in more detail:

- sight: which letters, shapes and digits there are, and about where (`data.media.marks`)
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
from phikit.data.media.marks import NOTHING, MarkedImage
from phikit.models.decoder import Decoder
from phikit.models.senses import Hearing, Sight
from phikit.nn.vision import stitch
from phikit.train.media import MediaSFTConfig, MediaSFTObjective
from phikit.train.objective import LossOutput

BLANK = 0
"""The unit of frames that say nothing new."""
NEVER = -1e4
"""Log-probability of what cannot be; minus infinity has no gradient."""


class MarksConfig(Config):
    """Sight: every mark named once, in the order in which they are read."""

    kind: Literal["marks"] = "marks"


class CTCConfig(Config):
    """Hearing: the reply's tokens in the order of the frames, blanks between them."""

    kind: Literal["ctc"] = "ctc"


class MarksObjective(MediaSFTObjective):
    """A linear layer on every token's feature names the marks of pictures (`MarkedImage`).

    The loss is minus the logarithm of the probability that the tokens, read row by row, name all
    marks in their order, each once and by a token of its places, and that all others name nothing;
    summed over the choices of tokens as in CTC, but without its repetitions: whoever reads the
    tokens later could not tell a repeated name from a doubled letter.

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
        assert isinstance(sight, Sight), "only sight has such tokens"
        self.meanings_CD = meanings_CD
        self._seen: dict[MarkedImage, Tensor] = {}
        _add_namer(model, sight.img_projection_up, classes, seed=seed)

    def weight(self, batch: Batch) -> float:
        """Marks, and one more for every picture, which may have none."""
        return float(sum(1 + len(image.classes_U) for image in _images(batch)))

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        images = _images(batch)
        namer, sight = model.namer, model.senses[VISION]
        assert isinstance(namer, nn.Linear) and isinstance(sight, Sight)
        device = namer.weight.device
        features_MQQD = self._features(sight, images)
        log_probs_MQQC = F.log_softmax(namer(features_MQQD).float(), -1)
        crops = [len(image.pixels_MCHW) - 1 for image in images]
        log_probs = [
            stitch(of_image, width_crops=image.width_crops).flatten(0, 1)
            for of_image, image in zip(log_probs_MQQC.split(crops), images, strict=True)
        ]
        total = -in_order(
            log_probs,
            [torch.from_numpy(image.classes_U).to(device) for image in images],
            [torch.from_numpy(image.places_UT).to(device) for image in images],
        ).sum()
        if self.meanings_CD is not None:
            names_SD = log_probs_MQQC.detach().flatten(0, 2).exp() @ self.meanings_CD[:-1]
            said_SD = sight.project(features_MQQD.detach().flatten(0, 2))
            ends_SD = sight.project(torch.cat([end.flatten(0, -2) for end in sight.separators]))
            total = total + _distance(said_SD, names_SD, self.meanings_CD)
            # Once for every crop, so that a sum over micro-batches is the sum over the step.
            total = total + len(features_MQQD) * _distance(
                ends_SD, self.meanings_CD[-1], self.meanings_CD
            )
        read = sum(
            _named(of_image) == image.classes_U.tolist()
            for of_image, image in zip(log_probs, images, strict=True)
        )
        return LossOutput(
            total, {"read": total.new_tensor(read / len(images) * self.weight(batch))}
        )

    def _features(self, sight: Sight, images: Sequence[MarkedImage]) -> Tensor:
        """Of all crops but the first, which shows the whole picture, shrunk; [M, Q, Q, D].

        A tower that does not learn sees every picture once.
        """
        if any(parameter.requires_grad for parameter in sight.img_processor.parameters()):
            return _looked_at(sight, images)
        new = [image for image in images if image not in self._seen]
        if new:
            with torch.no_grad():
                features_MQQD = _looked_at(sight, new)
            crops = [len(image.pixels_MCHW) - 1 for image in new]
            self._seen |= dict(zip(new, features_MQQD.split(crops), strict=True))
        return torch.cat([self._seen[image] for image in images])


def _looked_at(sight: Sight, images: Sequence[MarkedImage]) -> Tensor:
    weight = sight.img_projection_up.weight
    pixels = np.concatenate([image.pixels_MCHW[1:] for image in images])
    masks = np.concatenate([image.mask_MPP[1:] for image in images])
    return sight.crop_features(
        torch.from_numpy(pixels).to(weight), torch.from_numpy(masks).to(weight.device)
    )


def in_order(
    log_probs: Sequence[Tensor], classes: Sequence[Tensor], places: Sequence[Tensor]
) -> Tensor:
    """Logarithm of the probability that tokens name classes in order, each once, [B].

    The forward recursion of CTC without its repetitions, in float32.

    Args:
        log_probs: of each picture the names' log-probabilities by token, [T, C].
        classes: of each picture what is to be named, [U], none of them `NOTHING`.
        places: which tokens may name each, bool [U, T].
    """
    device = log_probs[0].device
    lengths = torch.tensor([len(each) for each in classes], device=device)
    nothing_BT = pad_sequence([each[:, NOTHING].float() for each in log_probs], batch_first=True)
    tokens, most = nothing_BT.shape[1], max(1, int(lengths.max()))
    named = []
    for log_probs_TC, classes_U, places_UT in zip(log_probs, classes, places, strict=True):
        of_classes_TU = log_probs_TC[:, classes_U].float().where(places_UT.T, NEVER)
        missing = (0, most - len(classes_U), 0, tokens - len(log_probs_TC))
        named.append(F.pad(of_classes_TU, missing, value=NEVER))
    named_BTU = torch.stack(named)
    forward_BU = F.pad(torch.zeros_like(nothing_BT[:, :1]), (0, most), value=NEVER)
    for token in range(tokens):
        waited_BU = forward_BU + nothing_BT[:, token, None]
        went_BU = F.pad(forward_BU[:, :-1] + named_BTU[:, token], (1, 0), value=NEVER)
        forward_BU = torch.logaddexp(waited_BU, went_BU)
    return forward_BU.gather(1, lengths[:, None])[:, 0]


def _named(log_probs_TC: Tensor) -> list[int]:
    """The most probable name of each token, those of nothing left out."""
    return [name for name in log_probs_TC.argmax(-1).tolist() if name != NOTHING]


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
        _add_namer(model, hearing.up_proj_for_speech, len(units) + 1, seed=seed)

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
            of_frames = zip(log_probs_BSV.detach(), heard, strict=True)
            log_probs_SV = torch.cat([each[: len(frames)] for each, frames in of_frames])
            names_SD = log_probs_SV.exp() @ self.meanings_CD
            total = total + _spoken(hearing, heard, names_SD, self.meanings_CD)
        return LossOutput(total, {})

    def _said(self, batch: Batch) -> list[list[int]]:
        """The units of each row's reply, the end of the turn left out."""
        return [
            [self.units[token] for token in row[row >= 0].tolist()[:-1]]
            for row in batch.targets_BT.cpu()
        ]


def _spoken(
    hearing: Hearing, heard: Sequence[Tensor], names_SD: Tensor, meanings_CD: Tensor
) -> Tensor:
    """How far the projectors are from saying what each frame is named."""
    features_SD = torch.cat(list(heard)).detach()
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


def _images(batch: Batch) -> list[MarkedImage]:
    return [image for media in batch.media or () if media for image in media.images]


def _add_namer(model: Decoder, beside: nn.Linear, classes: int, *, seed: int) -> None:
    """Give the model a linear layer on what `beside` takes, whose draw disturbs no other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.namer = nn.Linear(beside.in_features, classes).to(beside.weight)
