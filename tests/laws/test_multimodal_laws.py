"""One batch may mix all kinds of rows: each is as alone, and text is the base bit for bit."""

import pytest
import torch
from torch import Tensor

from phikit.base.errors import ChatError, ConfigError
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.models.multimodal import Media, MultimodalModel
from phikit.nn.lora import LoRALinear, adapter_parameters, choose_adapter, route_adapters

IMAGE, AUDIO = 310, 311
TEXT = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def model(tiny_multimodal) -> MultimodalModel:
    return tiny_multimodal()


@pytest.fixture(scope="module")
def rows(tiny_image, tiny_clip) -> list[tuple[list[int], Media | None]]:
    """Text, speech, two clips of different length, vision, vision and speech, text again."""
    small, large = tiny_image(1, 1, seed=1), tiny_image(2, 2, hidden=(3, 2), seed=2)
    short, long = tiny_clip(17, seed=3), tiny_clip(90, seed=4)
    seen = [*[IMAGE] * small.num_tokens, *TEXT[:3], *[IMAGE] * large.num_tokens]
    both = [*[AUDIO] * short.num_tokens, *seen, *TEXT[9:11], *[AUDIO] * long.num_tokens]
    return [
        (TEXT[:30], None),
        ([*TEXT[:2], *[AUDIO] * long.num_tokens, *TEXT[2:9]], Media(clips=(long,))),
        ([AUDIO] * (short.num_tokens + long.num_tokens) + TEXT[:4], Media(clips=(short, long))),
        ([*seen, *TEXT[20:26]], Media(images=(small, large))),
        (both, Media((small, large), (short, long))),
        (TEXT[5:22], Media()),
    ]


def padded(rows: list[tuple[list[int], Media | None]]) -> Tensor:
    width = max(len(tokens) for tokens, _ in rows)
    return torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens, _ in rows])


@torch.no_grad()
def test_a_mixed_batch_is_each_row_alone(model: MultimodalModel, rows):
    together = model(padded(rows), media=[media for _, media in rows])
    for i, (tokens, media) in enumerate(rows):
        alone = model(torch.tensor([tokens]), media=[media])[0]
        torch.testing.assert_close(together[i, : len(tokens)], alone, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_rows_are_the_base_bit_for_bit(tiny_multimodal, rows, dtype):
    """The same batch through a model that has no adapters at all."""
    model = tiny_multimodal().to(dtype)
    bare = tiny_multimodal(vision_lora=None, speech_lora=None)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    tokens, media = padded(rows), [media for _, media in rows]
    mixed, base = model(tokens, media=media), bare.to(dtype)(tokens, media=media)
    for row in (0, 5):
        assert torch.equal(mixed[row], base[row])
    for row in (1, 2, 3, 4):
        assert not torch.allclose(mixed[row], base[row], atol=0.1)
    text = tokens[[0, 5]]
    assert torch.equal(model(text), bare(text))
    assert torch.equal(model(text, media=[None, None]), bare(text))


@torch.no_grad()
def test_what_a_row_contains_decides_its_adapter(model: MultimodalModel, rows):
    """Chosen by hand for a whole batch of like rows, the adapter gives the same."""
    for i, name in ((0, None), (1, "speech"), (2, "speech"), (3, "vision"), (4, "vision")):
        tokens, media = torch.tensor([rows[i][0]] * 2), [rows[i][1]] * 2
        assert model.adapters_for(media) == [name, name]
        routed = model(tokens, media=media)
        with route_adapters(model, [name, name]):
            by_hand = model.logits(model.run_blocks(model.embed(tokens, media=media)))
        assert torch.equal(routed, by_hand)


@torch.no_grad()
def test_clips_beside_an_image_take_the_other_projector(model: MultimodalModel, rows, tiny_image):
    tokens, media = rows[1]
    image = tiny_image(1, 1)
    beside = Media((image,), media.clips)
    alone = model.embed(torch.tensor([tokens]), media=[media])[0]
    both = model.embed(torch.tensor([[*tokens, *[IMAGE] * image.num_tokens]]), media=[beside])[0]
    is_audio = torch.tensor(tokens) == AUDIO
    assert torch.equal(both[: len(tokens)][~is_audio], alone[~is_audio])
    assert not torch.allclose(both[: len(tokens)][is_audio], alone[is_audio], atol=0.01)


@torch.no_grad()
def test_new_adapters_change_nothing(model: MultimodalModel, rows):
    fresh = MultimodalModel(model.config).initialise(torch.Generator().manual_seed(3))
    bare = MultimodalModel(model.config.model_copy(update={"vision_lora": None}))
    bare.load_state_dict({k: v for k, v in fresh.state_dict().items() if ".vision." not in k})
    tokens, media = padded(rows), [media for _, media in rows]
    assert torch.equal(fresh(tokens, media=media), bare(tokens, media=media))


def test_gradients_reach_what_a_row_used(tiny_multimodal, rows):
    """Of a mixed batch each row's loss reaches its own adapter alone."""
    model = tiny_multimodal()
    for row, name in ((0, None), (1, "speech"), (3, "vision")):
        model.zero_grad()
        model(padded(rows), media=[media for _, media in rows])[row].square().mean().backward()
        for other in ("vision", "speech"):
            gradients = [p.grad for p in adapter_parameters(model, other)]
            assert any(g is not None and bool(g.any()) for g in gradients) == (other == name)


@torch.no_grad()
def test_the_route_ends_with_its_pass(model: MultimodalModel, rows):
    tokens = torch.tensor([TEXT[:20]])
    before = model(tokens)
    model(padded(rows), media=[media for _, media in rows])
    with route_adapters(model, ["vision"]):
        assert not torch.equal(model(tokens), before)
    with pytest.raises(RuntimeError), route_adapters(model, ["vision"]):
        model(tokens[..., None, None])
    assert torch.equal(model(tokens), before)
    with pytest.raises(ConfigError, match=r"no adapter 'smell'\n.*it has vision, speech"):
        choose_adapter(model, "smell")


def test_placeholders_must_fit_their_media(model: MultimodalModel, rows):
    tokens, media = rows[3]
    for given in (media, None):
        broken = tokens[1:] if given else tokens
        counts = f"{broken.count(IMAGE)} image and 0 audio placeholders; its media take "
        needed = sum(image.num_tokens for image in given.images) if given else 0
        with pytest.raises(ChatError, match=f"row 1 has {counts}{needed} and 0"):
            model(torch.tensor([TEXT[: len(broken)], broken]), media=[None, given])
        with pytest.raises(ChatError, match=f"the prompt has {counts}{needed} and 0"):
            Engine(model).generate([Request(broken, max_new_tokens=1, media=given)])


def requests(rows: list[tuple[list[int], Media | None]], **options) -> list[Request]:
    return [Request(tokens, temperature=0.0, media=media, **options) for tokens, media in rows]


def test_a_mixed_batch_generates_as_each_alone(model: MultimodalModel, rows):
    """Rows end at different steps, so the grid is compacted on the way."""
    asked = [
        Request(tokens, max_new_tokens=length, temperature=0.0, media=media, num_samples=2)
        for (tokens, media), length in zip(rows, (40, 3, 25, 40, 9, 2), strict=True)
    ]
    together = Engine(model).generate(asked)
    for request, completions in zip(asked, together, strict=True):
        [alone] = Engine(model).generate([request])
        assert [c.tokens for c in completions] == [c.tokens for c in alone]


@torch.no_grad()
def test_generation_is_the_uncached_run(model: MultimodalModel, rows):
    for (tokens, media), [completion] in zip(
        rows, Engine(model).generate(requests(rows, max_new_tokens=20)), strict=True
    ):
        said = list(tokens)
        for token in completion.tokens:
            assert token == int(model(torch.tensor([said]), media=[media])[0, -1].argmax())
            said.append(token)


def test_generation_across_longropes_switch(tiny_multimodal, rows):
    """Prefilled again with its media, at one step, for the row that outgrows its context."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.0, 1.4, 2.2, 3.1, 4.5, 7.9]}
    length = len(rows[3][0])
    model = tiny_multimodal(longrope={**factors, "original_context": length + 5})
    [[completion]] = Engine(model).generate(requests(rows[3:4], max_new_tokens=12))
    said = list(rows[3][0])
    with torch.no_grad():
        for token in completion.tokens:
            assert token == int(model(torch.tensor([said]), media=[rows[3][1]])[0, -1].argmax())
            said.append(token)


def test_a_request_may_name_its_adapter(model: MultimodalModel):
    named = [
        Request(TEXT[:20], max_new_tokens=12, temperature=0.0, adapter=name)
        for name in (None, "vision", "speech")
    ]
    together = [completion.tokens for [completion] in Engine(model).generate(named)]
    for request, tokens in zip(named, together, strict=True):
        choose_adapter(model, request.adapter)
        [[alone]] = Engine(model).generate([Request(TEXT[:20], 12, temperature=0.0)])
        assert alone.tokens == tokens
    choose_adapter(model, None)
    assert len({tuple(tokens) for tokens in together}) == 3
    with pytest.raises(ConfigError, match="no adapter 'smell'"):
        Engine(model).generate([Request(TEXT[:20], 12, adapter="smell")])


def test_a_text_model_refuses_media(tiny_model, tiny_clip):
    clip = tiny_clip(8)
    with pytest.raises(ChatError, match="reads text only"):
        Engine(tiny_model()).generate([Request([1, 2], 3, media=Media(clips=(clip,)))])


def test_encoders_carry_no_adapters(model: MultimodalModel):
    """Their linears bear the same names as those of the blocks."""
    carriers = [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(carriers) == 4 * model.config.num_layers
    assert all(name.startswith("model.layers.") for name in carriers)
