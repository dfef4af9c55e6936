"""A modality of one's own: a short series of numbers, such as a sensor gives.

The same code is printed in docs/multimodal.md; `tests/laws/test_modality_laws.py` attaches it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from phikit.base.errors import ChatError
from phikit.models.modality import ModalityConfig, ProjectedModality, register

MAX_VALUES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """An item: the numbers of one series, and how many placeholders stand for them."""

    values_T: NDArray[np.float32]
    num_tokens: int


class SeriesEncoder(nn.Module):
    """Patches of neighbouring values, then attention between the patches of a series."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch, self.width = patch, width
        self.embed = nn.Linear(patch, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, items: Sequence[Series]) -> list[Tensor]:
        like = self.embed.weight
        series = [torch.as_tensor(item.values_T).to(like.device, like.dtype) for item in items]
        padded = [nn.functional.pad(x, (0, -len(x) % self.patch)) for x in series]
        return [self.block(self.embed(x.view(1, -1, self.patch)))[0] for x in padded]


@register
class SensorModality(ModalityConfig):
    """Series of numbers; `<|sensor_1|>` marks where one stands in a message."""

    kind: Literal["sensor"] = "sensor"
    name: str = "sensor"
    patch: int = 8
    width: int = 16

    def build(self, d_model: int) -> ProjectedModality:
        encoder = SeriesEncoder(self.patch, self.width)
        return ProjectedModality(encoder, d_model, leaders=[self.name])

    def prepare(self, source: Any) -> Series:
        try:
            values = np.asarray(source, np.float32)
        except (TypeError, ValueError) as error:
            raise ChatError(f"a series is a list of numbers: {error}") from error
        if values.ndim != 1 or not 0 < len(values) <= MAX_VALUES or not np.isfinite(values).all():
            raise ChatError(
                f"a series of shape {values.shape}; it takes 1 to {MAX_VALUES} finite numbers"
            )
        return Series(values, num_tokens=-(-len(values) // self.patch))
