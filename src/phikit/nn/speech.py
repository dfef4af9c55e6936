"""How Phi-4-multimodal hears: log-mel frames in, embeddings for the language model out.

Three strided convolutions turn eight frames of 10 ms into one token of 80 ms; 24 Conformer blocks
(Gulati et al., 2020) follow, then one of two projectors. What is unusual: positions are a learnt
number per head and distance, shared by all blocks; a clip of more than 500 tokens (40 s) is cut
into chunks that do not see each other; the feed-forward keeps its value half before its gate half,
the opposite of the language model.

A clip gives the same in a batch as alone: what lies beyond its end is zeroed before every
convolution that looks to the right, and no query sees it. The implementation in transformers 5.23
does neither (it adds 1.0 to the scores of the keys to be seen, where -inf on the others was meant)
and it lets a long clip attend to the zeros that fill its last chunk. So the two agree on a single
clip of at most 500 tokens or of a multiple of 500; `tests/parity/test_speech.py` shows both values
where they part.

Shapes here: T frames, S tokens, C chunks of a clip, M chunks of the whole batch; F mel bands.
Parameter names are those of `Phi4MultimodalAudioEmbedding` in transformers.
Source: Phi-4-Mini technical report (arXiv 2503.01743), section 2.2.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from phikit.base.config import Config
from phikit.nn.attention import whole_attention

FRAMES_PER_TOKEN = 8
"""Three convolutions of stride 2."""
STRETCH_TOKENS = 500
"""Subsampled at once: the first convolution widens a minute of sound to half a gigabyte."""


class SpeechConfig(Config):
    """Architecture of the speech encoder; the defaults are Phi-4-multimodal's."""

    d_model: PositiveInt = 1024
    num_layers: PositiveInt = 24
    num_heads: PositiveInt = 16
    d_mlp: PositiveInt = 1536
    num_mels: PositiveInt = 80
    subsampling_channels: PositiveInt = 1024
    kernel_size: PositiveInt = 3
    """Width of the blocks' causal convolution, in tokens."""
    bias_max_distance: PositiveInt = 500
    """Distance in tokens from which on all keys of one side share a bias."""
    chunk_tokens: PositiveInt = 500
    """Longest stretch in tokens that is encoded in one piece."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of num_heads {self.num_heads}")
        return self


class Encoded(NamedTuple):
    """Rows of vectors [B, S, D], and how many of each row belong to its clip, [B]."""

    x_BSD: Tensor
    lengths_B: Tensor


def within(lengths_B: Tensor, size: int) -> Tensor:
    """Boolean [B, size]: does this place lie before the end of its row?"""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


class MeanVarianceNorm(nn.Module):
    """Each mel band at zero mean and unit variance, by statistics of the training data."""

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.global_mean = nn.Buffer(torch.zeros(num_mels))
        self.global_invstd = nn.Buffer(torch.ones(num_mels))

    def forward(self, x_BTF: Tensor) -> Tensor:
        return (x_BTF - self.global_mean) * self.global_invstd


class Subsampling(nn.Module):
    """Frames [B, T, F] to tokens [B, ceil(T / 8), D]."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        channels = config.subsampling_channels
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU()]
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
        self.conv = nn.Sequential(*layers)
        bands = -(-config.num_mels // FRAMES_PER_TOKEN)  # frequency is subsampled like time
        self.out = nn.Linear(channels * bands, config.d_model)

    def forward(self, x_BTF: Tensor, lengths_B: Tensor) -> Encoded:
        # A token depends on its own eight frames and the seven before: one token more on the left
        # makes a stretch exact.
        stretches = []
        for start in range(0, x_BTF.shape[1], STRETCH_TOKENS * FRAMES_PER_TOKEN):
            first = max(0, start - FRAMES_PER_TOKEN)
            frames = slice(first, start + STRETCH_TOKENS * FRAMES_PER_TOKEN)
            x_BSD = self._subsample(x_BTF[:, frames], lengths_B - first)
            stretches.append(x_BSD[:, (start - first) // FRAMES_PER_TOKEN :])
        return Encoded(torch.cat(stretches, dim=1), -(-lengths_B // FRAMES_PER_TOKEN))

    def _subsample(self, x_BTF: Tensor, lengths_B: Tensor) -> Tensor:
        # One channel, and the strides of channels that lie last: the convolutions keep that layout,
        # in which they take half of the time on the CPU.
        x = x_BTF[..., None].permute(0, 3, 1, 2)
        is_padded = bool((lengths_B < x_BTF.shape[1]).any())
        for layer in self.conv:
            if is_padded and isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                # A clip on its own ends in the convolution's zeros; in a batch it must as well.
                x = x.masked_fill(~within(lengths_B, x.shape[2])[:, None, :, None], 0.0)
                lengths_B = (lengths_B + 1) // 2
            x = layer(x)
        return self.out(x.transpose(1, 2).flatten(2))


class RelativeAttentionBias(nn.Module):
    """One learnt number per head and clipped distance, added to the attention scores."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.max_distance = config.bias_max_distance
        zeros = torch.zeros(2 * config.bias_max_distance, config.num_heads)
        self.bias_values = nn.Embedding.from_pretrained(zeros, freeze=False)

    def forward(self, tokens: int) -> Tensor:
        """[1, N, S, S], queries by keys."""
        position = torch.arange(tokens, device=self.bias_values.weight.device)
        distance = position[None, :] - position[:, None]
        index = distance.clamp(-self.max_distance, self.max_distance - 1) + self.max_distance
        return self.bias_values(index).permute(2, 0, 1)[None]


class FeedForward(nn.Module):
    """`down(value * silu(gate))` behind a norm; the rows of the fused matrix are value, gate."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.gate_up_proj = nn.Linear(config.d_model, 2 * config.d_mlp)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        value, gate = self.gate_up_proj(self.layer_norm(x_BSD)).chunk(2, dim=-1)
        return self.down_proj(value * F.silu(gate))


class Attention(nn.Module):
    """Multi-head attention in both directions; the bias carries positions and masks."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.o_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BSD: Tensor, bias_BNSS: Tensor) -> Tensor:
        q, k, v = (
            project(x_BSD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BNSH = whole_attention(q, k, v, bias_BNSS)
        return self.o_proj(y_BNSH.transpose(1, 2).flatten(2))


class Pointwise(nn.Conv1d):
    """A convolution over one token, as the matrix product that it is: on [B, S, D]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[..., 0], self.bias)


class GatedPointwise(nn.Module):
    """`(value + b1) * silu(gate + b2)` of one matrix, on [B, S, D]."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.ext_pw_conv_1d = Pointwise(d_model, 2 * d_model)
        self.b1 = nn.Parameter(torch.zeros(1, d_model, 1))
        self.b2 = nn.Parameter(torch.zeros(1, d_model, 1))

    def forward(self, x_BSD: Tensor) -> Tensor:
        value, gate = self.ext_pw_conv_1d(x_BSD).chunk(2, dim=-1)
        return (value + self.b1.mT) * F.silu(gate + self.b2.mT)


class Depthwise(nn.Conv1d):
    """A convolution of every feature by itself, over this token and those before: on [B, S, D].

    Kernels are short, so it is a sum of a few shifted copies, and nothing is transposed.
    """

    def __init__(self, d_model: int, kernel_size: int) -> None:
        super().__init__(d_model, d_model, kernel_size, groups=d_model)

    def forward(self, input: Tensor) -> Tensor:
        [reach] = self.kernel_size
        tokens = input.shape[1]
        padded_BSD = F.pad(input, (0, 0, reach - 1, 0))
        assert self.bias is not None
        mixed_BSD: Tensor = self.bias
        for place in range(reach):
            shifted_BSD = padded_BSD[:, place : place + tokens]
            mixed_BSD = torch.addcmul(mixed_BSD, shifted_BSD, self.weight[:, 0, place])
        return mixed_BSD


class CausalConvolution(nn.Module):
    """Depthwise over this token and those before it, then pointwise, on [B, S, D]."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.dw_conv = Depthwise(config.d_model, config.kernel_size)
        self.pw_conv = Pointwise(config.d_model, config.d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.pw_conv(self.dw_conv(x_BSD))


class ConvolutionModule(nn.Module):
    """The Conformer's convolution, with a norm in front and none inside."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.glu = GatedPointwise(config.d_model)
        self.dw_sep_conv_1d = CausalConvolution(config)
        self.ext_pw_conv_1d = Pointwise(config.d_model, config.d_model)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.dw_sep_conv_1d(self.glu(self.layer_norm(x_BSD)))
        return self.ext_pw_conv_1d(F.silu(x_BSD))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, the other half; a norm at the end."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.feed_forward_in = FeedForward(config)
        self.layer_norm_att = nn.LayerNorm(config.d_model)
        self.self_attn = Attention(config)
        self.conv = ConvolutionModule(config)
        self.feed_forward_out = FeedForward(config)
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x_BSD: Tensor, bias_BNSS: Tensor) -> Tensor:
        x_BSD = x_BSD + 0.5 * self.feed_forward_in(x_BSD)
        x_BSD = x_BSD + self.self_attn(self.layer_norm_att(x_BSD), bias_BNSS)
        x_BSD = x_BSD + self.conv(x_BSD)
        x_BSD = x_BSD + 0.5 * self.feed_forward_out(x_BSD)
        return self.layer_norm(x_BSD)


class SpeechEncoder(nn.Module):
    """Log-mel features to one vector for every 80 ms."""

    def __init__(self, config: SpeechConfig) -> None:
        super().__init__()
        self.chunk_tokens = config.chunk_tokens
        self.encoder_embedding = MeanVarianceNorm(config.num_mels)
        self.embed = Subsampling(config)
        self.relative_attention_bias_layer = RelativeAttentionBias(config)
        self.encoders = nn.ModuleList(ConformerBlock(config) for _ in range(config.num_layers))

    def forward(self, features_BTF: Tensor, lengths_B: Tensor) -> Encoded:
        """Encode clips.

        Args:
            features_BTF: log-mel features, one row a clip; beyond its end a row may hold anything.
            lengths_B: frames of each clip.

        Returns:
            Vectors [B, ceil(T / 8), D], zero beyond each clip's end, and the tokens of each clip.
        """
        features_BTF = self.encoder_embedding(features_BTF).to(self.embed.out.weight.dtype)
        x_BSD, lengths_B = self.embed(features_BTF, lengths_B)
        tokens = x_BSD.shape[1]
        width = min(tokens, self.chunk_tokens)
        x_BCSD = F.pad(x_BSD, (0, 0, 0, -tokens % width)).unflatten(1, (-1, width))
        starts_C = width * torch.arange(x_BCSD.shape[1], device=lengths_B.device)
        sizes_BC = (lengths_B[:, None] - starts_C).clamp(0, width)
        # A chunk without a token of its clip has no key to attend to: a softmax over nothing.
        occupied_BC = sizes_BC > 0
        y_MSD = self.run_blocks(x_BCSD[occupied_BC], sizes_BC[occupied_BC])
        y_BCSD = y_MSD.new_zeros(x_BCSD.shape)
        y_BCSD[occupied_BC] = y_MSD
        return Encoded(y_BCSD.flatten(1, 2)[:, :tokens], lengths_B)

    def run_blocks(self, x_MSD: Tensor, sizes_M: Tensor) -> Tensor:
        """The Conformer blocks on chunks of one width; zero where a chunk is not filled."""
        filled_MS = within(sizes_M, x_MSD.shape[1])
        bias_1NSS = self.relative_attention_bias_layer(x_MSD.shape[1])
        bias_MNSS = bias_1NSS.masked_fill(~filled_MS[:, None, None, :], float("-inf"))
        for block in self.encoders:
            x_MSD = block(x_MSD, bias_MNSS)
        return x_MSD.masked_fill(~filled_MS[:, :, None], 0.0)


class AudioEmbedder(nn.Module):
    """The speech encoder and its two projectors into the width of the language model."""

    def __init__(self, config: SpeechConfig, d_model: int) -> None:
        super().__init__()
        self.encoder = SpeechEncoder(config)
        self.up_proj_for_speech = nn.Linear(config.d_model, d_model)
        self.down_proj_for_speech = nn.Linear(d_model, d_model)
        self.up_proj_for_vision_speech = nn.Linear(config.d_model, d_model)
        self.down_proj_for_vision_speech = nn.Linear(d_model, d_model)

    def forward(
        self, features_BTF: Tensor, lengths_B: Tensor, *, mode: Literal["speech", "vision"]
    ) -> list[Tensor]:
        """One [tokens, D] per clip, tokens = ceil(frames / 8); arguments as in `SpeechEncoder`.

        `mode` chooses the projector: "vision" for prompts that also show an image.
        """
        return self.tell(self.listen(features_BTF, lengths_B), mode=mode)

    def listen(self, features_BTF: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """The encoder's part: one [tokens, D] per clip, of the encoder's width."""
        x_BSD, lengths_B = self.encoder(features_BTF, lengths_B)
        return list(x_BSD[within(lengths_B, x_BSD.shape[1])].split(lengths_B.tolist()))

    def tell(self, heard: Sequence[Tensor], *, mode: Literal["speech", "vision"]) -> list[Tensor]:
        """The projector's part: decoder inputs from what `listen` gives."""
        up_proj, down_proj = {
            "speech": (self.up_proj_for_speech, self.down_proj_for_speech),
            "vision": (self.up_proj_for_vision_speech, self.down_proj_for_vision_speech),
        }[mode]
        projected = down_proj(F.gelu(up_proj(torch.cat(list(heard)))))
        return list(projected.split([len(each) for each in heard]))
