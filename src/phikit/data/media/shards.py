"""Problems with media in WebDataset shards: tar files in which a sample is a run of members.

`000007.json` says what is asked, `000007.vision_0.png` is seen, `000007.speech_0.wav` is heard.
Shards of others have one picture or sound beside a `.txt` with what it shows or says, or a `.json`
with "answer" and perhaps "question".

A shard is untrusted. Only its headers are walked; an item is the place of its bytes, which are read
when its problem is prepared, so a shard may be larger than the memory. Nothing is unpacked, names
are keys alone, and links, sparse members and compressed files are refused.

Source: https://github.com/webdataset/webdataset, "The WebDataset format".
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from phikit.base.errors import DataError
from phikit.base.files import replacing, storage_errors
from phikit.base.media import SPEECH, VISION
from phikit.data.media.encode import MAX_ITEM_BYTES, file_bytes, suffix_of
from phikit.data.media.problem import MediaProblem, Stored
from phikit.data.media.rows import PROMPTS, from_record, new_problem, record_of

KINDS = {
    **dict.fromkeys(("png", "jpg", "jpeg", "webp"), VISION),
    **dict.fromkeys(("wav", "flac", "ogg", "mp3"), SPEECH),
}
"""What files of others are, by the end of their names."""
SHARD_BYTES = 1 << 30
MAX_MEMBERS = 1_000_000
"""Of one shard."""
MAX_TEXT_BYTES = 1 << 20


class Member(NamedTuple):
    """A file in a shard."""

    shard: Path
    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """What the members of one sample have in common."""
        folder, _, base = self.name.rpartition("/")
        return f"{folder}/{base.partition('.')[0]}"

    @property
    def ending(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2]

    def read(self, limit: int = MAX_ITEM_BYTES) -> bytes:
        """Raises DataError if it is too large, or not all there."""
        if self.size > limit:
            raise DataError(f"{self.name} has {self.size} bytes; at most {limit} are read")
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.shard} cannot be read: {error.strerror}") from error
        if len(data) != self.size:
            raise DataError(f"{self.shard} ends inside {self.name}", fix="fetch it again")
        return data


def write_shards(
    problems: Sequence[MediaProblem], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write problems with their media to `shard-000000.tar` and so on; returns the files.

    Args:
        shard_bytes: a shard that has reached this size is followed by another.

    Raises:
        DataError: an item cannot be read, a text is too long to be read again, or the folder holds
            shards already.
        StorageError: the disk is full or the folder may not be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise DataError(f"{folder} holds shards already", fix="choose an empty folder")
    written: list[Path] = []
    number = 0
    while number < len(problems):
        written.append(folder / f"shard-{len(written):06d}.tar")
        with (
            replacing(written[-1]) as temporary,
            tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar,
        ):
            while number < len(problems) and tar.offset < shard_bytes:
                for name, data in _files(problems[number], f"{number:09d}"):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
    return written


def read_shards(path: Path) -> Iterator[MediaProblem]:
    """The problems in a shard, or in those of a folder by name; no medium is opened.

    Raises DataError: a shard is damaged, has too many members or one that is no file, or a sample
    does not say what it is about.
    """
    index = 0
    for shard in sorted(path.glob("*.tar")) if path.is_dir() else [path]:
        for _, sample in groupby(_members(shard), key=lambda member: member.key):
            found = _problem({member.ending.lower(): member for member in sample}, index)
            if found is not None:
                yield found
                index += 1


def _files(problem: MediaProblem, key: str) -> Iterator[tuple[str, bytes]]:
    """The members of one sample; its record first, which names the others."""
    where = f"{problem.provenance.source}, item {problem.provenance.index}"
    items: dict[str, bytes] = {}
    media: dict[str, list[str]] = {}
    for modality, sources in problem.media.items():
        for k, source in enumerate(sources):
            data = file_bytes(source, where=where)
            ending = f"{modality}_{k}.{suffix_of(data)}"
            items[ending] = data
            media.setdefault(modality, []).append(ending)
    record = json.dumps(record_of(problem) | {"media": media}, ensure_ascii=False).encode()
    if len(record) > MAX_TEXT_BYTES:
        raise DataError(f"{where}: {len(record)} bytes of text; at most {MAX_TEXT_BYTES} are read")
    yield f"{key}.json", record
    for ending, data in items.items():
        yield f"{key}.{ending}", data


def _members(shard: Path) -> Iterator[Member]:
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for count, member in enumerate(tar):
                if count == MAX_MEMBERS:
                    raise DataError(f"{shard} has more than {MAX_MEMBERS} members", fix="split it")
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it keeps all
                end = _check(shard, member, end)
                if member.isreg():
                    yield Member(shard, member.name, member.offset_data, member.size)
        with shard.open("rb") as file:
            file.seek(end)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                raise DataError(f"{shard} is damaged at byte {end}", fix="fetch it again")
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise DataError(
            f"{shard} is no plain tar file, or damaged: {error}",
            fix="fetch it again, or uncompress it",
        ) from error
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {error.strerror}") from error


def _check(shard: Path, member: tarfile.TarInfo, end: int) -> int:
    """Where the member ends; DataError for what no shard needs."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{shard}: {member.name!r} leads out of it", fix="do not trust this file")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise DataError(f"{shard}: {member.name!r} is no plain file", fix="leave it out")
    if member.size < 0 or member.offset < end:
        raise DataError(f"{shard}: {member.name!r} has an impossible size", fix="fetch it again")
    blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0
    return member.offset_data + blocks * tarfile.BLOCKSIZE


def _problem(sample: Mapping[str, Member], index: int) -> MediaProblem | None:
    """None for a sample that holds nothing to see or hear."""
    first = next(iter(sample.values()))
    place = f"{first.shard.name}: {first.key.removeprefix('/')}"
    record = _record(sample["json"], place) if "json" in sample else {}
    named = record.get("media")
    if isinstance(named, dict):
        media = {
            str(modality): tuple(_named(sample, str(ending), place) for ending in endings)
            for modality, endings in named.items()
            if isinstance(endings, list)
        }
        return from_record(record, media, place=place)
    media: dict[str, tuple[Stored, ...]] = {}
    for ending in sample:
        if kind := KINDS.get(ending.rpartition(".")[2]):
            media[kind] = (*media.get(kind, ()), _named(sample, ending, place))
    if not media:
        return None
    answer = record.get("answer")
    if "txt" in sample:
        answer = _text(sample["txt"], place)
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{place}: nothing says what it shows", fix='add a .txt, or an "answer"')
    question = str(record.get("question") or PROMPTS[VISION if VISION in media else SPEECH])
    names = [member.name for member in sample.values() if member.ending not in ("json", "txt")]
    return new_problem(
        question,
        answer,
        media,
        source=first.shard.name,
        family="webdataset",
        index=index,
        names=names,
    )


def _named(sample: Mapping[str, Member], ending: str, place: str) -> Stored:
    if ending in sample:
        return Stored(f"{place}.{ending}", sample[ending].read)
    return Stored(f"{place}.{ending}", partial(_missing, ending))


def _missing(ending: str) -> bytes:
    raise DataError(f"the shard has no {ending}", fix="fetch it again")


def _text(member: Member, place: str) -> str:
    try:
        return member.read(MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: {member.ending} is not UTF-8") from error


def _record(member: Member, place: str) -> dict[str, Any]:
    try:
        found = json.loads(_text(member, place))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{place}: its JSON is no object", fix='write {"answer": ...}')
    return found
