"""What a stage trains changes that alone: not the text, not the other modality, bit for bit."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.laws.training import train_in
from tests.modalities import MODALITIES, ROWS, clip, example, image, taught
from torch import Tensor

from phikit.base.errors import DataError
from phikit.base.media import Media, joined
from phikit.base.types import IGNORE
from phikit.data.pack import batch_rows, pack, split_long
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.decoder import Decoder
from phikit.train.lm import LMConfig, LMObjective
from phikit.train.objective import Objective
from phikit.train.optim import OptimConfig
from phikit.train.sft import SFTConfig, SFTObjective
from phikit.weights.surgery import Part, parts, train_only

OPTIM = OptimConfig(adam_lr=0.02, weight_decay=0.1)
STAGES: dict[str, dict[str, tuple[Part, ...]]] = {
    "vision 1": {"vision": ("projector",)},
    "vision 2": {"vision": ("projector", "encoder")},
    "vision 3": {"vision": ("projector", "encoder", "adapter")},
    "vision 4": {"vision": ("projector", "adapter")},
    "speech 1": {"speech": ("projector", "encoder")},
    "speech 2": {"speech": ("projector", "adapter")},
    "joint": {"vision": ("projector", "encoder", "adapter"), "speech": ("beside",)},
}
"""Those of Phi-4-multimodal."""


@pytest.fixture
def model(tiny_model: Callable[..., Decoder]) -> Decoder:
    return taught(tiny_model(), *MODALITIES[:2])


def sft(model: Decoder, kinds: Sequence[str], *, micro: int = 6) -> Objective:
    rows = [example(model, ROWS[kind], seed=s) for s, kind in enumerate((*kinds, *kinds))]
    return SFTObjective(rows, SFTConfig(examples_per_step=6, micro_examples=micro), seed=3)


def lm(model: Decoder, kinds: Sequence[str]) -> Objective:
    rows = [example(model, ROWS[kind], seed=s) for s, kind in enumerate((*kinds, *kinds))]
    return LMObjective(rows, LMConfig(row_tokens=100, rows_per_step=4, micro_rows=4), seed=3)


def mixed_logits(model: Decoder) -> Tensor:
    """Of a batch that has a row of every kind but the sensor."""
    batch = [row for row in ROWS.items() if row[0] != "sensor"]
    rows = [example(model, media, seed=seed) for seed, (_, media) in enumerate(batch)]
    tokens_BT = torch.stack([torch.from_numpy(row.tokens).long() for row in rows])
    with torch.no_grad():
        return model(tokens_BT, media=[media for _, media in batch])


def said(model: Decoder) -> list[tuple[list[int], list[float]]]:
    rows = [example(model, ROWS[kind], seed=8) for kind in ("text", "vision", "speech")]
    asked = [Request(row.tokens.tolist(), 8, temperature=0.0, media=row.media) for row in rows]
    return [(c.tokens, c.log_probs) for [c] in Engine(model).generate(asked)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_changes_what_it_trains_alone(model: Decoder, stage: str, tmp_path: Path):
    """On batches that mix all kinds; the rows that stay as they are follow from what learns."""
    learning = STAGES[stage]
    before, talk = mixed_logits(model), said(model)
    state = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainable = {id(parameter) for parameter in train_only(model, learning)}
    objective = sft(model, ["text", "speech", "vision", "both"])
    train_in(tmp_path, model, objective, optim=OPTIM, steps=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]) == (id(parameter) not in trainable), name
    after, talk_after = mixed_logits(model), said(model)
    text, speech, vision, both, again = range(5)
    same = {text, again}
    if "vision" not in learning:
        same |= {vision}
        if stage == "speech 2":  # the encoder rests, and the projector beside images is another
            same |= {both}
    if "speech" not in learning or stage == "joint":
        same |= {speech}
    assert {row for row in range(5) if torch.equal(after[row], before[row])} == same
    assert [a == b for a, b in zip(talk, talk_after, strict=True)] == [
        True, vision in same, speech in same,
    ]  # fmt: skip


def test_gradients_reach_what_the_stage_trains_alone(model: Decoder):
    batch = batch_rows([[example(model, media, seed=1)] for media in list(ROWS.values())[:4]])
    for learning in STAGES.values():
        trainable = {id(parameter) for parameter in train_only(model, learning)}
        model.zero_grad()
        total, _ = sft(model, ["text", "speech"]).loss(model, batch)
        total.backward()
        for name, parameter in model.named_parameters():
            assert id(parameter) in trainable or parameter.grad is None, name
        for modality, chosen in learning.items():
            for part in chosen:
                gradients = [p.grad for p in getattr(parts(model, modality), part)]
                assert any(g is not None and bool(g.any()) for g in gradients), (modality, part)


def test_the_loss_is_on_text_alone(model: Decoder):
    kinds = ("text", "speech", "vision", "both")
    rows = [[example(model, ROWS[kind], seed=1)] for kind in kinds]
    batch = batch_rows(rows)
    tokens = {sense.token for sense in model.senses.values()}
    targets = batch.targets_BT[batch.targets_BT != IGNORE].tolist()
    assert targets and tokens.isdisjoint(targets)
    assert tokens <= {*batch.tokens_BT.flatten().tolist()}
    assert batch.media is not None and batch.media[1] is not None
    assert batch_rows([rows[0]]).media is None


@pytest.mark.parametrize("kind", ["sft", "lm"])
def test_split_into_micro_batches_it_learns_the_same(tiny_model, tmp_path: Path, kind: str):
    """Rows of text alone among them; resumed it goes on as if nothing had happened."""
    kinds = ["text", "speech", "vision", "both", "text again"]
    results = []
    for name, micro in (("whole", 6), ("split", 1)):
        model = taught(tiny_model(), *MODALITIES[:2])
        train_only(model, {"vision": ("projector", "adapter"), "speech": ("projector", "adapter")})
        objective = sft(model, kinds, micro=micro) if kind == "sft" else lm(model, kinds)
        train_in(tmp_path / name, model, objective, optim=OptimConfig(adam_lr=1e-3), steps=2)
        results.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(whole, split, atol=2e-4, rtol=0)


def test_a_stage_resumes_exactly(tiny_model, tmp_path: Path):
    results = []
    for name, stops in (("unbroken", (4,)), ("broken", (2, 4))):
        for steps in stops:
            model = taught(tiny_model(), *MODALITIES[:2])
            train_only(model, STAGES["joint"])
            objective = sft(model, ["text", "speech", "vision", "both"])
            train_in(tmp_path / name, model, objective, optim=OPTIM, steps=steps)
        results.append(mixed_logits(model))
    assert torch.equal(*results)


def test_only_alike_documents_share_a_row(model: Decoder):
    """A packed row runs on one adapter, and its media are those of its documents in order."""
    shown = [Media(images=(image(seed),)) for seed in (1, 2)]
    media = [None, *shown, Media(clips=(clip(),)), None]
    documents = [example(model, each, seed=seed) for seed, each in enumerate(media)]
    rows = pack(documents, length=110)
    assert sorted(len(row) for row in rows) == [1, 2, 2]
    for row in rows:
        assert len({tuple(e.media.items) if e.media else () for e in row}) == 1
    batch = batch_rows(rows, length=110)
    assert batch.documents_BT is not None and batch.media is not None
    model.eval()
    with torch.no_grad():
        nll = float(lm(model, ["text"]).loss(model, batch).total)
        alone = [
            float(lm(model, ["text"]).loss(model, batch_rows([[each]], length=110)).total)
            for each in documents
        ]
    assert abs(nll - sum(alone)) < 1e-3
    with pytest.raises(DataError, match="example 1 has media and 48 tokens; a row holds 40"):
        split_long(documents, 40)
    assert len(split_long([documents[0]], 40)) == 2


def test_joined_media_keep_their_order():
    first, second = Media(images=(image(1),)), Media((image(2),), (clip(),))
    together = joined([first, None, second])
    assert together is not None
    assert together.images == (*first.images, *second.images) and together.clips == second.clips
    assert joined([None, Media()]) is None
    assert together.digest() != joined([second, first]).digest()  # pyright: ignore
    assert together.digest() == joined([first, second]).digest()  # pyright: ignore
