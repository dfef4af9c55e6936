"""What can go wrong in serving alone. `serve.faults` says which HTTP status each error becomes."""

from phikit.base.errors import PhikitError


class QueueFullError(PhikitError):
    """As many requests wait as may.

    Args:
        retry_after_s: when it is worth to ask again.
    """

    def __init__(self, what: str, *, retry_after_s: int, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.retry_after_s = retry_after_s


class ShelfFullError(QueueFullError):
    """No room for one more model: all that are loaded are in use."""


class UnknownModelError(PhikitError):
    """A model that this server does not have."""


class ClosingError(PhikitError):
    """The server, or the model, is going away and takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down", fix="ask again in a moment")


class ModelUnavailableError(PhikitError):
    """A model that this server has, and cannot load."""


class ClientGoneError(PhikitError):
    """The client has closed its connection; nobody reads the answer."""


class RefusedError(PhikitError):
    """What a client asks for, and this server cannot or will not do.

    Args:
        param: the field of the request that asks for it.
    """

    def __init__(self, what: str, *, param: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.param = param
