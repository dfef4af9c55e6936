"""A clip in a batch is the clip alone; a long clip is its chunks; how many tokens a sound takes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phikit.chat import audio
from phikit.chat.audio import audio_clip
from phikit.nn import speech
from phikit.nn.speech import AudioEmbedder, SpeechConfig, SpeechEncoder

LENGTHS = torch.tensor([3, 250, 41, 8, 1, 96])


def embedder(chunk_tokens: int = 500) -> AudioEmbedder:
    """A small random one, in which silence is not zero."""
    config = SpeechConfig(
        d_model=32,
        num_layers=2,
        num_heads=4,
        d_mlp=24,
        subsampling_channels=8,
        bias_max_distance=9,
        chunk_tokens=chunk_tokens,
    )
    model = AudioEmbedder(config, 48)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


def clips(filling: float) -> Tensor:
    """Random rows whose ends lie at LENGTHS, and `filling` beyond."""
    x_BTF = torch.randn(len(LENGTHS), 250, 80, generator=torch.Generator().manual_seed(1))
    return x_BTF.masked_fill((torch.arange(250) >= LENGTHS[:, None])[..., None], filling)


def one_by_one(model: AudioEmbedder, x_BTF: Tensor) -> list[Tensor]:
    lengths = LENGTHS.tolist()
    return [
        model(row[None, :length], torch.tensor([length]), mode="speech")[0]
        for row, length in zip(x_BTF, lengths, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("filling", [0.0, 1e4, math.nan])
@pytest.mark.parametrize("chunk_tokens", [500, 32, 7, 5, 1])
def test_batched_is_single(chunk_tokens: int, filling: float):
    model, x_BTF = embedder(chunk_tokens), clips(filling)
    batched = model(x_BTF, LENGTHS, mode="speech")
    for together, alone in zip(batched, one_by_one(model, x_BTF), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_tokens", [500, 7])
def test_gradients_batched_are_the_sum_of_single_ones(chunk_tokens: int):
    gradients = []
    for is_batched in (True, False):
        model, x_BTF = embedder(chunk_tokens), clips(math.nan)
        heard = model(x_BTF, LENGTHS, mode="speech") if is_batched else one_by_one(model, x_BTF)
        torch.stack([clip.square().mean() for clip in heard]).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    batched, single = gradients
    assert set(batched) == set(single) and not any("vision" in name for name in batched)
    for name, gradient in batched.items():
        scale = max(1.0, float(single[name].norm()))
        assert (gradient - single[name]).norm() <= 1e-5 * scale, name


@torch.no_grad()
def test_nothing_is_said_beyond_the_end():
    encoded = embedder(7).encoder(clips(math.nan), LENGTHS)
    assert encoded.lengths_B.tolist() == [1, 32, 6, 1, 1, 12]
    beyond = torch.arange(32) >= encoded.lengths_B[:, None]
    assert not encoded.x_BSD[beyond].any()
    assert encoded.x_BSD[~beyond].any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("frames", [8 * 10, 8 * 20, 8 * 23, 8 * 23 - 3, 8 * 31])
def test_a_long_clip_is_its_chunks(frames: int):
    """Each chunk goes through the blocks as a clip of its own; the last one is just shorter."""
    encoder = embedder(chunk_tokens=10).encoder
    x_BTF, lengths_B = clips(0.0)[1:2, :frames], torch.tensor([frames])
    subsampled, _ = encoder.embed(encoder.encoder_embedding(x_BTF), lengths_B)
    chunks = [
        encoder.run_blocks(chunk, torch.tensor([chunk.shape[1]]))
        for chunk in subsampled.split(10, dim=1)
    ]
    whole = encoder(x_BTF, lengths_B).x_BSD
    torch.testing.assert_close(whole, torch.cat(chunks, dim=1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_chunks_do_not_see_each_other():
    encoder = embedder(chunk_tokens=10).encoder
    x_BTF, lengths_B = clips(0.0)[1:2], torch.tensor([250])
    changed = x_BTF.clone()
    changed[:, :73] += 1.0  # the eleventh token begins with frame 73
    before, after = encoder(x_BTF, lengths_B).x_BSD, encoder(changed, lengths_B).x_BSD
    assert torch.equal(before[:, 10:], after[:, 10:])
    assert (before[:, :10] - after[:, :10]).abs().amax(dim=(0, 2)).min() > 0


@torch.no_grad()
@pytest.mark.parametrize("stretch", [1, 2, 13])
def test_subsampling_by_stretches_is_subsampling(monkeypatch: pytest.MonkeyPatch, stretch: int):
    encoder, x_BTF = embedder().encoder, clips(math.nan)
    whole, lengths_B = encoder.embed(x_BTF, LENGTHS)
    monkeypatch.setattr(speech, "STRETCH_TOKENS", stretch)
    stretches, _ = encoder.embed(x_BTF, LENGTHS)
    heard = speech.within(lengths_B, whole.shape[1])
    torch.testing.assert_close(stretches[heard], whole[heard], atol=1e-5, rtol=0)


@given(samples=st.integers(400, 20_000))
def test_a_token_is_eight_frames_or_the_rest(samples: int):
    clip = audio_clip(np.ones(samples, np.float32))
    frames = (samples - 400) // 160 + 1
    assert clip.features_TF.shape == (frames, 80)
    assert clip.num_tokens == math.ceil(frames / 8)


@torch.no_grad()
def test_the_encoder_gives_the_tokens_that_the_prompt_has_places_for():
    assert audio.FRAMES_PER_TOKEN == speech.FRAMES_PER_TOKEN
    model = embedder()
    for samples in (400, 1_679, 1_680, 16_000):
        clip = audio_clip(np.linspace(-1, 1, samples, dtype=np.float32))
        features_BTF = torch.from_numpy(clip.features_TF)[None]
        lengths_B = torch.tensor([len(clip.features_TF)])
        [heard] = model(features_BTF, lengths_B, mode="vision")
        assert heard.shape == (clip.num_tokens, 48)


def test_the_defaults_are_those_of_the_published_model():
    with torch.device("meta"):
        model = AudioEmbedder(SpeechConfig(), d_model=3072)
    count = sum(parameter.numel() for parameter in model.parameters())
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert isinstance(model.encoder, SpeechEncoder)
    assert encoder == 441_238_144 and count - encoder == 2 * (3072 * (1024 + 3072) + 2 * 3072)
