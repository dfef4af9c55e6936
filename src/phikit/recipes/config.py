"""What a pipeline is made of: a base, stages in order, and one evaluation after each stage."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from phikit.base.config import Config
from phikit.base.media import SPEECH, VISION
from phikit.data.corpus import CorpusMixture
from phikit.data.source import Source
from phikit.models.dense import DenseConfig
from phikit.models.moe import MoEConfig
from phikit.models.senses import SpeechModality, VisionModality
from phikit.models.whisper import WhisperModality
from phikit.train.contrastive import ContrastiveConfig
from phikit.train.dpo import DPOConfig
from phikit.train.encoders import CTCConfig, MarksConfig
from phikit.train.grpo import GRPOConfig
from phikit.train.lm import LMConfig
from phikit.train.loop import LoopConfig
from phikit.train.media import MediaSFTConfig
from phikit.train.sft import SFTConfig
from phikit.weights.surgery import Part


def _architecture(value: Any) -> str:
    """Experts tell a mixture of them from a dense decoder, in plain data as in a config."""
    if isinstance(value, Mapping):
        return "MoEConfig" if "num_experts" in value else "DenseConfig"
    return type(value).__name__


Architecture = Annotated[
    Annotated[DenseConfig, Tag("DenseConfig")] | Annotated[MoEConfig, Tag("MoEConfig")],
    Discriminator(_architecture),
]
"""What can be trained: no key says which family it is."""


class NewBase(Config):
    """A model from nothing: random weights, a tokenizer trained on the pre-training corpus."""

    kind: Literal["new"] = "new"
    model: Architecture
    renderer: str = "phi4-mini"
    tokenizer_documents: int
    """Documents of the corpus that the tokenizer is trained on."""
    tokenizer_traces: Source
    """Problems whose questions and traces it is trained on as well."""


class PretrainedBase(Config):
    """A checkpoint: a folder, a `.gguf` file, or the name of an installed model package."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    model: Architecture
    """What the checkpoint must hold; lets a dry run count parameters without it."""


class HubBase(Config):
    """A published checkpoint, fetched from the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    id: str
    revision: str | None = None
    model: Architecture
    """What the checkpoint must hold; lets a dry run count parameters without it."""


class LoRAConfig(Config):
    """Train low-rank adapters in place of all weights; merged at the end of every stage."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class _Stage(Config):
    name: str
    loop: LoopConfig


class PretrainStage(_Stage):
    """Next-token prediction on generated documents."""

    kind: Literal["pretrain"] = "pretrain"
    documents: int
    mixture: CorpusMixture = CorpusMixture()
    lm: LMConfig


class MidStage(_Stage):
    """Next-token prediction on packed teacher traces: distilled chain of thought."""

    kind: Literal["mid"] = "mid"
    source: Source
    lm: LMConfig


class SFTStage(_Stage):
    """Fine-tuning on unpacked traces, loss on the reply."""

    kind: Literal["sft"] = "sft"
    source: Source
    sft: SFTConfig


class DPOStage(_Stage):
    """Rollout DPO: the student's own correct rollouts against its wrong ones."""

    kind: Literal["dpo"] = "dpo"
    source: Source
    samples: int = 8
    """Rollouts per problem."""
    temperature: float = 1.0
    max_new_tokens: int
    max_pairs_per_problem: int = 3
    dpo: DPOConfig


class RLStage(_Stage):
    """Reinforcement learning with the verifier as reward."""

    kind: Literal["rl"] = "rl"
    source: Source
    grpo: GRPOConfig


class MediaStage(_Stage):
    """Fine-tuning on problems with pictures and speech, of those parts that `learns` names."""

    kind: Literal["media"] = "media"
    source: Source
    learns: dict[str, tuple[Part, ...]]
    """What is trained of each modality; all the rest of the model is frozen."""
    backbone: bool = False
    """Train the text model as well, which then is another one: the baseline of the recipe."""
    alone: Annotated[MarksConfig | CTCConfig, Field(discriminator="kind")] | None = None
    """Train the encoder by itself, without the language model: its initialisation."""
    reader: DenseConfig | None = None
    """Train on a small decoder of this shape, drawn anew, in place of the model, and keep the
    encoders alone. Its vocabulary is that of the examples, whatever is set here."""
    sft: MediaSFTConfig
    contrastive: ContrastiveConfig | None = None
    """Draw items and replies together in place of fine-tuning; needs a reader."""
    on_fault: Literal["stop", "skip"] = "stop"
    """What to do about an item that cannot be read; those left out are listed in the report."""

    @model_validator(mode="after")
    def _pairs_have_a_reader(self) -> Self:
        if self.contrastive is not None and self.reader is None:
            raise ValueError("contrastive: pairs train encoders, so give the stage a reader")
        return self

    @model_validator(mode="after")
    def _one_encoder_alone(self) -> Self:
        if self.alone is None:
            return self
        name = VISION if self.alone.kind == "marks" else SPEECH
        is_apart = "adapter" not in self.learns.get(name, ("adapter",))
        if {*self.learns} != {name} or not is_apart or self.reader is not None or self.backbone:
            raise ValueError(
                f"alone: {self.alone.kind} trains the encoder of {name}, its projectors, or both"
            )
        if self.alone.kind == "marks" and self.source.kind != "media":
            raise ValueError(
                "alone: what each patch shows is known of generated pictures (source.kind media); "
                "an encoder starts on others with a reader"
            )
        return self

    @property
    def is_start(self) -> bool:
        """Whether it gives encoders their first weights, beside the language model."""
        return self.alone is not None or self.reader is not None


Stage = Annotated[
    PretrainStage | MidStage | SFTStage | DPOStage | RLStage | MediaStage,
    Field(discriminator="kind"),
]
SenseConfig = Annotated[
    VisionModality | SpeechModality | WhisperModality, Field(discriminator="kind")
]


class EvaluationConfig(Config):
    """The held-out problems every stage is scored on, greedily and by sampling."""

    source: Source
    max_new_tokens: int
    samples: int = 4
    temperature: float = 0.6
    split: Literal["validation", "test"] = "test"
    """Settings are chosen on the validation problems; the test problems are for the last word."""
    seed: int = 2026
    """Draws the problems; the same for all stages and all seeds of the pipeline."""


class PipelineConfig(Config):
    """A whole pipeline, complete: nothing is read from anywhere else."""

    name: str
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""
    base: Annotated[NewBase | PretrainedBase | HubBase, Field(discriminator="kind")]
    beside: Architecture | None = None
    """A second model that goes through the same stages, for comparison; of a new base only."""
    lora: LoRAConfig | None = None
    modalities: tuple[SenseConfig, ...] = ()
    """What the first media stage attaches to the model, in this order."""
    stages: tuple[Stage, ...]
    evaluation: EvaluationConfig
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    @model_validator(mode="after")
    def _adapters_are_of_senses(self) -> Self:
        if self.lora is not None and (self.modalities or self._media_stages()):
            raise ValueError(
                "lora: a model that learns to see or hear has the adapters of its modalities; "
                "set theirs (modalities.NAME.adapter), and leave lora null"
            )
        return self

    def _media_stages(self) -> list[MediaStage]:
        return [stage for stage in self.stages if isinstance(stage, MediaStage)]

    @model_validator(mode="after")
    def _has_senses(self) -> Self:
        known = {modality.name for modality in self.modalities}
        bare = [modality.name for modality in self.modalities if modality.adapter is None]
        for stage in self._media_stages():
            if not known.issuperset(stage.learns):
                missing = sorted({*stage.learns} - known)
                raise ValueError(
                    f"stages.{stage.name}.learns: no modality {missing[0]!r}; "
                    f"there are {', '.join(sorted(known)) or 'none'}"
                )
            if without := [name for name in bare if "adapter" in stage.learns.get(name, ())]:
                raise ValueError(
                    f"stages.{stage.name}.learns: {without[0]!r} has no adapter to train; "
                    f"give modalities.{without[0]}.adapter, or leave it out here"
                )
        return self

    @model_validator(mode="after")
    def _can_compare(self) -> Self:
        if self.beside is not None and not isinstance(self.base, NewBase):
            raise ValueError("beside: another model can go beside a new base only")
        return self
