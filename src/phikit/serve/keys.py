"""API keys: read once, kept as digests, compared in constant time, printed nowhere."""

import os
import re
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from phikit.base.errors import ConfigError

VARIABLE = "PHIKIT_API_KEYS"
LEAST_CHARS = 16


class Keys:
    """The keys that open a server; none opens it to everybody who reaches it.

    Raises:
        ConfigError: a key is short enough to be guessed, or no header could carry it.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        keys = list(keys)
        for number, key in enumerate(keys, 1):
            if len(key) < LEAST_CHARS or not re.fullmatch(r"[!-~]+", key):
                raise ConfigError(
                    f"API key {number} of {len(keys)} is shorter than {LEAST_CHARS} characters, or "
                    "has others than printable ASCII",
                    fix="make one with: python -c 'import secrets; print(secrets.token_hex(24))'",
                )
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)})"

    def open(self, authorization: bytes | None) -> bool:
        """Whether an Authorization header (`Bearer KEY`) holds one of the keys.

        Every key is compared, and digests are, so time tells neither which one was near nor how
        long it is.
        """
        if not self._digests:
            return True
        scheme, _, given = (authorization or b"").partition(b" ")
        digest = sha256(given.strip()).digest()
        found = [compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(found)


def read_keys(file: Path | None) -> Keys:
    """The keys in a file, one a line, `#` for remarks; and those in `PHIKIT_API_KEYS`.

    Raises:
        ConfigError: the file cannot be read, or a key is of no use.
    """
    keys = keys_of_environment()
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API keys in {file} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{file} holds no API key", fix="write one on a line of its own")
        keys += found
    return Keys(keys)


def keys_of_environment() -> list[str]:
    """Those in `PHIKIT_API_KEYS`, between commas or spaces."""
    return os.environ.get(VARIABLE, "").replace(",", " ").split()
