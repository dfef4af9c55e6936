"""A quantised model as a plain one: what its integers and scales stand for, as numbers."""

import torch
from torch import nn

from phikit.models.multimodal import MultimodalModel
from phikit.models.registry import build
from phikit.nn.quantised import PackedWeight
from phikit.weights.load import Loaded
from phikit.weights.save import refuse_adapters


@torch.no_grad()
def dequantise(loaded: Loaded, *, dtype: torch.dtype | None = None) -> Loaded:
    """The same model with all its weights in floating point, for programs that know no packing.

    The precision that was lost does not come back. The original is left as it is, and shares what
    was never quantised.

    Args:
        loaded: any model; one that is not quantised comes back as it is.
        dtype: of the numbers; None is that of the model.

    Raises:
        WeightsError: adapters are attached to the model.
    """
    model = loaded.model
    if model.quantisation is None:
        return loaded
    if not isinstance(model, MultimodalModel):  # whose adapters are a part of it
        refuse_adapters(model)
    dtype = dtype or model.dtype
    with torch.device("meta"):
        plain = build(model.config)
    for path, module in plain.named_modules():
        source = model.get_submodule(path)
        for name, _ in module.named_parameters(recurse=False):
            weight = getattr(source, name)
            if isinstance(weight, PackedWeight):
                weight = weight.dequantise(dtype)
            setattr(module, name, nn.Parameter(weight.detach().to(dtype)))
        for name, _ in module.named_buffers(recurse=False):
            setattr(module, name, getattr(source, name))
    if model.config.tie_embeddings:
        plain.lm_head.weight = plain.model.embed_tokens.weight
    return Loaded(plain, loaded.tokenizer, loaded.renderer, loaded.path)
