"""Shards are untrusted: what is no sample is refused, and nothing is unpacked."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from phikit.base.errors import DataError
from phikit.data.media import shards
from phikit.data.media.layouts import read_layout
from phikit.data.media.problem import Stored
from phikit.data.media.shards import read_shards, write_shards


def shard(path: Path, *files: tuple[str, bytes], **header: object) -> Path:
    """A tar file; `header` goes into the first member."""
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(files):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in header.items() if number == 0 else ():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_shards_of_others(tmp_path: Path):
    path = shard(
        tmp_path / "a.tar",
        ("train/0.jpg", b"picture"), ("train/0.txt", b"A cat."),
        ("train/1.json", b'{"question": "Who speaks?", "answer": "Ann"}'), ("train/1.WAV", b"w"),
        ("README.md", b"hello"),
    )  # fmt: skip
    seen, heard = read_layout("webdataset", path)
    assert (seen.question, seen.answer) == ("<|image_1|>Describe the picture.", "A cat.")
    assert (heard.question, heard.answer) == ("<|audio_1|>Who speaks?", "Ann")
    [picture] = seen.media["vision"]
    assert isinstance(picture, Stored) and picture.load() == b"picture"
    assert picture.name == "a.tar: train/0.jpg"
    shard(tmp_path / "b.tar", ("2.png", b"p"), ("2.txt", b"A dog."))
    assert [p.answer for p in read_shards(tmp_path)] == ["A cat.", "Ann", "A dog."]


def test_a_chain_of_headers_is_no_file(tmp_path: Path):
    name = tarfile.TarInfo("p")
    name.size, name.type = 5, tarfile.GNUTYPE_LONGNAME
    link = name.tobuf(tarfile.USTAR_FORMAT) + b"aaaa\0" + bytes(507)
    (tmp_path / "a.tar").write_bytes(3_000 * link)
    with pytest.raises(DataError, match="no plain tar file, or damaged"):
        list(read_shards(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("name", "header", "reason"),
    [
        ("../x.png", {}, "leads out"),
        ("/etc/x.png", {}, "leads out"),
        ("a/../../x.png", {}, "leads out"),
        ("x.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "no plain file"),
        ("x.png", {"type": tarfile.LNKTYPE, "linkname": "y"}, "no plain file"),
        ("x.png", {"type": tarfile.FIFOTYPE}, "no plain file"),
    ],
)
def test_members_that_no_shard_needs(tmp_path: Path, name: str, header: dict, reason: str):
    data = b"" if header else b"p"
    path = shard(tmp_path / "a.tar", (name, data), ("x.txt", b"t"), **header)
    with pytest.raises(DataError, match=reason):
        list(read_shards(path))


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = shard(tmp_path / "a.tar", ("0.png", b"p" * 100), ("0.txt", b"t"), ("1.txt", b"t"))
    monkeypatch.setattr(shards, "MAX_MEMBERS", 2)
    with pytest.raises(DataError, match="more than 2 members"):
        list(read_shards(path))
    large = shards.Member(path, "0.png", 512, 100)
    with pytest.raises(DataError, match=r"0.png has 100 bytes; at most 99"):
        large.read(99)


def test_damaged_shards(tmp_path: Path):
    whole = shard(tmp_path / "a.tar", ("0.png", b"p" * 9000), ("0.txt", b"t"), ("1.png", b"p"))
    data = whole.read_bytes()
    flipped = bytearray(data)
    flipped[512 + 9216 + 150] ^= 0xFF  # in the checksum of the second header
    in_a_header = data[: 512 + 9216 + 100]
    for damaged in (
        data[:5000], in_a_header, bytes(flipped), b"hello" * 300, b"", gzip.compress(data),
    ):  # fmt: skip
        (tmp_path / "b.tar").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged|holds nothing"):
            read_layout("webdataset", tmp_path / "b.tar")
    shard(tmp_path / "c.tar", ("0.png", b"p"), ("0.json", b"{"))
    with pytest.raises(DataError, match=r"c.tar: 0: not JSON"):
        list(read_shards(tmp_path / "c.tar"))
    shard(tmp_path / "c.tar", ("0.png", b"p"))
    with pytest.raises(DataError, match="nothing says what it shows"):
        list(read_shards(tmp_path / "c.tar"))
    shard(tmp_path / "c.tar", ("0.json", b'{"media": {"vision": ["png"]}}'), ("0.png", b"p"))
    with pytest.raises(DataError, match=r"c.tar: 0: question: "):
        list(read_shards(tmp_path / "c.tar"))


def test_shards_are_not_overwritten(tmp_path: Path):
    shard(tmp_path / "a.tar", ("0.png", b"p"))
    with pytest.raises(DataError, match="holds shards already"):
        write_shards([], tmp_path)
