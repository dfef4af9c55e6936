"""Where images and audio clips stand in a conversation: placeholders to runs of token ids.

`<|image_1|>` in a user's text becomes the image token repeated once for each embedding that stands
for the image; the model overwrites the embeddings at those positions. How many there are, the
preprocessing of the image or clip says.

Source: `processing_phi4mm.py` of microsoft/Phi-4-multimodal-instruct. It ignores the numbers and
fills in order of appearance; here numbers out of order are an error, since a picture would land in
another one's place.
"""

import re
from collections.abc import Mapping, Sequence

from phikit.base.errors import ChatError
from phikit.base.media import MediaTokens
from phikit.chat.tokenizer import Part

PLACEHOLDER = re.compile(r"<\|([a-z][a-z0-9]*)_([0-9]{1,4})\|>")


def expand_placeholders(
    texts: Sequence[str], media: MediaTokens, *, ids: Mapping[str, int]
) -> list[list[Part]]:
    """Each text cut at its placeholders, with runs of ids in their place.

    A word that `media` knows nothing of is no placeholder and stays text.

    Raises:
        ChatError: the placeholders are not numbered 1, 2, ... in order, or their number is not
            that of the media, or a kind of media has no token.
    """
    counts = media.counts
    seen = dict.fromkeys(counts, 0)
    expanded: list[list[Part]] = []
    for text in texts:
        parts: list[Part] = []
        end = 0
        for match in PLACEHOLDER.finditer(text):
            kind, number = match[1], int(match[2])
            if kind not in counts:
                continue
            seen[kind] += 1
            if number != seen[kind] or number > len(counts[kind]):
                raise ChatError(
                    f"{match[0]} stands where <|{kind}_{seen[kind]}|> should, "
                    f"of {len(counts[kind])} in all",
                    fix=f"number the {kind} placeholders 1, 2, ... in the order they stand in",
                )
            if kind not in ids:
                raise ChatError(
                    f"the model has no token for media of kind {kind}",
                    fix=f"it has {', '.join(ids)}",
                )
            parts += [text[end : match.start()], *[ids[kind]] * counts[kind][number - 1]]
            end = match.end()
        expanded.append([*parts, text[end:]])
    for kind, number in seen.items():
        if number != len(counts[kind]):
            raise ChatError(
                f"{len(counts[kind])} of kind {kind} are given, {number} stand in the messages",
                fix=f"write <|{kind}_1|>, <|{kind}_2|>, ... where they belong in a user message",
            )
    return expanded
