"""Fetching a published checkpoint from the Hugging Face hub; an interrupted fetch goes on later.

The files go into the hub's own cache (`$HF_HOME/hub`, else `~/.cache/huggingface/hub`), which other
programs share. Only what a model needs is fetched: numbers and text, never code and never pickles.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phikit.base.errors import StorageError, WeightsError
from phikit.base.files import storage_errors

NEEDED = ("*.json", "*.jinja", "*.tiktoken", "model*.safetensors", "*adapter_model.safetensors")
"""Configuration, tokenizer, chat template, weights, and the adapters beside them."""
SPARE = ("onnx/*", "original/*", "figures/*", "sample_finetune*")
"""Folders of published checkpoints that hold the same model once more, or none."""
_ID = re.compile(r"[\w-][\w.-]*/[\w.-]*[\w-]")


class Plan(NamedTuple):
    """What a fetch would take from the hub."""

    files: int
    """Files not on this machine yet."""
    size: int
    """Their bytes."""
    all_files: int
    all_size: int
    """The bytes of the whole checkpoint, those that are here already included."""


def is_id(name: str | Path) -> bool:
    """Whether a name that is no path on this machine can be the id of a published model."""
    return isinstance(name, str) and bool(_ID.fullmatch(name)) and not Path(name).exists()


def split_file(name: str) -> tuple[str, str | None]:
    """The id and the file in "owner/name/file.gguf"; a name without a file has None for it."""
    repo_id, _, file = name.rpartition("/")
    return (repo_id, file) if file.endswith(".gguf") and is_id(repo_id) else (name, None)


def plan(repo_id: str, *, revision: str | None = None, file: str | None = None) -> Plan:
    """What `fetch` with the same arguments would take; asks the hub and fetches nothing.

    Raises:
        WeightsError: the hub does not answer, or has no such model, or nothing of it is needed.
        StorageError: there is no room for it.
    """
    with _explained(repo_id, revision):
        found = snapshot_download(repo_id, revision=revision, dry_run=True, **_patterns(file))
    if not found:
        what = f"no file {file}" if file else "no safetensors, configuration or tokenizer"
        raise WeightsError(
            f"{repo_id} has {what}", fix=f"look at its files: {constants.ENDPOINT}/{repo_id}"
        )
    absent = [entry for entry in found if entry.will_download]
    planned = Plan(
        files=len(absent),
        size=sum(entry.file_size or 0 for entry in absent),
        all_files=len(found),
        all_size=sum(entry.file_size or 0 for entry in found),
    )
    place = _existing(Path(constants.HF_HUB_CACHE))
    free = shutil.disk_usage(place).free
    if planned.size > free:
        raise StorageError(
            f"{repo_id} needs {planned.size / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB free",
            fix="free some space, or set HF_HOME to a folder on another disk",
        )
    return planned


def fetch(
    repo_id: str, *, revision: str | None = None, file: str | None = None, offline: bool = False
) -> Path:
    """The folder of a checkpoint such as "microsoft/Phi-4-mini-instruct", fetched if need be.

    Args:
        repo_id: owner/name.
        revision: a branch, a tag or a commit; None is the newest.
        file: one file of the checkpoint in place of all that a model needs, for example a `.gguf`;
            its path is returned.
        offline: ask nobody; take what is here.

    Raises:
        WeightsError: the hub does not answer, has no such model or wants an account; offline: the
            checkpoint is not here, or not whole.
        StorageError: the disk is full.
    """
    with _explained(repo_id, revision, offline=offline), storage_errors(Path(repo_id)):
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, local_files_only=offline, **_patterns(file)
            )
        )
    if file is None:
        return folder
    if not (folder / file).is_file():
        raise WeightsError(
            f"{repo_id} has no file {file}",
            fix=f"look at its files: {constants.ENDPOINT}/{repo_id}",
        )
    return folder / file


def _patterns(file: str | None) -> dict[str, Any]:
    if file is not None:
        return {"allow_patterns": [file]}
    return {"allow_patterns": list(NEEDED), "ignore_patterns": list(SPARE)}


@contextmanager
def _explained(repo_id: str, revision: str | None, *, offline: bool = False) -> Iterator[None]:
    """Say what went wrong at the hub, and what helps."""
    try:
        yield
    except (
        HFValidationError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        DryRunError,
        httpx2.HTTPError,
        ConnectionError,
    ) as error:
        cause = error.__cause__ if isinstance(error, DryRunError) else error
        what, fix = _explanation(cause or error, repo_id, revision, offline=offline)
        raise WeightsError(what, fix=fix) from error


def _explanation(
    error: BaseException, repo_id: str, revision: str | None, *, offline: bool
) -> tuple[str, str]:
    """What is wrong, and the next step."""
    match error:
        case HFValidationError():
            return (
                f"{repo_id!r} is neither a folder nor the id of a published model",
                "give a model folder, or an id of the form owner/name",
            )
        case GatedRepoError():
            return (
                f"{repo_id} is open only to accounts that accepted its terms",
                f"accept them on {constants.ENDPOINT}/{repo_id}, then run: hf auth login",
            )
        case RepositoryNotFoundError():
            return (
                f"the hub has no model {repo_id}, or it is private",
                "check the id; for a private model run: hf auth login",
            )
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {revision!r}", "name a branch, a tag or a commit"
        case IncompleteSnapshotError():
            return (
                f"only a part of {repo_id} is on this machine",
                f"fetch the rest with: phikit pull {repo_id}",
            )
    if offline or constants.is_offline_mode():
        return (
            f"{repo_id} is not on this machine, and no network is to be used",
            f"fetch it with: phikit pull {repo_id}",
        )
    return (
        f"could not fetch {repo_id}: {str(error).splitlines()[0]}",
        "run the same command again, files that are whole are kept; or download the model "
        "elsewhere and give its folder",
    )


def _existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
