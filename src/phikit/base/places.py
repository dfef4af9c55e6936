"""Where phikit keeps what is a user's own: conversations, the lines they typed, running servers.

By the XDG base directory specification: data that is to last in `$XDG_DATA_HOME/phikit`
(`~/.local/share/phikit`), what may be lost in `$XDG_CACHE_HOME/phikit` (`~/.cache/phikit`). Both
are open to their owner alone.
"""

import os
from pathlib import Path

from phikit.base.files import storage_errors


def data_folder() -> Path:
    """The folder of what is to last; made if need be. Raises StorageError if that is impossible."""
    return _private("XDG_DATA_HOME", ".local/share")


def cache_folder() -> Path:
    """The folder of what may be lost; made if need be. Raises StorageError likewise."""
    return _private("XDG_CACHE_HOME", ".cache")


def _private(variable: str, usual: str) -> Path:
    given = Path(os.environ.get(variable, ""))
    # The specification wants relative paths ignored.
    folder = (given if given.is_absolute() else Path.home() / usual) / "phikit"
    with storage_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
