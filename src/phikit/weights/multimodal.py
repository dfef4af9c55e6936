"""The two layouts in which Phi-4-multimodal is published, under one set of names.

- Microsoft's (`model_type: "phi4mm"`): base and both adapters in the same files, the adapted
  linears under `base_layer`, encoders and projectors under the names of Microsoft's code.
- That of transformers (`"phi4_multimodal"`): the names of its modules, and each adapter in a
  folder in PEFT's layout, `vision-lora/` and `speech-lora/`. The model is saved like this.

`open_checkpoint` shows either as `models.multimodal.checkpoint_parts` names it. The renaming is
that of `convert_phi4_multimodal_weights_to_hf.py` in transformers.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from phikit.base.errors import WeightsError
from phikit.models.decoder import DecoderConfig
from phikit.models.multimodal import SPEECH, VISION, MultimodalConfig, adapter_folder
from phikit.weights.adapter import CONFIG, open_adapter, read_settings
from phikit.weights.build import TensorSource
from phikit.weights.renamed import Renamed
from phikit.weights.safetensors_files import open_folder

_RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^(.+)\.lora_([AB])\.(\w+)\.weight$", r"\3-lora/\1.lora_\2.weight"),
        (r"\.base_layer\.", "."),
        (r"\.feed_forward_(in|out)\.net\.0\.linear\.", r".feed_forward_\1.gate_up_proj."),
        (r"\.feed_forward_(in|out)\.net\.2\.", r".feed_forward_\1.down_proj."),
        (r"\.self_attn\.linear_(q|k|v)\.", r".self_attn.\1_proj."),
        (r"\.self_attn\.linear_out\.", ".self_attn.o_proj."),
        (r"\.image_embed\.img_projection\.0\.", ".image_embed.img_projection_up."),
        (r"\.image_embed\.img_projection\.2\.", ".image_embed.img_projection_down."),
        (r"\.image_embed\.glb_GN$", ".image_embed.global_img_feature_extensor"),
        (r"\.image_embed\.sub_GN$", ".image_embed.sub_img_feature_extensor"),
        (r"\.audio_projection\.speech\.0\.", ".up_proj_for_speech."),
        (r"\.audio_projection\.speech\.2\.", ".down_proj_for_speech."),
        (r"\.audio_projection\.vision\.0\.", ".up_proj_for_vision_speech."),
        (r"\.audio_projection\.vision\.2\.", ".down_proj_for_vision_speech."),
    )
)


def with_adapters(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`config.json` with the sizes of the adapters beside it, under Microsoft's keys.

    Those keys are absent where the folder has no such adapter. Other models come back unchanged.

    Raises:
        WeightsError: an adapter's config is damaged, or asks for what Phi-4-multimodal has not.
    """
    if values.get("model_type") != "phi4_multimodal":
        return values
    values = {key: value for key, value in values.items() if not key.endswith("_lora")}
    for name in (VISION, SPEECH):
        path = folder / adapter_folder(name) / CONFIG
        if path.is_file():
            settings = read_settings(path)
            if settings.ranks or settings.alphas:
                raise WeightsError(f"{path} gives linears different ranks; here they share one")
            values[f"{name}_lora"] = {"r": settings.rank, "lora_alpha": settings.alpha}
    return values


@contextmanager
def open_checkpoint(folder: Path, config: DecoderConfig) -> Iterator[TensorSource]:
    """The tensors of any model folder, under the names that `registry.checkpoint_parts` gives them.

    Raises:
        WeightsError: files are missing, damaged or hold a tensor twice.
    """
    with ExitStack() as stack:
        main = stack.enter_context(open_folder(folder))
        if not isinstance(config, MultimodalConfig):
            yield main
            return
        source = Renamed(main)
        is_remote = any(".img_projection." in name for name in main.shapes)
        source.add(main, [(_native_name(n) if is_remote else n, n) for n in main.shapes])
        if not is_remote:
            for name in config.adapters:
                adapter = stack.enter_context(open_adapter(folder / adapter_folder(name)))
                source.add(adapter, [(f"{adapter_folder(name)}/{n}", n) for n in adapter.shapes])
        yield source


def _native_name(name: str) -> str:
    for pattern, ours in _RENAMES:
        name = pattern.sub(ours, name)
    return name
