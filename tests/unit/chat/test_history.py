"""Conversations in SQLite: nothing is lost, nothing is shared with strangers, nothing fails."""

import json
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from phikit.base.errors import DataError, StorageError
from phikit.chat.history import SWITCH, History, Medium, Recorder, Turn, history_file
from phikit.chat.message import Message
from phikit.chat.tools import ToolCall, ToolDefinition


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv(SWITCH, raising=False)


@pytest.fixture
def history() -> Iterator[History]:
    opened = History()
    yield opened
    opened.close()


def said(text: str, role: str = "user", **more) -> Turn:
    return Turn(Message(role, text), "m", **more)  # type: ignore[arg-type]


def test_turns_come_back_as_they_were(history: History):
    tool = ToolDefinition("add", "adds", {"type": "object", "properties": {"a": {}}})
    turns = [
        Turn(Message("system", "Use tools.", tools=(tool,)), "m"),
        Turn(Message("user", "3 + 4?"), "m", media=(Medium.of("image", b"picture"),)),
        Turn(
            Message("assistant", "7", "hm", tool_calls=(ToolCall("add", {"a": 3}),), note="odd"),
            "m",
            settings={"temperature": 0.6, "top_k": None},
            prompt_tokens=9,
            tokens=2,
            seconds=0.25,
            finish_reason="stop",
        ),
    ]
    id_ = history.begin(model="m", source="chat")
    history.add(id_, turns[:2])
    history.add(id_, turns[2:])
    again = history.turns(id_)
    assert again == turns
    assert again[2].message.note == "odd"
    [found] = history.conversations()
    assert (found.id, found.title, found.turns, found.source) == (id_, "3 + 4?", 3, "chat")
    assert json.loads(json.dumps(again[2].to_dict()))["tool_calls"][0]["name"] == "add"


def test_only_the_owner_may_read_it(history: History):
    history.add(history.begin(model="m", source="chat"), [said("secret")])
    files = sorted(history_file().parent.glob("history.sqlite3*"))
    assert [file.name[len("history.sqlite3") :] for file in files] == ["", "-shm", "-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(history_file().parent.stat().st_mode) == 0o700


def test_the_last_spoken_in_comes_first_and_ids_may_be_shortened(history: History):
    ids = [history.begin(model="m", source="chat") for _ in range(3)]
    for second, id_ in enumerate((ids[0], ids[2], ids[1], ids[0])):
        history.add(id_, [said(f"text {second}", created=1e9 + second)])
    history.delete(ids[2])
    assert [c.id for c in history.conversations()] == [ids[0], ids[1]]
    assert history.conversations(limit=1, offset=1)[0].id == ids[1]
    assert history.find(ids[1][:6]).id == ids[1]
    for unknown in (ids[2], "", "%"):
        with pytest.raises(DataError, match="no conversation"):
            history.find(unknown)
    with pytest.raises(DataError, match="no conversation"):
        history.add(ids[2], [said("late")])
    assert history.turns(ids[2]) == []


def test_search_takes_the_text_literally(history: History):
    id_ = history.begin(model="m", source="chat")
    answer = Turn(Message("assistant", "no", thinking="maybe 100% of them_all"), "m")
    history.add(id_, [said("Is it\nABOUT " + "x" * 90 + " cats?"), answer])
    assert [(f.number, f.role) for f in history.search("about")] == [(0, "user")]
    assert history.search("100%")[0].excerpt == "maybe 100% of them_all"
    assert history.search("100_") == [] and history.search("m__all") == []
    assert history.search("cats")[0].excerpt.startswith("…xxx")


def test_rewind_and_delete(history: History):
    id_ = history.begin(model="m", source="chat")
    history.add(id_, [said(str(n)) for n in range(4)])
    history.rewind(id_, 2)
    history.add(id_, [said("new")])
    assert [turn.message.content for turn in history.turns(id_)] == ["0", "1", "new"]
    history.rewind(id_, 3)
    history.add(id_, [said("another question")])
    assert history.find(id_).title == "another question"
    history.add(history.begin(model="m", source="chat"), [said("a rare word")])
    assert history.delete(id_) == 1 and history.delete(id_) == 0
    assert history.delete(None) == 1
    files = history_file().parent.glob("history.sqlite3*")
    assert not any(b"rare word" in file.read_bytes() for file in files)


def test_the_size_is_bounded_and_the_current_conversation_stays(tmp_path: Path):
    history = History(tmp_path / "h", max_bytes=400_000)
    for number in range(20):
        id_ = history.begin(model="m", source="chat")
        history.add(id_, [said(f"{number} " + "text " * 10_000)])
    kept = [conversation.title.split()[0] for conversation in history.conversations()]
    assert kept == [str(number) for number in range(19, 19 - len(kept), -1)]
    assert 3 <= len(kept) <= 8
    assert (tmp_path / "h").stat().st_size < 600_000
    history.add(id_, [said("text " * 200_000)])
    assert [conversation.id for conversation in history.conversations()] == [id_]


WRITER = """
import sys
from phikit.chat.history import History, Turn
from phikit.chat.message import Message
history = History()
own = history.begin(model="m", source="chat")
for number in range(40):
    for id_ in (own, sys.argv[1]):
        history.add(id_, [Turn(Message("user", f"{sys.argv[2]} {number}"), "m")] * 2)
"""


def test_processes_and_threads_write_side_by_side(history: History):
    shared = history.begin(model="m", source="chat")
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, shared, str(number)]) for number in range(2)
    ]
    threads = [
        threading.Thread(target=lambda: [history.add(shared, [said("t")]) for _ in range(30)])
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    contents = [turn.message.content for turn in history.turns(shared)]
    assert len(contents) == 2 * 80 + 90
    for writer in "01":
        own = [content for content in contents if content.startswith(f"{writer} ")]
        assert own == [f"{writer} {number}" for number in range(40) for _ in range(2)]
    assert len(history.conversations()) == 3


def test_a_newer_file_and_a_damaged_one_are_refused(tmp_path: Path):
    History(tmp_path / "h").close()
    with sqlite3.connect(tmp_path / "h") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="newer phikit") as newer:
        History(tmp_path / "h")
    assert SWITCH in str(newer.value)
    (tmp_path / "bad").write_text("no data base" * 1000)
    with pytest.raises(StorageError, match="damaged"):
        History(tmp_path / "bad")


def test_a_recorder_warns_once_and_never_fails(history: History):
    warnings: list[str] = []
    hasty = History(wait_s=0.1)
    recorder = Recorder(model="m", source="chat", warn=warnings.append, history=hasty)
    recorder.record(said("kept"))
    with sqlite3.connect(history_file()) as other:
        other.execute("BEGIN EXCLUSIVE")
        recorder.record(said("lost"))
        recorder.record(said("lost too"))
        recorder.rewind(1)
        other.rollback()
    other.close()
    assert len(warnings) == 1 and "locked" in warnings[0]
    assert [found.title for found in history.conversations()] == ["kept"]
    hasty.close()


def test_a_full_disk_costs_no_turn(tmp_path: Path):
    warnings: list[str] = []
    full = History(tmp_path / "h")
    full._db.execute("PRAGMA max_page_count = 10")
    recorder = Recorder(model="m", source="chat", warn=warnings.append, history=full)
    recorder.record(said("x" * 100_000))
    recorder.record(said("small"))
    assert len(warnings) == 1 and "full" in warnings[0]
    assert History(tmp_path / "h").conversations()[0].turns == 0


def test_a_recorder_keeps_conversations_apart_and_can_be_off(
    history: History, monkeypatch: pytest.MonkeyPatch
):
    recorder = Recorder(model="m", source="chat", warn=pytest.fail)
    assert recorder.conversation is None and history.conversations() == []
    recorder.record(said("one"), said("two"))
    recorder.rewind(1)
    recorder.restart()
    recorder.record(said("bytes \udcff"))
    recorder.close()
    assert [(c.title, c.turns) for c in history.conversations()] == [("bytes ?", 1), ("one", 1)]
    Recorder(model="m", source="chat", warn=pytest.fail, is_on=False).record(said("never"))
    monkeypatch.setenv(SWITCH, "off")
    Recorder(model="m", source="chat", warn=pytest.fail).record(said("never"))
    assert len(history.conversations()) == 2
