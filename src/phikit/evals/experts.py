"""Where a mixture of experts sends its tokens, by kind of token, and how well each is predicted.

A router never sees a token's kind, and no loss asks for specialists; what shows up here was learnt.
Routing is that of evaluation: no draws.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phikit.chat.tokenizer import Tokenizer
from phikit.models.decoder import Decoder
from phikit.nn.moe.block import MoE
from phikit.nn.moe.router import Routing

KINDS = ("digits", "operators", "words", "word parts", "punctuation", "white space", "special")
OPERATORS = frozenset("+-*/=<>%^×÷−")


class ExpertMap(NamedTuple):
    """Held-out tokens by kind. Kinds that did not occur are left out."""

    kinds: list[str]
    tokens: list[int]
    """Of each kind."""
    losses: list[float]
    """Mean of -log p of the tokens of each kind, in nats."""
    load: list[list[list[float]]]
    """[layer][kind][expert]: shares of the kind's assignments; empty for a dense model."""

    @property
    def loss(self) -> float:
        """Over all tokens."""
        return sum(map(lambda n, loss: n * loss, self.tokens, self.losses)) / sum(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the mean loss too."""
        return {**self._asdict(), "loss": self.loss}


def kind_of(text: str, *, is_special: bool = False) -> str:
    """Which of `KINDS` a token is; the space that a word or a number may carry does not count."""
    bare = text.strip()
    if is_special:
        return "special"
    if not bare:
        return "white space"
    if bare.isdecimal():
        return "digits"
    if set(bare) <= OPERATORS:
        return "operators"
    if bare.isalpha():
        return "words" if text[0].isspace() or bare[0].isupper() else "word parts"
    return "punctuation"


@contextmanager
def routed(model: nn.Module) -> Iterator[list[list[Routing]]]:
    """While open, what every router decides: a list for each mixture of experts in the model."""
    blocks = [module for module in model.modules() if isinstance(module, MoE)]
    seen: list[list[Routing]] = [[] for _ in blocks]
    hooks = [
        block.router.register_forward_hook(lambda _, __, routing, kept=kept: kept.append(routing))
        for block, kept in zip(blocks, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def expert_map(model: Decoder, tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> ExpertMap:
    """The map of these rows of token ids; a token is predicted unless it is the first of its row.

    Assignments are counted where the token is read, losses where it is predicted.
    """
    kind_of_V = _kinds(tokenizer, model.config.vocab_size)
    num_kinds = len(KINDS)
    counts_G, predicted_G, losses_G = (torch.zeros(num_kinds) for _ in range(3))
    loads: list[Tensor] = []
    for row in rows:
        tokens_T = torch.tensor(row, device=model.device)
        with routed(model) as seen:
            log_probs_TV = model(tokens_T[None])[0, :-1].float().log_softmax(-1)
        kinds_T = kind_of_V[tokens_T.cpu()]
        nll_T = -log_probs_TV.gather(-1, tokens_T[1:, None])[:, 0].cpu()
        counts_G += kinds_T.bincount(minlength=num_kinds)
        predicted_G += kinds_T[1:].bincount(minlength=num_kinds)
        losses_G += kinds_T[1:].bincount(weights=nll_T, minlength=num_kinds)
        found = [_load(routing, kinds_T) for layer in seen for routing in layer]
        loads = [a + b for a, b in zip(loads, found, strict=True)] if loads else found
    shown = [g for g in range(num_kinds) if predicted_G[g] > 0]
    shares = [load_GE[shown] / load_GE[shown].sum(-1, keepdim=True) for load_GE in loads]
    return ExpertMap(
        kinds=[KINDS[g] for g in shown],
        tokens=predicted_G[shown].int().tolist(),
        losses=(losses_G / predicted_G)[shown].tolist(),
        load=[share_GE.tolist() for share_GE in shares],
    )


def _load(routing: Routing, kinds_T: Tensor) -> Tensor:
    """Assignments of each kind to each expert."""
    ids_TC = routing.ids_TC.cpu()
    num_experts = routing.stats.scores_TE.shape[-1]
    cells_TC = kinds_T[:, None] * num_experts + ids_TC
    counts = cells_TC.flatten().bincount(minlength=len(KINDS) * num_experts)
    return counts.unflatten(0, (len(KINDS), num_experts)).float()


def _kinds(tokenizer: Tokenizer, size: int) -> Tensor:
    """The kind of every token id, as a number."""
    special = tokenizer.special_ids
    kinds = [
        kind_of(tokenizer.decode([i], keep_special=True), is_special=i in special)
        for i in range(tokenizer.size)
    ]
    kinds += ["special"] * (size - len(kinds))  # rows of the embedding that no token has
    return torch.tensor([KINDS.index(kind) for kind in kinds])
