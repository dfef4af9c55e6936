"""The encoder of Whisper: log-mel frames in, one vector for every 20 ms out.

Two convolutions, the second of stride 2, sinusoids for positions, then pre-norm blocks in which
every moment sees every other. What is usual elsewhere is missing in two places: keys have no bias,
and there is no mask, as Whisper was trained on windows of one length, filled up with silence.

Shapes here: T frames of 10 ms, S = T / 2 vectors. Parameter names are those of `WhisperEncoder` in
transformers. Source: Radford et al., 2022 (arXiv 2212.04356), section 2.2.
"""

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.nn.attention import whole_attention


class WhisperConfig(Config):
    """Architecture of the encoder; the defaults are those of Whisper tiny."""

    d_model: PositiveInt = 384
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 6
    d_mlp: PositiveInt = 1536
    num_mels: PositiveInt = 80
    max_positions: PositiveInt = 1500
    """Vectors of the longest window, 30 s."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        return self


class Attention(nn.Module):
    """Multi-head attention of a window to itself."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (
            project(x_BSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BNSH = whole_attention(q, k, v, None)
        return self.out_proj(y_BNSH.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two linear layers with a GELU between them, each behind a norm."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn = Attention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.d_mlp)
        self.fc2 = nn.Linear(config.d_mlp, config.d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.self_attn_layer_norm(x_BSD))
        return x_BSD + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x_BSD))))


class WhisperEncoder(nn.Module):
    """Log-mel windows to one vector for every two frames."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mels, config.d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding.from_pretrained(sinusoids(config), freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, features_BTF: Tensor) -> Tensor:
        """[B, T, F] to [B, T / 2, D]; at most `max_positions` vectors."""
        x_BDT = F.gelu(self.conv1(features_BTF.to(self.conv1.weight.dtype).mT))
        x_BSD = F.gelu(self.conv2(x_BDT)).mT
        x_BSD = x_BSD + self.embed_positions.weight[: x_BSD.shape[1]]
        for layer in self.layers:
            x_BSD = layer(x_BSD)
        return self.layer_norm(x_BSD)


def sinusoids(config: WhisperConfig) -> Tensor:
    """Positions [S, D]: sines of wave lengths from 2 pi to 20,000 pi, then their cosines."""
    half = config.d_model // 2
    rates_F = torch.logspace(0, -4, half, base=10.0, dtype=torch.float64)
    angles_SF = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * rates_F
    return torch.cat([angles_SF.sin(), angles_SF.cos()], dim=1).float()
