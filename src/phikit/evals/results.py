"""The layout of results.json: what one pipeline reports about each of its stages.

Defined here once; recipes write it, tables, charts and the HTML report read it. Keys that this
version does not know are kept and ignored, so that an older phikit can show a newer file.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phikit.base.errors import RunError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class Cell(_Part):
    """Accuracy on a part of the problems."""

    accuracy: float
    stderr: float | None = None
    n: int | None = None


class Change(_Part):
    """`stats.PairedDifference` as data: this stage minus the one before, on the same problems."""

    delta: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def within_noise(self) -> bool:
        """True when the 95 % interval covers zero, or when there is none."""
        return self.low is None or self.high is None or self.low <= 0.0 <= self.high


class Shown(_Part):
    """A transcript as data, see `transcripts.Transcript.to_dict`."""

    question: str
    thinking: str | None = None
    answer: str
    gold: str
    status: str
    extracted: str | None = None
    reason: str | None = None
    num_tokens: int | None = None


class Experts(_Part):
    """`experts.ExpertMap` as data: held-out loss and expert loads by kind of token."""

    kinds: list[str]
    losses: list[float]
    load: list[list[list[float]]]
    loss: float


class Stage(_Part):
    """One row. What a stage did not measure is None or empty, and is shown as such.

    `seconds` and `tokens` are what training took; `accuracy` is greedy, one reply a problem;
    `pass_at_1_t06` is the mean over 4 replies a problem at temperature 0.6. `metrics` holds lines
    of metrics.jsonl, of which `loss`, `reward` and `length` over `step` are drawn.
    """

    name: str
    seconds: float | None = None
    tokens: int | None = None
    accuracy: float | None = None
    stderr: float | None = None
    n: int | None = None
    pass_at_1_t06: float | None = None
    mean_tokens: float | None = None
    statuses: dict[str, int] = Field(default_factory=dict)
    by_steps: dict[int, Cell] = Field(default_factory=dict)
    by_family: dict[str, Cell] = Field(default_factory=dict)
    paired: Change | None = None
    transcripts: list[Shown] = Field(default_factory=list)
    metrics: list[dict[str, Any]] = Field(default_factory=list)
    experts: Experts | None = None
    versus: Change | None = None
    """This model minus the one beside it, on the same problems, greedy."""


class Results(_Part):
    """A whole results.json; `meta` are facts to print as they are (model, hardware, seed)."""

    stages: list[Stage]
    beside: list[Stage] = Field(default_factory=list)
    """The same stages of a second model, if there is one."""
    meta: dict[str, Any] = Field(default_factory=dict)

    @property
    def all_stages(self) -> list[Stage]:
        """Those of the model beside it last."""
        return [*self.stages, *self.beside]

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """Check plain data.

        Raises:
            RunError: the data are not results; names the first fault.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise RunError(
                f"results.json: {where}: {fault['msg']}", fix="run the pipeline again"
            ) from error
