"""Fetching a published checkpoint from the Hugging Face hub; an interrupted fetch goes on later."""

from pathlib import Path

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from phikit.base.errors import WeightsError
from phikit.base.files import storage_errors

NEEDED = ("*.json", "*.safetensors", "*.jinja")
"""Weights as safetensors, configuration and tokenizer; never code and never pickles."""


def fetch(repo_id: str, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint such as "microsoft/Phi-4-mini-instruct", fetched if need be.

    Raises WeightsError when the hub does not answer, has no such model or wants an account, and
    StorageError when the disk is full.
    """
    try:
        with storage_errors(Path(repo_id)):
            folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(NEEDED))
    except HFValidationError as error:
        raise WeightsError(
            f"{repo_id!r} is neither a folder nor the id of a published model",
            fix="give a model folder, or an id of the form owner/name",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, ConnectionError) as error:
        raise WeightsError(
            f"could not fetch {repo_id}: {str(error).splitlines()[0]}",
            fix="run the same command again, files that are whole are kept; or download the model "
            "elsewhere and give its folder",
        ) from error
    return Path(folder)
