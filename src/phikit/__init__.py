"""phikit: run, train, judge and serve Phi-class small language models.

Importing this package is cheap on purpose: it loads neither torch nor any room. Import what you
use, for example `from phikit.chat.render import renderer_for`. One name is here for convenience:
`phikit.load(path)` is `phikit.generate.language_model.load`, fetched when first asked for.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phikit.generate.language_model import load as load

# OpenMP threads that spin at a barrier without end starve each other as soon as anything else
# wants a core: a training step then took thirty times as long. Sleeping at once costs half the
# speed of an idle machine. So they spin for about half a millisecond. Must be set before torch
# loads; a choice the user has made stands.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from phikit.generate.language_model import load

        return load
    raise AttributeError(f"module 'phikit' has no attribute {name!r}")
