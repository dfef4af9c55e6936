"""Quantise a loaded model in place: round to nearest, or GPTQ.

Both choose one scale for each group of weights, and differ in the rounding. Round to nearest knows
the weights alone. GPTQ (`weights.calibrate`) sees what every layer is given on some text, and lets
later weights of a row make up for the rounding of earlier ones. Embeddings and head are always
rounded to nearest: in a tied model they are one matrix with two uses.

The scale of 8 bits is max|w| / 127. With 4 bits the integers reach one step further below zero
than above (-8..7), so the weight of the largest magnitude, with its sign, is put at -8, as in
llama.cpp's Q4_0; and of a few scales around that one, the one with the least squared error is kept.
GPTQ weighs each column's error by the mean square of its input.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phikit.base.errors import ConfigError, WeightsError
from phikit.models.decoder import Decoder
from phikit.nn.quantised import PackedWeight, QuantConfig
from phikit.weights.calibrate import Moments, gptq, watched_blocks
from phikit.weights.load import Loaded
from phikit.weights.quantised import Matrix, matrices, put, refuse_quantised
from phikit.weights.scales import choose_scales, nearest

OnProgress = Callable[[int, int], None]
"""Called after each matrix with the number of weights done and of all."""


class Outcome(NamedTuple):
    """What became of a model's matrices, by their paths."""

    packed: tuple[str, ...]
    kept: tuple[str, ...]
    """Left in floating point, since their rows are no multiple of the group."""
    rounded: tuple[str, ...]
    """Rounded to nearest under GPTQ, since they were given too little: experts seldom chosen."""


@torch.no_grad()
def quantise(
    loaded: Loaded,
    config: QuantConfig,
    *,
    calibration: Sequence[Sequence[int]] | None = None,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Replace the model's matrices by packed ones, one after another, so memory only shrinks.

    Args:
        loaded: its model is changed. Adapters on it stay as they are.
        config: bits, group and method.
        calibration: rows of token ids for GPTQ, each of two tokens or more.
        on_progress: see `OnProgress`.

    Raises:
        ConfigError: GPTQ has nothing to calibrate on.
        WeightsError: the model is quantised already, or has weights that are not finite.
    """
    model = loaded.model
    refuse_quantised(model, "quantising it")
    rows = [row for row in calibration or () if len(row) > 1]
    if config.method == "gptq" and not rows:
        raise ConfigError(
            "GPTQ has no text to calibrate on", fix='give rows of tokens, or take method "rtn"'
        )
    work = _Work(model, config, on_progress or (lambda done, of: None))
    for path in [path for path in work.left if not path.startswith("model.layers.")]:
        work.do(path, None)
    if config.method == "gptq":
        for block, moments in watched_blocks(model, rows, paths=work.left):
            for path in block:
                work.do(path, moments[path])
    for path in list(work.left):
        work.do(path, None)
    model.quantisation = config
    return Outcome(tuple(work.packed), tuple(work.kept), tuple(work.rounded))


class _Work:
    """The matrices of a model that are still to be done, and what became of the others."""

    def __init__(self, model: Decoder, config: QuantConfig, on_progress: OnProgress) -> None:
        self.left: dict[str, Matrix] = {}
        self.packed: list[str] = []
        self.kept: list[str] = []
        self.rounded: list[str] = []
        for matrix in matrices(model, config):
            if matrix.fits:
                self.left[matrix.path] = matrix
            else:
                self.kept.append(matrix.path)
        self._model, self._config, self._on_progress = model, config, on_progress
        self._done, self._all = 0, sum(matrix.weight.numel() for matrix in self.left.values())

    def do(self, path: str, moments: Moments | None) -> None:
        """Quantise the matrix at `path`, by GPTQ if there are `moments` enough."""
        _, weight, bits, _ = self.left.pop(path)
        group = self._config.group
        with torch.device(weight.device):
            packed = PackedWeight(weight.shape, bits=bits, group=group)
        stack = weight[None] if weight.ndim == 2 else weight
        for number, weight_OI in enumerate(stack):
            moment_II = None if moments is None else moments.of(number)
            name = path if weight.ndim == 2 else f"{path}.{number}"
            if moments is not None and moment_II is None:
                self.rounded.append(name)
            q_OI, scales_OG = quantised_matrix(weight_OI, moment_II, bits=bits, group=group)
            if not scales_OG.isfinite().all():
                raise WeightsError(
                    f"{name} has weights that are not finite",
                    fix="fetch the checkpoint again, or take one whose training did not diverge",
                )
            packed.fill(q_OI, scales_OG, expert=None if weight.ndim == 2 else number)
        put(self._model, path, packed)
        self.packed.append(path)
        self._done += weight.numel()
        self._on_progress(self._done, self._all)


def quantised_matrix(
    weight_OI: Tensor, moment_II: Tensor | None, *, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    """Integers [O, I] and scales [O, G] of a matrix; by GPTQ if its input's moment is given."""
    if moment_II is None:
        scales_OG = choose_scales(weight_OI, bits=bits, group=group)
        return nearest(weight_OI, scales_OG, bits=bits), scales_OG
    return gptq(weight_OI, moment_II, bits=bits, group=group)
