"""Speech against transformers: encoder, projectors, gradients, features; and where it is wrong.

Its encoder is compared one clip at a time, because it lets clips of a batch touch each other. The
last tests show both values wherever the two part, and derive the difference.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from phikit.chat.audio import audio_clip, log_mel, mel_filters
from phikit.nn.speech import AudioEmbedder, SpeechConfig

transformers = pytest.importorskip("transformers", reason="the reference of these tests")
modeling = transformers.models.phi4_multimodal.modeling_phi4_multimodal

AUDIO_TOKEN = 7
D_MODEL = 48


class Pair(NamedTuple):
    ours: AudioEmbedder
    theirs: Any


@pytest.fixture(scope="module")
def pair() -> Pair:
    """One set of random weights in both; the biases of 26 tokens go beyond the longest distance."""
    config = SpeechConfig(
        d_model=32, num_layers=2, num_heads=4, d_mlp=24, subsampling_channels=8, bias_max_distance=9
    )
    ours = AudioEmbedder(config, D_MODEL)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in ours.state_dict().items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    audio_config = transformers.Phi4MultimodalAudioConfig(
        hidden_size=32,
        num_blocks=2,
        num_attention_heads=4,
        intermediate_size=24,
        ext_pw_out_channel=32,
        depthwise_separable_out_channel=32,
        nemo_conv_channels=8,
        bias_max_distance=9,
        audio_token_id=AUDIO_TOKEN,
        attn_implementation="eager",
    )
    whole = transformers.Phi4MultimodalConfig(
        audio_config=audio_config, hidden_size=D_MODEL, num_attention_heads=4
    )
    theirs = modeling.Phi4MultimodalAudioEmbedding(whole)
    theirs.load_state_dict(ours.state_dict())
    return Pair(ours.eval(), theirs.eval())


def features(frames: int, *, seed: int = 1) -> Tensor:
    return torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(seed))


def heard_by_ours(ours: AudioEmbedder, features_BTF: Tensor, mode: Any) -> Tensor:
    [clip] = ours(features_BTF, torch.tensor([features_BTF.shape[1]]), mode=mode)
    return clip


def heard_by_theirs(theirs: Any, features_BTF: Tensor, mode: str) -> Tensor:
    tokens = math.ceil(features_BTF.shape[1] / 8)
    return theirs(
        torch.full((1, tokens), AUDIO_TOKEN),
        torch.zeros(1, tokens, D_MODEL),
        features_BTF,
        audio_embed_sizes=[tokens],
        audio_projection_mode=mode,
    )[0]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["speech", "vision"])
@pytest.mark.parametrize("frames", [1, 7, 8, 9, 64, 203])
def test_one_clip(pair: Pair, frames: int, mode: str):
    x = features(frames)
    ours, theirs = heard_by_ours(pair.ours, x, mode), heard_by_theirs(pair.theirs, x, mode)
    assert ours.shape == (math.ceil(frames / 8), D_MODEL) and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_long_clip_whose_chunks_are_full(pair: Pair):
    x = features(8 * 1000)
    ours, theirs = (
        heard_by_ours(pair.ours, x, "speech"),
        heard_by_theirs(pair.theirs, x, "speech"),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_gradients(pair: Pair):
    x = features(150)
    weights = torch.randn(2, 19, D_MODEL, generator=torch.Generator().manual_seed(2))
    for model, heard in ((pair.ours, heard_by_ours), (pair.theirs, heard_by_theirs)):
        model.zero_grad()
        speech, vision = heard(model, x, "speech"), heard(model, x, "vision")
        (torch.stack([speech, vision]) * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    assert set(expected) == {name for name, _ in pair.ours.named_parameters()}
    for name, parameter in pair.ours.named_parameters():
        assert parameter.grad is not None
        scale = expected[name].norm()
        if name.endswith("k_proj.bias"):
            # It shifts all scores of a query alike: the gradient is zero, and both have noise.
            scale = expected[name.replace("bias", "weight")].norm()
            assert expected[name].norm() <= 1e-5 * scale
        distance = (parameter.grad - expected[name]).norm() / scale
        assert distance <= 1e-4, (name, float(distance))


# --- Where transformers is wrong ----------------------------------------------------------------


@torch.no_grad()
def test_their_mask_adds_one_where_it_should_forbid(pair: Pair):
    """Two clips of 26 and 10 tokens: may the short one attend to its 16 tokens of padding?

    With equal scores, truth gives the padding no weight at all. Adding 1.0 to the visible keys
    gives it 16 / (16 + 10 e) = 0.370.
    """
    batch = torch.cat([features(203), features(203, seed=2)])
    lengths = torch.tensor([203, 80])
    masks: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, given: masks.__setitem__(name, given[1].expand(2, -1, -1, -1))

    hooks = [
        model.encoder.encoders[0].register_forward_pre_hook(keep(name))
        for name, model in (("ours", pair.ours), ("theirs", pair.theirs))
    ]
    ours = pair.ours.encoder(batch, lengths).x_BSD[1, :10]
    theirs = pair.theirs.encoder(batch, torch.arange(203) < lengths[:, None])[1, :10]
    for hook in hooks:
        hook.remove()

    bias = pair.ours.encoder.relative_attention_bias_layer(26)[0]
    to_padding = {
        name: (mask[1] - bias).softmax(-1)[..., 10:].sum(-1) for name, mask in masks.items()
    }
    expected = torch.full((4, 26), 16 / (16 + 10 * math.e))
    torch.testing.assert_close(to_padding["theirs"], expected, atol=1e-5, rtol=0)
    assert torch.equal(to_padding["ours"], torch.zeros(4, 26))

    alone = pair.theirs.encoder(batch[1:, :80], None)[0]
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)
    assert (theirs - alone).abs().max() > 0.01


@torch.no_grad()
def test_their_convolutions_hear_the_padding(pair: Pair):
    """77 frames, alone and with 11 of padding behind: the tenth token reaches beyond the end."""
    padded, lengths = features(88), torch.tensor([77])
    alone = pair.theirs.encoder.embed(padded[:, :77], None)[0]
    batched = pair.theirs.encoder.embed(padded, torch.arange(88)[None] < 77)[0]
    ours = pair.ours.encoder.embed(padded, lengths).x_BSD
    torch.testing.assert_close(ours[:, :10], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(batched[:, :9], alone[:, :9], atol=1e-5, rtol=0)
    assert (batched[:, 9] - alone[:, 9]).abs().max() > 0.01


@torch.no_grad()
def test_their_long_clips_attend_to_what_fills_the_last_chunk(pair: Pair):
    """700 tokens are chunks of 500 and 200; theirs counts the 300 zeros behind as tokens."""
    x = features(8 * 700)
    encoder = pair.ours.encoder
    ours = encoder(x, torch.tensor([8 * 700])).x_BSD[0]
    theirs = pair.theirs.encoder(x, None)[0]
    torch.testing.assert_close(ours[:500], theirs[:500], atol=1e-5, rtol=0)
    assert (ours[500:] - theirs[500:]).abs().max() > 0.01

    subsampled = encoder.embed(encoder.encoder_embedding(x), torch.tensor([8 * 700])).x_BSD
    rest = torch.nn.functional.pad(subsampled[:, 500:], (0, 0, 0, 300))
    counted = encoder.run_blocks(rest, torch.tensor([500]))[0, :200]
    torch.testing.assert_close(counted, theirs[500:], atol=1e-5, rtol=0)
    forbidden = encoder.run_blocks(rest, torch.tensor([200]))[0, :200]
    torch.testing.assert_close(forbidden, ours[500:], atol=1e-5, rtol=0)


# --- Features -----------------------------------------------------------------------------------

BIN_246_WEIGHT = 0.009719097


def sounds() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    time_s = np.arange(16_123) / 16_000
    sounds = {
        "noise": generator.normal(0, 0.1, 16_123),
        "quiet noise": generator.normal(0, 1e-4, 4_000),
        "chirp": 0.5 * np.sin(2 * np.pi * (100 + 3800 * time_s) * time_s),
        "silence": np.zeros(1_000),
        "one frame": generator.normal(0, 0.1, 400),
        "a sample short of two": generator.normal(0, 0.1, 559),
        "two frames": generator.normal(0, 0.1, 560),
        "the top bin": 0.5 * np.sin(2 * np.pi * 7687.5 * time_s),
    }
    return {name: sound.astype(np.float32) for name, sound in sounds.items()}


def their_features(extractor: Any, samples: np.ndarray) -> Any:
    return extractor(samples, sampling_rate=16_000, return_tensors="np")


def test_filters():
    """One bin apart: 246 is at 7687.5 Hz, below the top of 7690 Hz, and SpeechLib leaves it out.

    Its weight would be its distance to the top, in spacings of the filters on the mel scale.
    """
    theirs = transformers.Phi4MultimodalFeatureExtractor().mel_filters
    top, at_bin = (1127 * math.log(1 + hz / 700) for hz in (7690, 7687.5))
    derived = (top - at_bin) / (top / 81)
    assert derived == pytest.approx(BIN_246_WEIGHT, abs=1e-9)
    difference = theirs - mel_filters()
    assert difference[246, 79] == pytest.approx(derived, abs=1e-9)
    difference[246, 79] = 0
    assert np.abs(difference).max() <= 1e-9


@pytest.mark.parametrize("name", list(sounds()))
def test_features(name: str):
    samples = sounds()[name]
    extractor = transformers.Phi4MultimodalFeatureExtractor()
    extractor.mel_filters[246, 79] = 0
    theirs = their_features(extractor, samples)
    clip = audio_clip(samples)
    np.testing.assert_allclose(
        clip.features_TF, theirs["audio_input_features"][0], atol=1e-5, rtol=0
    )
    assert clip.num_tokens == theirs["audio_embed_sizes"][0]


@pytest.mark.parametrize("name", ["noise", "the top bin"])
def test_features_with_the_bin_they_add(name: str):
    """All bands but the last are equal; theirs is ln(exp(ours) + weight * power of bin 246)."""
    samples = sounds()[name]
    extractor = transformers.Phi4MultimodalFeatureExtractor()
    theirs = their_features(extractor, samples)["audio_input_features"][0]
    extractor.mel_filters[:] = 0
    extractor.mel_filters[246] = 1
    power = np.exp(their_features(extractor, samples)["audio_input_features"][0, :, 79])
    ours = log_mel(samples)
    np.testing.assert_allclose(ours[:, :79], theirs[:, :79], atol=1e-5, rtol=0)
    derived = np.log(np.exp(ours[:, 79].astype(np.float64)) + BIN_246_WEIGHT * power)
    np.testing.assert_allclose(derived, theirs[:, 79], atol=1e-5, rtol=0)
    assert (theirs[:, 79] - ours[:, 79]).min() > 0
