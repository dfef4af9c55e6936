"""A text model with modalities is the text model, bit for bit; and detached it is it again."""

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.modalities import MODALITIES, ROWS, Mixed, clip, example, image, mixed, series, taught

from phikit.base.errors import ChatError, ConfigError, WeightsError
from phikit.base.media import Media, of_items
from phikit.chat.message import Message
from phikit.chat.render import renderer_for
from phikit.generate.engine import Engine
from phikit.generate.language_model import of
from phikit.generate.request import Request
from phikit.generate.speculate import DraftModel, PromptLookup
from phikit.models.decoder import Decoder
from phikit.models.moe import MoEConfig, MoEModel
from phikit.models.phi import PhiConfig, PhiModel
from phikit.nn.lora import (
    LoRALinear,
    attach_lora,
    choose_adapter,
    merge_lora,
    route_adapters,
    route_of,
)
from phikit.weights.load import Loaded, load
from phikit.weights.save import save
from phikit.weights.surgery import adapt, attach, attached, detach, merge, parts, train_only

TEXT = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(7))
SIZES = {"vocab_size": 300, "d_model": 48, "num_layers": 2, "d_mlp": 64, "max_context": 128}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "init_std": 0.12}


def llama(make: Callable[..., Decoder]) -> Decoder:
    """The shape of SmolLM2, whose checkpoints keep q, k, v apart."""
    return make(layout="llama", partial_rotary=1.0)


def moe(make: Callable[..., Decoder]) -> Decoder:
    config = MoEConfig.model_validate({**SIZES, **HEADS, "num_experts": 4})
    return MoEModel(config).initialise(torch.Generator().manual_seed(0))


def parallel(make: Callable[..., Decoder]) -> Decoder:
    config = PhiConfig.model_validate({**SIZES, **HEADS, "num_kv_heads": 4})
    return PhiModel(config).initialise(torch.Generator().manual_seed(0))


FAMILIES = {"phi3": lambda make: make(), "llama": llama, "moe": moe, "phi": parallel}


@pytest.fixture(params=FAMILIES.values(), ids=list(FAMILIES))
def bare(request: pytest.FixtureRequest, tiny_model: Callable[..., Decoder]) -> Decoder:
    return request.param(tiny_model)


def base_weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".adapters." not in name and not name.startswith("modalities.")
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def replies(model: Decoder) -> list[tuple[list[int], list[float]]]:
    asked = [Request(row.tolist(), 12, temperature=0.0) for row in TEXT]
    return [(c.tokens, c.log_probs) for [c] in Engine(model).generate(asked)]


@torch.no_grad()
def test_text_is_the_backbones_and_detached_all_is(bare: Decoder):
    """Logits, replies, weights; with all modalities attached, each detached, and none left."""
    weights, logits, said = base_weights(bare), bare(TEXT), replies(bare)
    model = taught(copy.deepcopy(bare))
    assert [*attached(model)] == ["vision", "speech", "sensor"]
    for name in ("speech", "vision", "sensor", None):
        assert torch.equal(model(TEXT), logits)
        assert torch.equal(model(TEXT, media=[None, Media(), None]), logits)
        assert replies(model) == said
        assert_same(base_weights(model), weights)
        if name is not None:
            detach(model, name)
    assert_same(dict(model.state_dict()), dict(bare.state_dict()))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in bare.modules()]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_rows_of_a_mixed_batch_are_the_backbones(tiny_model, dtype):
    bare = tiny_model().to(dtype)
    model = taught(tiny_model().to(dtype))
    batch = mixed(model)
    found = model(batch.tokens_BT, media=batch.media)
    same_shape = bare(batch.tokens_BT.clamp(max=299))
    for row in range(len(batch.media)):
        assert torch.equal(found[row], same_shape[row]) == (row in batch.text)


def test_gradients_of_text_rows_are_the_backbones(tiny_model):
    """Of all weights of the text model, from text alone and out of a mixed batch."""
    bare, model = tiny_model(), taught(tiny_model())
    batch = mixed(model)
    cases = (
        (TEXT, None, [0, 1, 2]),
        (batch.tokens_BT, batch.media, batch.text),
    )
    for tokens, media, rows in cases:
        for each in (bare, model):
            each.zero_grad()
        model(tokens, media=media)[rows].square().mean().backward()
        bare(tokens.clamp(max=299))[rows].square().mean().backward()
        found = dict(model.named_parameters())
        for name, parameter in bare.named_parameters():
            gradient = found[name].grad
            assert gradient is not None and parameter.grad is not None
            assert torch.equal(gradient, parameter.grad), name
        for name, parameter in model.named_parameters():
            if ".adapters." in name or name.startswith("modalities."):
                assert parameter.grad is None or not parameter.grad.any(), name


@torch.no_grad()
def test_replies_to_text_beside_media_are_the_backbones(tiny_model):
    """At equal shapes: the backbone is asked as long texts in the place of media."""
    bare, model = tiny_model(), taught(tiny_model())
    batch = mixed(model)

    def ask(each: Decoder, media: list[Media | None]) -> list[tuple[list[int], list[float]]]:
        tokens = batch.tokens_BT if each is model else batch.tokens_BT.clamp(max=299)
        asked = [
            Request(row.tolist(), 9, temperature=0.0, media=of_row)
            for row, of_row in zip(tokens, media, strict=True)
        ]
        return [(c.tokens, c.log_probs) for [c] in Engine(each).generate(asked)]

    found, expected = ask(model, batch.media), ask(bare, [None] * len(batch.media))
    for row in range(len(batch.media)):
        assert (found[row] == expected[row]) == (row in batch.text)


def test_placeholders_disturb_neither_drafts_nor_penalties(tiny_model):
    """Their ids lie beyond the vocabulary, of the logits and of a draft model."""
    model = taught(tiny_model())
    batch = mixed(model)
    asked = [
        Request(row.tolist(), 9, temperature=0.0, repetition_penalty=1.3, media=media)
        for row, media in zip(batch.tokens_BT, batch.media, strict=True)
    ]
    expected = [c.tokens for [c] in Engine(model).generate(asked)]
    for drafter in (PromptLookup(shortest=1), DraftModel(tiny_model(seed=3))):
        found = [c.tokens for [c] in Engine(model, drafter=drafter).generate(asked)]
        assert found == expected


@torch.no_grad()
def test_a_mixed_batch_is_each_row_alone(tiny_model):
    model = taught(tiny_model())
    batch = mixed(model)
    together = model(batch.tokens_BT, media=batch.media)
    for row, media in enumerate(batch.media):
        alone = model(batch.tokens_BT[row : row + 1], media=[media])[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_a_row_contains_decides(tiny_model):
    """Vision leads speech, both lead the sensor, in whatever order they were attached."""
    for order in (MODALITIES, MODALITIES[::-1]):
        model = taught(tiny_model(), *order)
        assert model.adapters_for(list(ROWS.values())) == [
            None, "speech", "vision", "vision", "sensor", None,
        ]  # fmt: skip
        heard = of_items({"speech": (clip(),), "sensor": (series(),)})
        seen = of_items({"vision": (image(),), "sensor": (series(),)})
        assert model.adapters_for([heard, seen]) == ["speech", "vision"]
        row = example(model, heard)
        tokens = torch.from_numpy(row.tokens).long()[None]
        routed = model(tokens, media=[heard])
        with route_adapters(model, ["speech"]):
            by_hand = model.logits(model.run_blocks(model.embed(tokens, media=[heard])))
        assert torch.equal(routed, by_hand)
    assert torch.equal(model(TEXT), tiny_model()(TEXT))


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tiny_model, nano_tokenizer, tmp_path: Path):
    """And the text model beside it is the file that it would be without modalities."""
    renderer = renderer_for(nano_tokenizer, "phi4-mini")
    for layout in ("phi3", "llama"):
        make = lambda: tiny_model(layout=layout, partial_rotary=1.0)  # noqa: B023, E731
        plain, folder = tmp_path / f"{layout}-plain", tmp_path / layout
        save(plain, Loaded(make(), nano_tokenizer, renderer))
        model = taught(make())
        detach(model, "speech")  # a gap among the placeholders
        batch = example(model, of_items({"sensor": (series(),), "vision": (image(),)}))
        save(folder, Loaded(model, nano_tokenizer, renderer))
        again = load(folder).model
        assert attached(again) == attached(model)
        assert again.media_ids == model.media_ids == {"image": 300, "sensor": 302}
        tokens = torch.from_numpy(batch.tokens).long()[None]
        assert torch.equal(again(tokens, media=[batch.media]), model(tokens, media=[batch.media]))
        assert all(parameter.requires_grad for parameter in again.parameters())
        for file in plain.iterdir():
            assert hash_of(file) == hash_of(folder / file.name), file.name
        detach(model, "vision")
        save(folder, Loaded(model, nano_tokenizer, renderer))
        assert [*attached(load(folder).model)] == ["sensor"]


def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def test_merged_it_runs_the_same_without_the_adapter(tiny_model):
    model = taught(tiny_model(), MODALITIES[0])
    row = example(model, ROWS["vision"])
    tokens = torch.from_numpy(row.tokens).long()[None]
    before = model(tokens, media=[row.media])
    merge(model, "vision")
    torch.testing.assert_close(model(tokens, media=[row.media]), before, atol=1e-5, rtol=0)
    assert attached(model)["vision"].adapter is None
    assert not torch.allclose(model(TEXT), tiny_model()(TEXT), atol=0.1)


def test_a_conversation_with_a_series(tiny_model, nano_tokenizer, chatml_tokenizer):
    """By every way a message is rendered; the placeholder of the third modality is its own."""
    for tokenizer, name in ((nano_tokenizer, "phi4-mini"), (chatml_tokenizer, "smollm2")):
        model = taught(tiny_model())
        talker = of(Loaded(model, tokenizer, renderer_for(tokenizer, name)))
        series_of = {"sensor": [[0.5] * 9]}
        asked = [Message("user", "A <|sensor_1|> B?")]
        request = talker.request(asked, others=series_of, max_new_tokens=3)
        assert request.prompt.count(302) == 2
        assert talker.answer(request, is_chat=True).tokens
        with pytest.raises(ChatError, match=r"the modality 'smell'.*has not"):
            talker.request(asked, others={"smell": [1]})
        with pytest.raises(ChatError, match="1 to 4096 finite numbers"):
            talker.request(asked, others={"sensor": [[float("nan")]]})
        decoded = tokenizer.decode(request.prompt)
        assert "A " in decoded and "sensor" not in decoded


@torch.no_grad()
def test_what_was_merged_is_not_read_again(tiny_multimodal, tmp_path: Path, nano_tokenizer):
    """Saved over the model that it came from, whose adapters lie there."""
    loaded = Loaded(tiny_multimodal(), nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini"))
    attach(loaded.model, MODALITIES[2])
    save(tmp_path, loaded)
    detach(loaded.model, "sensor")
    merge_lora(loaded.model, "vision", others="drop")
    save(tmp_path, loaded)
    again = load(tmp_path).model
    assert route_of(again).names == [] and not [*tmp_path.glob("*-lora"), *tmp_path.glob("sensor*")]
    assert torch.equal(again(TEXT), loaded.model(TEXT))


def test_names_and_loans_that_cannot_work_are_refused(tiny_model):
    vision, _, sensor = MODALITIES
    model = taught(tiny_model(), vision)
    for name in ("a/b", "Radar", "depth_map", "type", "forward", "image"):
        with pytest.raises(ConfigError, match=f"cannot be called '{name}'"):
            attach(model, sensor.model_copy(update={"name": name}))
    with pytest.raises(ConfigError, match="is not lower case letters"):
        sensor.override(["name=../up"])
    with pytest.raises(ConfigError, match="an adapter of its own borrows none"):
        sensor.override(["borrows=vision"])
    with pytest.raises(ConfigError, match="borrows the adapter of 'visoin', which there is not"):
        attach(model, sensor.override(["adapter=null", "borrows=visoin"]))
    with pytest.raises(ConfigError, match="has an adapter 'vision' already"):
        attach_lora(model, name="vision", targets=("o_proj",), rank=1, alpha=1.0)
    with pytest.raises(ConfigError, match="'vision' has no encodr"):
        train_only(model, {"vision": ("encodr",)})  # pyright: ignore[reportArgumentType]
    borrower = taught(tiny_model(), vision, sensor.override(["adapter=null", "borrows=vision"]))
    for take in (detach, merge):
        with pytest.raises(ConfigError, match="'sensor' borrows the adapter of 'vision'"):
            take(borrower, "vision")


def test_what_cannot_be_is_refused(tiny_model, tiny_multimodal, tmp_path: Path, nano_tokenizer):
    vision, speech, sensor = MODALITIES
    model = taught(tiny_model(), vision)
    with pytest.raises(ConfigError, match="has 'vision' already"):
        attach(model, vision)
    with pytest.raises(ConfigError, match="has 'speech' already"):
        attach(tiny_multimodal(), speech)
    with pytest.raises(ConfigError, match="no modality 'smell' is attached"):
        detach(model, "smell")
    with pytest.raises(ConfigError, match="no modality 'speech'"):
        parts(model, "speech")
    wrong = sensor.override(['adapter={"rank": 1, "alpha": 1.0, "targets": ["query"]}'])
    with pytest.raises(ConfigError, match="no linear layer 'query'"):
        attach(model, wrong)
    assert [*attached(model)] == ["vision"]
    attach(model, speech.model_copy(update={"adapter": None}))
    with pytest.raises(ConfigError, match="'speech' has no adapter"):
        train_only(model, {"speech": ("adapter",)})
    with pytest.raises(ChatError, match=r"row 0 has 0 image and 0 audio placeholders"):
        model(TEXT[:1], media=[Media(images=(image(),))])
    with pytest.raises(ChatError, match="the modality 'sensor', which the model has not"):
        model(TEXT[:1], media=[of_items({"sensor": (series(),)})])
    with pytest.raises(ChatError, match="attach a modality"):
        tiny_model()(TEXT[:1], media=[Media(images=(image(),))])
    with pytest.raises(ConfigError, match="no adapter"):
        choose_adapter(tiny_model(), "vision")
    save(tmp_path, Loaded(model, nano_tokenizer, renderer_for(nano_tokenizer, "phi4-mini")))
    about = tmp_path / "vision-modality" / "config.json"
    saved = about.read_text()
    about.write_text(saved.replace('"kind": "vision"', '"kind": "visoin"'))
    with pytest.raises(ConfigError, match=r"kind 'visoin'[\s\S]*nearest is 'vision'"):
        load(tmp_path)
    about.write_text(saved.replace('"d_mlp": 40', '"d_mlp": 44'))
    with pytest.raises(WeightsError, match="does not fit its config"):
        load(tmp_path)
    about.write_text(saved.replace('"d_mlp": 40', '"d_mlp": 80000000000'))
    with pytest.raises(WeightsError, match="does not fit its config"):  # and nothing is allocated
        load(tmp_path)
    for token in ("5", "-7", "1e400", str(2**70)):
        about.write_text(re.sub('"token": [0-9]+', f'"token": {token}', saved))
        with pytest.raises(WeightsError, match=r"the token|does not describe"):
            load(tmp_path)
    about.write_text(saved.replace('"name": "vision"', '"name": "speech"'))
    with pytest.raises(WeightsError, match="another's name or token"):
        load(tmp_path)
    about.write_text("{")
    with pytest.raises(WeightsError, match="does not describe a modality"):
        load(tmp_path)


@torch.no_grad()
def test_the_official_model_takes_a_third_modality(tiny_multimodal):
    model = taught(tiny_multimodal(), MODALITIES[2])
    assert [*model.senses] == ["vision", "speech", "sensor"]
    assert model.media_ids == {"image": 310, "audio": 311, "sensor": 320}
    row = example(model, ROWS["sensor"])
    tokens = torch.from_numpy(row.tokens).long()[None]
    assert model.adapters_for([row.media]) == ["sensor"]
    assert model(tokens, media=[row.media]).isfinite().all()
    detach(model, "sensor")
    assert_same(dict(model.state_dict()), dict(tiny_multimodal().state_dict()))


def test_the_page_prints_the_third_modality():
    """docs/multimodal.md shows the code that these laws attach, and it is about a hundred lines."""
    root = Path(__file__).parents[2]
    code = (root / "tests" / "sensor.py").read_text().partition("\n\n")[2]
    code = code[code.index("from collections") :]
    assert code in (root / "docs" / "multimodal.md").read_text()
    assert len(code.splitlines()) < 100


def test_mixed_rows_are_of_one_shape(tiny_model):
    batch: Mixed = mixed(taught(tiny_model()))
    assert batch.text == [0, 5] and batch.tokens_BT.shape == (6, 48)


def test_what_an_encoder_has_seen_already_is_seen_the_same(tiny_model: Callable[..., Decoder]):
    """Up to the rounding of another batch; a batch may hold items of both kinds."""
    model = taught(tiny_model(), *MODALITIES[:2])
    sight, hearing = model.senses["vision"], model.senses["speech"]
    for sense, items, leader in (
        (sight, [image(1), image(2)], "vision"),
        (hearing, [clip(30, 1), clip(44, 2)], "speech"),
        (hearing, [clip(17, 3)], "vision"),
    ):
        with torch.no_grad():
            expected = sense(items, leader=leader)
            done = sense.encoded(items)
            assert [each.num_tokens for each in done] == [each.num_tokens for each in items]
            for mixed_items in (done, [*items[:1], *done[1:]]):
                for a, b in zip(expected, sense(mixed_items, leader=leader), strict=True):
                    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_an_image_without_its_overview_is_told_as_far_as_its_crops(tiny_model):
    model = taught(tiny_model(), drawn=False)
    sight = model.senses["vision"]
    whole, bare = image(3), replace(image(3), overview=False)
    with torch.no_grad():
        [both], [alone] = sight([whole]), sight([bare])
        [again] = sight(sight.encoded([bare]))
    assert len(alone) == bare.num_tokens < len(both) == whole.num_tokens
    assert torch.equal(both[: len(alone)], alone) and torch.equal(alone, again)


def test_a_modality_may_borrow_an_adapter(tiny_model: Callable[..., Decoder]):
    """Then its rows run on that one, and those of text on none."""
    vision, speech = MODALITIES[:2]
    borrower = speech.model_copy(update={"adapter": None, "borrows": "vision"})
    model = taught(tiny_model(), vision, borrower)
    rows = [ROWS["text"], ROWS["speech"], ROWS["vision"], ROWS["both"]]
    assert model.adapters_for(rows) == [None, "vision", "vision", "vision"]


def test_an_adapter_may_come_later(tiny_model: Callable[..., Decoder]):
    """An encoder starts without; given its adapter then, it is what it is attached with one."""
    vision, speech = MODALITIES[:2]
    borrower = speech.model_copy(update={"adapter": None, "borrows": "vision"})
    whole, later = tiny_model(), tiny_model()
    for model, modalities in ((whole, (vision, borrower)), (later, (vision, speech))):
        for modality in modalities:
            attach(model, modality if model is whole else modality.without_adapter(), seed=3)
    assert later.adapters_for([ROWS["vision"]]) == [None]
    for modality in (vision, borrower):
        adapt(later, modality, seed=3)
    assert_same(whole.state_dict(), later.state_dict())
    assert attached(whole) == attached(later)
    rows = [ROWS["speech"], ROWS["vision"]]
    assert later.adapters_for(rows) == whole.adapters_for(rows) == ["vision", "vision"]
    with pytest.raises(ConfigError, match="'vision' was attached with an adapter"):
        adapt(later, vision)
