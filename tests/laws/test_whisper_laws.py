"""Laws of a model that hears by Whisper's encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from phikit.base.errors import ChatError, MissingExtraError, WeightsError
from phikit.base.media import SPEECH, Media
from phikit.chat.audio import AudioClip
from phikit.models.decoder import Decoder
from phikit.models.modality import AdapterConfig
from phikit.models.whisper import WhisperHearing, WhisperModality
from phikit.nn.whisper import WhisperConfig, WhisperEncoder
from phikit.weights.surgery import attach, detach, load_modalities, save_modalities, train_only

EARS = WhisperModality(
    encoder=WhisperConfig(d_model=16, num_layers=2, num_heads=2, d_mlp=24, max_positions=64),
    window_seconds=0.6,
    adapter=AdapterConfig(rank=2, alpha=4.0),
)
TEXT = torch.arange(10, 26)[None]


def sound(samples: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.uniform(-0.3, 0.3, samples).astype(np.float32)


def hearing(model: Decoder) -> WhisperHearing:
    sense = model.senses[SPEECH]
    assert isinstance(sense, WhisperHearing)
    return sense


def said(model: Decoder, clip: AudioClip) -> torch.Tensor:
    tokens = torch.full((1, 16), 7)
    tokens[0, 1 : 1 + clip.num_tokens] = model.senses[SPEECH].token
    return model(tokens, media=[Media((), (clip,))])


@torch.no_grad()
def test_a_clip_in_a_batch_is_the_clip_alone(tiny_model):
    model = tiny_model()
    attach(model, EARS)
    clips = [EARS.prepare(sound(n, seed=n)) for n in (400, 3000, 9600)]
    together = hearing(model)(clips, leader=SPEECH)
    for clip, found in zip(clips, together, strict=True):
        assert len(found) == clip.num_tokens
        [alone] = hearing(model)([clip], leader=SPEECH)
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_was_heard_before_is_the_same(tiny_model):
    """A frozen encoder's work is done once; done and new clips may stand side by side."""
    model = tiny_model()
    attach(model, EARS)
    clips = [EARS.prepare(sound(n, seed=n)) for n in (2000, 5000)]
    done = hearing(model).encoded(clips)
    assert [each.num_tokens for each in done] == [each.num_tokens for each in clips]
    expected = hearing(model)(clips, leader=SPEECH)
    for items in (done, [clips[0], done[1]], [done[0], clips[1]]):
        for a, b in zip(hearing(model)(items, leader=SPEECH), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("samples", "tokens"), [(400, 1), (1280, 1), (1281, 2), (9_599, 8), (9_600, 8)]
)
def test_a_token_is_80_ms(samples: int, tokens: int):
    clip = EARS.prepare(sound(samples))
    assert clip.num_tokens == tokens
    assert clip.features_TF.shape == (64, 80)  # 0.6 s, up to a whole token


@pytest.mark.parametrize(
    ("samples", "fault"),
    [
        (sound(399), "lasts 24.9 ms"),
        (sound(9_601), "longer than 0.6 s"),
        (sound(900).astype(np.float64), "float64"),
        (np.full(900, np.nan, np.float32), "not numbers"),
        (7, "given as int"),
        (Path("nowhere.wav"), "nowhere.wav"),
    ],
)
def test_clips_that_cannot_be_used(samples: object, fault: str):
    with pytest.raises(ChatError, match=fault):
        EARS.prepare(samples)


def test_text_keeps_its_bits(tiny_model):
    bare, model = tiny_model(), tiny_model()
    attach(model, EARS)
    clip = EARS.prepare(sound(3000))
    for part in ("projector", "encoder", "adapter"):
        learning = train_only(model, {SPEECH: (part,)})
        model.zero_grad()
        said(model, clip).square().mean().backward()
        assert any(p.grad is not None and p.grad.any() for p in learning)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        with torch.no_grad():
            for p in learning:
                p -= 0.1 * (p.grad if p.grad is not None else 0)
        assert torch.equal(model(TEXT), bare(TEXT))
    detach(model, SPEECH)
    assert torch.equal(model(TEXT), bare(TEXT))


def test_a_saved_model_needs_no_checkpoint(tmp_path: Path, tiny_model):
    """What it started from may be gone when it is loaded."""
    start = tmp_path / "whisper"
    start.mkdir()
    state = WhisperEncoder(EARS.encoder).state_dict()
    tensors = {f"model.encoder.{name}": 0.5 + 0 * tensor for name, tensor in state.items()}
    save_file(tensors, start / "model.safetensors")
    model = tiny_model()
    attach(model, EARS.model_copy(update={"start": str(start)}))
    assert torch.equal(hearing(model).encoder.conv1.weight, tensors["model.encoder.conv1.weight"])
    save_modalities(tmp_path, model)
    (start / "model.safetensors").unlink()
    again = tiny_model()
    load_modalities(tmp_path, again)
    clip = EARS.prepare(sound(3000))
    with torch.no_grad():
        assert torch.equal(said(again, clip), said(model, clip))


def test_a_checkpoint_that_is_missing(tmp_path: Path, tiny_model):
    model = tiny_model()
    with pytest.raises((WeightsError, MissingExtraError)):
        attach(model, EARS.model_copy(update={"start": str(tmp_path)}))
    assert not model.senses
