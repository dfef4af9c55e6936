"""phikit: run, train, judge and serve Phi-class small language models.

Importing this package is cheap on purpose: it loads neither torch nor any room. Import what you
use, for example `from phikit.chat.render import renderer_for`. One name is here for convenience:
`phikit.load(path)` is `phikit.weights.load.load`, fetched when first asked for.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phikit.weights.load import load as load

# OpenMP threads that spin at a barrier starve each other as soon as anything else wants a core: a
# training step then took thirty times as long. Waiting passively costs nothing measurable. Must be
# set before torch loads; a value the user has set stands.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from phikit.weights.load import load

        return load
    raise AttributeError(f"module 'phikit' has no attribute {name!r}")
