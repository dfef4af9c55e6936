"""A frozen text model learns to see and to hear, by the stages of Phi-4-multimodal, on a laptop.

Source: Phi-4-Mini technical report (arXiv 2503.01743), section 2.2 and 3.2; LLaVA-Rad (arXiv
2403.08002) for the modular variant.
"""

from typing import Literal, get_args

from phikit.base.errors import ConfigError
from phikit.data.media.augment import SpecAugmentConfig
from phikit.data.source import MediaFileSource, MediaSource
from phikit.models.catalogue import SMOLLM2_135M
from phikit.models.modality import AdapterConfig
from phikit.models.senses import SpeechModality, VisionModality
from phikit.models.whisper import WhisperModality
from phikit.nn.speech import SpeechConfig
from phikit.nn.vision import VisionConfig
from phikit.recipes.config import (
    EvaluationConfig,
    MediaStage,
    NewBase,
    PipelineConfig,
    PretrainedBase,
    PretrainStage,
    SenseConfig,
)
from phikit.recipes.nano_reasoner import nano_reasoner, pretrain
from phikit.train.encoders import CTCConfig, MarksConfig
from phikit.train.loop import LoopConfig
from phikit.train.media import MediaSFTConfig
from phikit.train.optim import OptimConfig
from phikit.weights.surgery import Part
from phikit.weights.whisper import WHISPER_TINY_EN

Backbone = Literal["smollm2", "nano"]
Tuning = Literal["mixture", "shared", "full"]
PICTURES = {
    "digit": 2_000, "scans": 3_000, "text": 4_000, "lines": 12_000, "chart": 2_400, "shapes": 600,
}  # fmt: skip
"""On which the vision encoder starts."""
ASKED = {"digit": 140, "text": 560, "chart": 440, "shapes": 960}
"""That the language model is asked about: it costs a hundred times what the encoder does."""
SOUNDS = {"spoken_digits": 3_500, "command": 3_000, "spoken_question": 1_500}
LEARNT = {
    "img_processor": 0.05,
    "encoder": 0.05,
    "img_projection_up": 0.2,
    "img_projection_down": 0.2,
}
"""What has learnt before goes slowly through the language model."""
TEXT_LEARNT = {"model": 0.05}
"""The same of the text model itself, where it is trained in the place of adapters."""


def vision() -> VisionModality:
    """Crops of 96 pixels show a word at once, and a token about a letter; 0.9 M weights."""
    encoder = VisionConfig(
        d_model=128,
        d_mlp=384,
        num_layers=3,
        num_heads=4,
        patch_size=8,
        crop_size=96,
        positions_per_side=12,
        feature_layer=3,
        stem=(32, 64, 128),
        stem_blocks=1,
    )
    return VisionModality(
        encoder=encoder,
        max_crops=12,
        overview_of_one=False,
        adapter=AdapterConfig(rank=16, alpha=32),
    )


def speech() -> SpeechModality:
    """Four Conformer blocks; 1.4 M weights."""
    encoder = SpeechConfig(
        d_model=128, num_layers=4, num_heads=4, d_mlp=256, subsampling_channels=32
    )
    return SpeechModality(encoder=encoder, max_seconds=30, adapter=AdapterConfig(rank=16, alpha=32))


def stage(
    name: str,
    shown: dict[str, int] | MediaFileSource,
    learns: dict[str, tuple[Part, ...]],
    *,
    rate: float,
    decay: float = 0.5,
    final: float = 0.05,
    muon: float | None = None,
    epochs: float = 1.0,
    rows: int = 16,
    alone: MarksConfig | CTCConfig | None = None,
    masked: bool = False,
) -> MediaStage:
    """One stage of this line, on generated families or on files; the rate falls over the last part
    `decay` of its steps.

    Clips meet others of their length. Pictures of one family are of one length, and a step that
    shows them all goes further than a shorter one.
    """
    return MediaStage(
        name=name,
        source=MediaSource(families=shown) if isinstance(shown, dict) else shown,
        learns=learns,
        alone=alone,
        sft=MediaSFTConfig(
            examples_per_step=rows,
            micro_examples=rows,
            bucket_steps=8 if "speech" in learns and "vision" not in learns else 1,
            spec_augment=SpecAugmentConfig(throat=0.12) if masked else None,
        ),
        loop=LoopConfig(
            epochs=epochs,
            optim=OptimConfig(
                adam_lr=rate,
                muon_lr=muon,
                warmup=0.05,
                decay=decay,
                final=final,
                scales={} if alone else LEARNT,
            ),
        ),
    )


def encoders() -> tuple[MediaStage, ...]:
    """The encoders' initialisation, and the projectors', without the language model.

    Sight's projector waits for its tower and learns more slowly: at the tower's rate, nine in ten
    of its hidden units ended up off for every token, and stayed so. The tower's rate falls almost
    from the beginning, in many small steps: it is short of steps, and learns fastest so.
    """
    return (
        stage("see", PICTURES, {"vision": ("encoder",)}, rate=5e-3, decay=0.95, final=0.01,
              muon=0.02, epochs=3.3, alone=MarksConfig()),
        stage("hear", SOUNDS, {"speech": ("encoder", "projector", "beside")}, rate=2e-3, muon=0.02,
              epochs=4.5, rows=32, alone=CTCConfig(), masked=True),
        stage("name", _share(PICTURES, 0.25), {"vision": ("projector",)}, rate=1e-3, epochs=5,
              rows=32, alone=MarksConfig()),
    )  # fmt: skip


def vision_stages() -> tuple[MediaStage, ...]:
    """Projector; projector and encoder; LoRA as well; several images with the encoder frozen."""
    return (
        stage("vision1", _share(ASKED, 0.06), {"vision": ("projector",)}, rate=1e-3),
        stage("vision2", _share(ASKED, 0.06), {"vision": ("projector", "encoder")}, rate=1e-3),
        stage("vision3", ASKED, {"vision": ("projector", "encoder", "adapter")}, rate=1.5e-3),
        stage("vision4", {"pages": 96} | _share(ASKED, 0.12),
              {"vision": ("projector", "adapter")}, rate=1e-3),
    )  # fmt: skip


def speech_stages() -> tuple[MediaStage, ...]:
    """Encoder and projector on transcripts; projector and LoRA on questions, encoder frozen."""
    asked = {"spoken_sum": 120, "spoken_digits": 560, "command": 300, "spoken_question": 160}
    return (
        stage("speech1", _share(SOUNDS, 0.03), {"speech": ("projector", "encoder")},
              rate=1e-3, masked=True),
        stage("speech2", asked, {"speech": ("projector", "adapter")}, rate=1.5e-3, masked=True),
    )  # fmt: skip


def joint_stage() -> MediaStage:
    """Questions spoken about pictures; the text model and the audio side are frozen.

    Half of the rows are of the stages before: with fewer, what was asked in writing was answered
    with the thought of a heard question.
    """
    families = {"spoken_scene": 760, "pages": 40} | _share(ASKED, 0.4)
    learns: dict[str, tuple[Part, ...]] = {
        "vision": ("projector", "encoder", "adapter"),
        "speech": ("beside",),
    }
    return stage("joint", families, learns, rate=1e-3)


def see_and_hear(
    *, backbone: Backbone = "smollm2", tuning: Tuning = "mixture", without: str = ""
) -> PipelineConfig:
    """A frozen text model learns to see and hear beside its text, which stays what it was.

    That is SmolLM2-135M. `--set backbone=nano` takes one of 1.8 M weights instead, which the run
    trains first, and which reads far less well. For comparison, `--set tuning=shared` has one
    adapter for both senses, `--set tuning=full` trains the text model in their place, and `--set
    without=vision2` leaves a stage out.
    """
    stages = (*encoders(), *vision_stages(), *speech_stages(), joint_stage())
    if without and without not in {each.name for each in stages}:
        raise ConfigError(
            f"there is no stage {without!r} to leave out",
            fix=f"it has {', '.join(each.name for each in stages)}",
        )
    kept = tuple(each for each in stages if each.name != without)
    senses, kept = _tuned(tuning, (vision(), speech()), kept)
    return _pipeline("see_and_hear", backbone, senses, kept, asked=_held_out(stages))


def see_modular(*, backbone: Backbone = "smollm2") -> PipelineConfig:
    """LLaVA-Rad's recipe: a frozen encoder of the domain, projector alignment, then LoRA."""
    see, _, name = encoders()
    stages = (
        see,
        name,
        stage("align", _share(PICTURES, 0.06), {"vision": ("projector",)}, rate=1e-3),
        stage("tune", _share(PICTURES, 0.06), {"vision": ("projector", "adapter")}, rate=5e-4),
    )
    return _pipeline("see_modular", backbone, (vision(),), stages, asked=_held_out(stages))


def hear_recordings(
    *, recordings: str = "recordings", held_out: str = "george", backbone: Backbone = "smollm2"
) -> PipelineConfig:
    """Spoken digits from recordings of people; the speaker `held_out` is heard in the test alone.

    `recordings` is a folder in the layout of the Free Spoken Digit Dataset, which is public. A few
    people are few voices, so the encoder is one that has heard thousands: Whisper's, which stays as
    it is. Its projector is aligned on synthesised speech, then learns from people with the adapter.
    """
    source = MediaFileSource(layout="spoken_digits", path=recordings, held_out=held_out)
    ears = WhisperModality(
        start=WHISPER_TINY_EN, window_seconds=6, adapter=AdapterConfig(rank=16, alpha=32)
    )
    stages = (
        stage("align", {"spoken_digits": 1_600}, {"speech": ("projector",)}, rate=1e-3),
        stage("tune", source, {"speech": ("projector", "adapter")}, rate=1e-3),
    )
    held = source.model_copy(update={"count": 200})
    return _pipeline("hear_recordings", backbone, (ears,), stages, asked=held)


def _pipeline(
    name: str,
    backbone: Backbone,
    modalities: tuple[SenseConfig, ...],
    stages: tuple[MediaStage, ...],
    *,
    asked: MediaSource | MediaFileSource,
) -> PipelineConfig:
    """A pipeline that is `asked` held-out problems."""
    base, first = _base(backbone)
    return PipelineConfig(
        name=name,
        base=base,
        modalities=modalities,
        stages=(*first, *stages),
        evaluation=EvaluationConfig(source=asked, max_new_tokens=40),
    )


def _held_out(stages: tuple[MediaStage, ...]) -> MediaSource:
    """Some problems of every family of the stages that go through the text model."""
    sources = [each.source for each in stages if each.alone is None]
    families = {f for source in sources if isinstance(source, MediaSource) for f in source.families}
    return MediaSource(families=dict.fromkeys(sorted(families), 60))


def _tuned(
    tuning: Tuning, senses: tuple[SenseConfig, ...], stages: tuple[MediaStage, ...]
) -> tuple[tuple[SenseConfig, ...], tuple[MediaStage, ...]]:
    """Senses and stages with adapters of their own, with one for all, or without any."""
    if tuning == "mixture":
        return senses, stages
    if tuning not in ("shared", "full"):
        raise ConfigError(
            f"there is no tuning {tuning!r}", fix=f"choose from {', '.join(get_args(Tuning))}"
        )
    owner = senses[0].name if tuning == "shared" else None
    bare = tuple(
        each if each.name == owner else each.model_copy(update={"adapter": None, "borrows": owner})
        for each in senses
    )
    return bare, tuple(_with_adapter_of(owner, each) for each in stages)


def _with_adapter_of(owner: str | None, stage: MediaStage) -> MediaStage:
    """The stage with `owner`'s adapter in place of those that it trains; None is the text model."""
    trains = any("adapter" in learnt for learnt in stage.learns.values())
    learns: dict[str, tuple[Part, ...]] = {
        name: tuple(part for part in learnt if part != "adapter")
        for name, learnt in stage.learns.items()
    }
    if trains and owner is not None:
        learns[owner] = (*learns.get(owner, ()), "adapter")
    if not trains or owner is not None:
        return stage.model_copy(update={"learns": learns})
    optim = stage.loop.optim.model_copy(update={"scales": LEARNT | TEXT_LEARNT})
    loop = stage.loop.model_copy(update={"optim": optim})
    return stage.model_copy(update={"learns": learns, "loop": loop, "backbone": True})


def _base(backbone: Backbone) -> tuple[NewBase | PretrainedBase, tuple[PretrainStage, ...]]:
    """The text model, and the stage that makes it if it is new."""
    if backbone == "smollm2":
        return PretrainedBase(path="smollm2", model=SMOLLM2_135M), ()
    if backbone == "nano":
        base = nano_reasoner().base
        assert isinstance(base, NewBase)
        return base, (pretrain(),)
    raise ConfigError(f"there is no backbone {backbone!r}", fix="choose smollm2 or nano")


def _share(families: dict[str, int], share: float) -> dict[str, int]:
    return {family: max(1, round(share * count)) for family, count in families.items()}
