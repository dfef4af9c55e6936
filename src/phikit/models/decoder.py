"""What every decoder of the library is: embeddings, blocks, a final norm, a head.

A family brings its config and its block; the walk through them, the head and the first draw of the
weights are here. The trunk's names (`model.embed_tokens`, `model.layers`, `model.norm`, `lm_head`)
are those of Hugging Face checkpoints.
"""

from collections.abc import Callable, Iterable
from typing import Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.nn.attention import Attend, AttentionShape, CausalAttention
from phikit.nn.linear import Linear
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
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What the first block is given, [B, T, D]."""
        return self.model.embed_tokens(tokens_BT).to(self.dtype)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Final normalised hidden states [B, T, D]; by default causal over whole rows."""
        return self.run_blocks(self.embed(tokens_BT), positions_BT=positions_BT, attend=attend)

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

    def forward(self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None) -> Tensor:
        return self.logits(self.hidden(tokens_BT, positions_BT=positions_BT))

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
