"""Value types that travel between rooms.

Shape suffixes, one legend for the project: B batch, T tokens, D model, N heads, K kv-heads, H head,
F hidden, E experts, V vocabulary, R rank. `x_BTD` is a tensor of shape [batch, tokens, model].
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from phikit.base.media import Media

IGNORE = -100  # a target that carries no loss; torch's cross entropy uses the same number


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One token sequence and which of its tokens are learnt.

    Attributes:
        tokens: int32 [T].
        loss_mask: bool [T]; True where the token is a target, to be predicted from those before.
            Never at a placeholder: what stands there is seen or heard, not said.
        media: what the placeholders among the tokens stand for.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    media: Media | None = None

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.loss_mask.shape, (self.tokens.shape, self.loss_mask.shape)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of its media; empty for text."""
        return tuple(self.media.items) if self.media else ()


class Batch(NamedTuple):
    """What the model and the objective are given for one step.

    Attributes:
        tokens_BT: int64 token ids.
        targets_BT: int64; the next token, or `IGNORE` where there is no target.
        positions_BT: int64; restart at 0 with every packed document.
        documents_BT: int64 document number within the row, -1 for padding; None when rows are not
            packed.
        num_tokens: tokens in the batch, padding left out.
        extras: what an objective adds, by name (advantages, reference log-probabilities, ...).
        media: of each row, which decides the adapter it runs on; None is a batch of text.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor | None
    num_tokens: int
    extras: dict[str, Tensor]
    media: tuple[Media | None, ...] | None = None

    @property
    def is_text_BT(self) -> Tensor:
        """bool; False where a row is padded."""
        if self.documents_BT is not None:
            return self.documents_BT >= 0
        is_text_BT = self.positions_BT > 0
        is_text_BT[:, 0] = True
        return is_text_BT
