"""What a stage of a pipeline is given, and what its preparation hands to the loop."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phikit.base.progress import Progress
from phikit.data.problem import Problem
from phikit.evals.scorer import Scorer
from phikit.models.decoder import Decoder
from phikit.models.modality import ModalityConfig
from phikit.train.objective import Objective
from phikit.weights.load import Loaded


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage is given: the model to train, its problems, a place to keep what it makes."""

    loaded: Loaded
    problems: Sequence[Problem]
    folder: Path
    seed: int
    scorer: Scorer
    progress: Progress
    modalities: Sequence[ModalityConfig] = ()
    """Of the pipeline, for its media stages."""


class Prepared(NamedTuple):
    """An objective and how many optimiser steps to give it."""

    objective: Objective
    steps: int
    model: Decoder | None = None
    """What is trained, if it is not the model that the stage was given."""
    finish: Callable[[], None] = lambda: None
    """Called once it is trained."""


def stage_seed(seed: int, *names: str) -> int:
    """A seed for one purpose, 31 bits, derived from the pipeline's seed and the purpose's names."""
    digest = hashlib.blake2b("/".join([str(seed), *names]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
