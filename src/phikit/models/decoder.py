"""What every decoder of the library is: embeddings, blocks, a final norm, a head.

A family brings its config and its block; the walk through them, the head and the first draw of the
weights are here. The trunk's names (`model.embed_tokens`, `model.layers`, `model.norm`, `lm_head`)
are those of Hugging Face checkpoints. Any decoder may be taught to perceive more than text
(`models.modality`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.base.media import Media, word_of
from phikit.models.modality import (
    LoraShape,
    Modality,
    adapters_for,
    check_counts,
    overwrite_media,
)
from phikit.nn.attention import Attend, AttentionShape, CausalAttention
from phikit.nn.linear import Linear
from phikit.nn.lora import route_adapters
from phikit.nn.quantised import QuantConfig
from phikit.nn.rope import LongRope, RopeTables, rope_tables


class DecoderConfig(Config):
    """What the architectures of all families share."""

    vocab_size: PositiveInt
    d_model: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    max_context: PositiveInt
    """Longest sequence in tokens."""
    rope_theta: PositiveFloat = 10_000.0
    partial_rotary: float = Field(default=1.0, gt=0, le=1)
    """Share of each head's channels that is rotated; 0.75 in Phi-4-mini."""
    longrope: LongRope | None = None
    sliding_window: PositiveInt | None = None
    """Keys a query sees, itself included; None sees all."""
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = True
    init_std: PositiveFloat = 0.02

    @property
    def senses(self) -> tuple[str, ...]:
        """The modalities that models of this config are born with; others may be attached."""
        return ()

    @property
    def adapters(self) -> Mapping[str, LoraShape]:
        """The adapters that they are born with, by name."""
        return {}

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary)

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(self.d_model, self.num_heads, self.num_kv_heads, self.head_dim)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.rotary_dim % 2:
            raise ValueError(f"head_dim x partial_rotary is {self.rotary_dim}, an odd number")
        if self.longrope is not None:
            lengths = {len(self.longrope.short_factor), len(self.longrope.long_factor)}
            if lengths != {self.rotary_dim // 2}:
                raise ValueError(
                    f"the longrope factors have {sorted(lengths)} entries; half the rotated "
                    f"channels are {self.rotary_dim // 2}"
                )
        return self


Walk = Callable[[Tensor, RopeTables, Attend], Tensor]
"""From embeddings to the final norm, as `Decoder.through_blocks`."""


class Trunk(nn.Module):
    """Embeddings, the blocks of a family, the final norm."""

    def __init__(self, config: DecoderConfig, blocks: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        # Zeros until `initialise` or a checkpoint fills them: torch's own draw, on the meta device,
        # first imports torch's compiler (2 s of every load).
        zeros_VD = torch.zeros(config.vocab_size, config.d_model)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros_VD, freeze=False)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm


class Decoder(nn.Module):
    """A decoder with a language-model head: token ids [B, T] in, logits [B, T, V] out."""

    def __init__(
        self,
        config: DecoderConfig,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        *,
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.quantisation: QuantConfig | None = None
        """How the weights are quantised; None where all are numbers in floating point."""
        self.model = Trunk(config, blocks, norm)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=head_bias)
        self.modalities = nn.ModuleDict()
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def senses(self) -> dict[str, Modality]:
        """What the model perceives beside text, by name; empty for a text model."""
        return dict(self.modalities.items())  # pyright: ignore[reportReturnType]

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        """The embeddings of tokens, [B, T, D]; of placeholders something to be overwritten."""
        if self.modalities:  # their placeholders lie beyond the table
            tokens_BT = tokens_BT.clamp(max=self.config.vocab_size - 1)
        return self.model.embed_tokens(tokens_BT).to(self.dtype)

    def embed(self, tokens_BT: Tensor, *, media: Sequence[Media | None] | None = None) -> Tensor:
        """What the first block is given, [B, T, D]; arguments and errors as in `hidden`."""
        x_BTD = self.embed_text(tokens_BT)
        return x_BTD if media is None else overwrite_media(x_BTD, tokens_BT, self.senses, media)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        attend: Attend | None = None,
        media: Sequence[Media | None] | None = None,
    ) -> Tensor:
        """Final normalised hidden states [B, T, D].

        Args:
            tokens_BT: with a placeholder at every position that stands for media.
            positions_BT: 0, 1, 2, ... where None.
            attend: causal over whole rows where None.
            media: what each row's placeholders stand for, which decides the row's adapter; None is
                a batch of text, which runs on the chosen adapter (`nn.lora.choose_adapter`), by
                default on the bare base.

        Raises:
            ChatError: a row's placeholders are more or fewer than its media take, or it holds media
                that the model does not perceive.
        """
        x_BTD = self.embed(tokens_BT, media=media)
        if media is None:
            return self.run_blocks(x_BTD, positions_BT=positions_BT, attend=attend)
        with route_adapters(self, self.adapters_for(media)):
            return self.run_blocks(x_BTD, positions_BT=positions_BT, attend=attend)

    def adapters_for(self, media: Sequence[Media | None]) -> list[str | None]:
        """The adapter of each row by its media; None is the one chosen for text.

        An adapter that the model has not got, or no longer has, is None as well.
        """
        return adapters_for(self, self.senses, media)

    def check_media(self, tokens: Sequence[int], media: Media | None) -> None:
        """Raise ChatError if a prompt's placeholders are more or fewer than its media take."""
        tokens, senses = list(tokens), self.senses
        found = [tokens.count(sense.token) for sense in senses.values()]
        check_counts(found, senses, media, where="the prompt")

    @property
    def media_ids(self) -> dict[str, int]:
        """The placeholder token of each kind of media, by the word in placeholders."""
        return {word_of(name): sense.token for name, sense in self.senses.items()}

    def run_blocks(
        self,
        x_BTD: Tensor,
        *,
        positions_BT: Tensor | None = None,
        ends_B: Tensor | None = None,
        attend: Attend | None = None,
        walk: Walk | None = None,
    ) -> Tensor:
        """From embeddings to final normalised hidden states, [B, T, D] both.

        `ends_B` is the last position of the sequence that a row is a part of, by default the row's
        own last; LongRoPE's factors depend on it. `walk` stands in for `through_blocks`.
        """
        config = self.config
        if positions_BT is None:
            positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        if attend is None:
            attend = CausalAttention(window=config.sliding_window)
        rope = self.rope(positions_BT, ends_B=ends_B, dtype=x_BTD.dtype)
        return (walk or self.through_blocks)(x_BTD, rope, attend)

    def through_blocks(self, x_BTD: Tensor, rope: RopeTables, attend: Attend) -> Tensor:
        """The blocks one after another, then the final norm."""
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, rope, attend)
        return self.model.norm(x_BTD)

    def rope(
        self, positions_BT: Tensor, *, dtype: torch.dtype, ends_B: Tensor | None = None
    ) -> RopeTables:
        """What blocks rotate queries and keys by; arguments as in `run_blocks`."""
        config = self.config
        return rope_tables(
            positions_BT,
            ends_B=ends_B,
            rotary_dim=config.rotary_dim,
            theta=config.rope_theta,
            longrope=config.longrope,
            max_context=config.max_context,
            dtype=dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return next(self.model.norm.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.norm.parameters()).device

    @property
    def logit_bias(self) -> Tensor | None:
        """What the head adds to each logit, [V]; for the losses, which never hold all logits."""
        return self.lm_head.bias

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The head on hidden states, [..., V]."""
        return self.lm_head(hidden_BTD)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        media: Sequence[Media | None] | None = None,
    ) -> Tensor:
        return self.logits(self.hidden(tokens_BT, positions_BT=positions_BT, media=media))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Self:
        """Draw all weights: normal(0, init_std), residual outputs scaled by 1/sqrt(2 layers)."""
        config = self.config
        residual_std = config.init_std / (2 * config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = residual_std if is_residual else config.init_std
                drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
                parameter.copy_(drawn)
        return self
