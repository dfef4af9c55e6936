"""The text of the studies: four domains that every machine with Python can make.

`trace` are worked arithmetic problems, `fact` single calculations, `prose` the documentation of
Python, `code` its standard library. Held out are problems of the validation split, paragraphs and
documents by a hash of their text, and whole modules; single calculations do recur in other lines.
The last two domains differ a little between Python versions, so results name the version and a
digest of all rows.
"""

import sysconfig
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from phikit.base.files import write_atomic
from phikit.chat.tokenizer import Tokenizer, train_tokenizer
from phikit.data import prose
from phikit.data.corpus import CorpusMixture, pretraining_documents
from phikit.data.source import ProceduralSource, load_problems
from phikit.data.split import Split

DOMAINS = ("trace", "fact", "prose", "code")
VOCABULARY = 512
ROW_TOKENS = 128
HELD_OUT_SHARE = 0.1
ROWS, HELD_OUT_ROWS = 3000, 32
"""Rows of each domain to train on, at most, and to measure on."""
END = "<|endoftext|>"
SEED = 7
"""Of what is generated; a study's own seed only orders it."""


class Data(NamedTuple):
    """Rows of token ids, [domain][row, token]."""

    train: list[npt.NDArray[np.int32]]
    held_out: list[npt.NDArray[np.int32]]

    @property
    def digest(self) -> str:
        """Identifies every token of it."""
        rows = b"".join(part.tobytes() for part in (*self.train, *self.held_out))
        return blake2b(rows, digest_size=8).hexdigest()


def load(folder: Path) -> Data:
    """The rows, from `folder` if they were made before."""
    path = folder / f"rows-{VOCABULARY}-{ROW_TOKENS}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = make()
        arrays = {f"train.{name}": rows for name, rows in zip(DOMAINS, data.train, strict=True)}
        arrays |= {f"held.{name}": rows for name, rows in zip(DOMAINS, data.held_out, strict=True)}
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        temporary.replace(path)
        write_atomic(folder / "digest.txt", data.digest + "\n")
    kept = np.load(path, allow_pickle=False)
    return Data(*([kept[f"{side}.{name}"] for name in DOMAINS] for side in ("train", "held")))


def make() -> Data:
    """Write, split and cut the text of all domains; the tokenizer sees what is trained on."""
    texts = {name: list(documents(name)) for name in DOMAINS}
    sample = [text for name in DOMAINS for text, is_held in texts[name][:1500] if not is_held]
    tokenizer = train_tokenizer(sample, size=VOCABULARY, specials=(END,))
    train, held_out = (
        [_rows(tokenizer, [t for t, held in texts[name] if held == side]) for name in DOMAINS]
        for side in (False, True)
    )
    return Data([rows[:ROWS] for rows in train], [rows[:HELD_OUT_ROWS] for rows in held_out])


def documents(domain: str) -> Iterator[tuple[str, bool]]:
    """Documents of one domain, and whether each is held out."""
    match domain:
        case "trace":
            sides: tuple[tuple[Split, int], ...] = (("train", 8000), ("validation", 400))
            for split, count in sides:
                for problem in load_problems(ProceduralSource(count=count), split=split, seed=SEED):
                    text = f"{problem.question}\n{problem.thinking}\n{problem.solution}"
                    yield text, split != "train"
        case "fact":
            mixture = CorpusMixture(weights={"fact": 1.0})
            for document in pretraining_documents(seed=SEED, count=12_000, mixture=mixture):
                assert isinstance(document.content, str)
                yield document.content, _is_held_out(document.content)
        case "prose":
            for paragraph in prose.paragraphs():
                yield paragraph, _is_held_out(paragraph)
        case "code":
            for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
                yield path.read_text(encoding="utf-8"), _is_held_out(path.name)


def _is_held_out(text: str) -> bool:
    digest = blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def _rows(tokenizer: Tokenizer, texts: Iterable[str]) -> npt.NDArray[np.int32]:
    """Documents one after another, in an order of no meaning, cut into full rows."""
    end = tokenizer.special(END)
    shuffled = sorted(texts, key=lambda text: blake2b(text.encode(), digest_size=8).digest())
    needed, ids = (ROWS + 1) * ROW_TOKENS, []
    for text in shuffled:
        ids += [*tokenizer.encode(text), end]
        if len(ids) >= needed:
            break
    whole = len(ids) // ROW_TOKENS * ROW_TOKENS
    rows = np.array(ids[:whole], np.int32).reshape(-1, ROW_TOKENS)
    return rows[np.random.default_rng(SEED).permutation(len(rows))]
