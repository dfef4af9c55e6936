"""What becomes of items that cannot be read, and the reader's vocabulary."""

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tests.modalities import SEES

from phikit.base.errors import DataError
from phikit.base.progress import Progress
from phikit.base.types import Example
from phikit.chat.render import renderer_for
from phikit.chat.tokenizer import Tokenizer
from phikit.data.media.layouts import read_layout
from phikit.data.problem import Problem
from phikit.data.source import MediaFileSource
from phikit.evals.senses import sense_scorer
from phikit.models.dense import DenseConfig, DenseModel
from phikit.models.modality import AdapterConfig
from phikit.models.senses import VisionModality
from phikit.recipes.config import MediaStage
from phikit.recipes.context import StageContext
from phikit.recipes.media import FAULTS, Vocabulary, pieces, prepare_media
from phikit.train.contrastive import ContrastiveConfig, ContrastiveObjective
from phikit.train.loop import LoopConfig
from phikit.train.media import MediaSFTConfig
from phikit.train.optim import OptimConfig
from phikit.weights.load import Loaded

Image = pytest.importorskip("PIL.Image", reason="pip install phikit[media]")
SHAPE = DenseConfig(
    vocab_size=400,
    d_model=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    d_mlp=32,
    max_context=256,
)


@pytest.fixture
def source(tmp_path: Path) -> MediaFileSource:
    """Two pictures that can be read among five that cannot."""
    for name in ("good.png", "better.png"):
        Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / name)
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "bomb.png").write_bytes(_of_size(whole, 20_000))
    Image.new("RGB", (20_000, 1)).save(tmp_path / "thin.png")
    names = ["good", "damaged", "empty", "bomb", "thin", "missing", "better"]
    turns = [{"from": "human", "value": "<image>What colour?"}, {"from": "gpt", "value": "red"}]
    rows = [{"image": f"{name}.png", "conversations": turns} for name in names]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return MediaFileSource(layout="llava", path=str(tmp_path / "data.json"))


@pytest.fixture
def context(tmp_path: Path, nano_tokenizer: Tokenizer, source: MediaFileSource):
    shape = SHAPE.model_copy(update={"vocab_size": nano_tokenizer.size})
    modality = VisionModality(encoder=SEES, adapter=AdapterConfig(rank=2, alpha=4))
    return StageContext(
        loaded=Loaded(DenseModel(shape), nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini")),
        problems=read_layout(source.layout, Path(source.path)),
        folder=tmp_path,
        seed=0,
        scorer=sense_scorer(),
        progress=Progress(console=Console(file=io.StringIO())),
        modalities=(modality,),
    )


def _of_size(png: bytes, side: int) -> bytes:
    """A PNG file whose header promises so many pixels a side."""
    header = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def stage(source: MediaFileSource, **changes: object) -> MediaStage:
    values = {
        "name": "see",
        "source": source,
        "learns": {"vision": ("projector",)},
        "sft": MediaSFTConfig(examples_per_step=2, micro_examples=2),
        "loop": LoopConfig(steps=1, optim=OptimConfig(adam_lr=1e-3)),
    }
    return MediaStage.model_validate(values | changes)


def test_items_that_cannot_be_read_are_listed(source, context, tmp_path: Path):
    prepare_media(stage(source, on_fault="skip"), context)
    told = json.loads((tmp_path / FAULTS).read_text())
    bad = {Path(fault["item"]).stem for fault in told["faults"]}
    assert bad == {"damaged", "empty", "bomb", "thin", "missing"}
    assert told["read"] == 2
    assert all(fault["reason"] for fault in told["faults"])


def test_or_they_stop_the_run_by_name(source, context):
    with pytest.raises(DataError, match=r"(damaged|empty|bomb|thin|missing)\.png"):
        prepare_media(stage(source), context)


def test_nothing_that_can_be_read_is_an_error_that_names_the_first(source, context):
    bad = context.problems[1:-1]
    with pytest.raises(DataError, match=r"none of 5 items could .* the first: .*damaged\.png"):
        prepare_media(stage(source, on_fault="skip"), replace(context, problems=bad))
    text = [Problem("Who?", "I", None, "I", None, "Who?", p.provenance) for p in bad]
    with pytest.raises(DataError, match="anything to see"):
        prepare_media(stage(source), replace(context, problems=text))


def test_a_reader_leaves_the_model_as_it_is_but_for_its_encoder(source, context):
    made = prepare_media(stage(source, on_fault="skip", reader=SHAPE), context)
    model = context.loaded.model
    assert made.model is not None and made.model is not model
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in made.model.parameters():
        parameter.data.add_(1.0)
    made.finish()
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert changed and all(".img_processor." in name for name in changed)


def test_pairs_instead_of_questions(source, context):
    contrastive = ContrastiveConfig(pairs_per_step=2)
    changes = {"on_fault": "skip", "reader": SHAPE, "contrastive": contrastive}
    made = prepare_media(stage(source, **changes), context)
    objective = made.objective
    assert isinstance(objective, ContrastiveObjective) and made.model is not None
    item, text = objective.pairs[0]
    assert set(item.tokens[:-1].tolist()) == {*made.model.media_ids.values()}
    assert item.media is not None and text.media is None and len(text) > 1
    with pytest.raises(ValueError, match="give the stage a reader"):
        stage(source, contrastive=contrastive)


def test_pieces_are_bounded_by_number_and_by_size():
    sizes = [3, 3, 3, 1, 1, 1, 50, 2, 2, 9]
    found = [[sizes[i] for i in piece] for piece in pieces(sizes, most=3, total=10)]
    assert found == [[3, 3, 3], [1, 1, 1], [50], [2, 2], [9]]
    assert [*pieces([], most=3, total=10)] == []


def test_a_vocabulary_of_what_occurs():
    rows = [[5, 9, 500, 500, 7], [9, 501, 3]]
    examples = [Example(np.array(r, np.int32), np.ones(len(r), np.bool_)) for r in rows]
    vocabulary = Vocabulary.of(examples, placeholders=[500, 501])
    assert vocabulary.size == 4
    assert vocabulary.new[rows[0]].tolist() == [1, 3, 4, 4, 2]
    assert vocabulary.new[rows[1]].tolist() == [3, 5, 0]
