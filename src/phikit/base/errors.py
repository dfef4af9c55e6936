"""Typed errors. Each says what went wrong, with the value, and what to do next.

The command line prints these as two lines and no traceback; anything else that escapes is a bug of
ours and keeps its traceback.
"""


class PhikitError(Exception):
    """A mistake or a condition the user can act on.

    Args:
        what: what is wrong, naming the value or the file.
        fix: the next step, as an instruction. `str(error)` puts it on a second line.
    """

    def __init__(self, what: str, *, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return self.what if self.fix is None else f"{self.what}\n  Next: {self.fix}"


class ConfigError(PhikitError):
    """A configuration that cannot be used; lists every fault at once, with dotted paths."""


class DataError(PhikitError):
    """A data file or a set of problems that cannot be used as it stands."""


class CheckpointError(PhikitError):
    """A checkpoint that is incomplete, damaged, or of another model."""


class RunError(PhikitError):
    """A folder that is not a run, or a run in the wrong state for the request."""


class WeightsError(PhikitError):
    """Model weights that are missing, of unknown layout, or do not fit the model."""


class ChatError(PhikitError):
    """Messages that cannot be rendered, or a tokenizer that lacks a token the template needs."""


class ContextOverflowError(PhikitError):
    """A sequence longer than the model's context."""


class ReplyTimeoutError(PhikitError):
    """A reply was not finished in the time it was given."""


class RemoteError(PhikitError):
    """A model elsewhere refused a request, or answered what cannot be used.

    Args:
        may_be_billed: the model may have worked on the request all the same.
    """

    def __init__(self, what: str, *, fix: str | None = None, may_be_billed: bool = False) -> None:
        super().__init__(what, fix=fix)
        self.may_be_billed = may_be_billed


class RemoteUnavailableError(RemoteError):
    """A model elsewhere cannot be reached or has no time, and may have some later.

    Args:
        retry_after_s: when it is worth to ask again, if the model's side said so.
    """

    def __init__(
        self,
        what: str,
        *,
        fix: str | None = None,
        may_be_billed: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what, fix=fix, may_be_billed=may_be_billed)
        self.retry_after_s = retry_after_s


class NumericsError(PhikitError):
    """A loss, gradient or logit that is not finite."""


class StorageError(PhikitError):
    """The disk is full, read-only, or closed to us."""


class MissingExtraError(PhikitError):
    """An optional package is needed and not installed.

    Args:
        package: the import that failed, for example `"wandb"`.
        extra: the phikit extra that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed", fix=f'install it with: pip install "phikit[{extra}]"'
        )
        self.package = package
        self.extra = extra


class Interrupted(PhikitError):
    """Work stopped on request (Ctrl-C); what was done is saved."""
