"""The files of kept prefixes: whole or not there, within the budget whenever a writer is killed, and never believed."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxd import promptfiles as files
from mlxd.promptfiles import Damaged, Header
from support.hubcache import dies_at, in_a_process

KEY = b"k" * 32
PAGE = files.PAGE
AMPLE = 1 << 24
FOLDER = files.folder_name("org/m", KEY)
OTHER = files.folder_name("org/other", KEY)
MOST_STEPS = 200


def header(number: int, **other: Any) -> Header:
    facts = {"key": KEY, "namespace": b"", "kind": "block", "first": 0, "parent": b"p", "tokens": bytes([number] * 8)}
    return Header(**facts | other)


def payload(number: int, pages: int = 1) -> bytes:
    """As much as makes an entry of so many pages."""
    return bytes([number]) * (PAGE * pages - 512)


def name_of(number: int) -> str:
    return f"{number:032x}"


def path_of(root: Path, number: int, folder: str = FOLDER) -> Path:
    return root / folder / f"{name_of(number)}.kv"


def write(root: Path, *numbers: int, folder: str = FOLDER, budget: int = AMPLE, pages: int = 1) -> list[int]:
    """Write entries, each of use a second after the one before. Returns those for which there was room."""
    with files.session(root, budget) as held:
        assert held is not None
        model = "org/other" if folder.startswith(OTHER[:17]) else "org/m"
        if not held.prepare(root / folder, model):
            return []
        written = []
        for number in numbers:
            pieces = files.encode(header(number), [payload(number, pages)])
            if held.put(root / folder, name_of(number), pieces, (1000 + number) * 10**9):
                written.append(number)
        return written


def get(root: Path, number: int, folder: str = FOLDER) -> bytes:
    return bytes(files.read(path_of(root, number, folder), header(number), len(payload(number))))


def there(root: Path) -> set[int]:
    return {int(path.stem, 16) for path in root.glob("*/*.kv")}


def taken(root: Path) -> int:
    """What lies there, whatever it is, as the disk counts it."""
    sizes = [path.lstat().st_size for path in root.rglob("*") if not path.is_dir()]
    return sum(-(-size // PAGE) * PAGE for size in sizes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "prompts"


def test_what_is_written_is_read(root: Path) -> None:
    assert write(root, 1, 2) == [1, 2]
    assert get(root, 1) == payload(1)
    assert files.list_entries(root / FOLDER) == {name_of(1): 1001 * 10**9, name_of(2): 1002 * 10**9}
    (use,) = files.usage(root)
    assert (use.model, use.entries, use.used_at) == ("org/m", 2, 1002.0)
    assert use.bytes == taken(root)


# --- the budget -------------------------------------------------------------------------------------------------------


def test_what_was_not_of_use_for_longest_goes_first(root: Path) -> None:
    budget = 5 * PAGE  # four entries, and what says whose they are
    write(root, 5, 1, 7, 3, budget=budget)
    assert there(root) == {1, 3, 5, 7}
    files.touch(path_of(root, 1), 2000 * 10**9)
    assert write(root, 8, budget=budget) == [8]
    assert there(root) == {1, 5, 7, 8}
    assert write(root, 4, budget=budget) == []  # all that is there was of use more recently
    assert there(root) == {1, 5, 7, 8}
    assert taken(root) <= budget


def test_all_models_share_one_budget(root: Path) -> None:
    budget = 6 * PAGE
    write(root, 1, 2, 3, 4, 5, budget=budget)
    write(root, 11, 12, folder=OTHER, budget=budget)
    assert there(root) == {4, 5, 11, 12}
    assert taken(root) <= budget


def test_one_that_is_larger_than_all_removes_nothing(root: Path) -> None:
    write(root, 1, budget=4 * PAGE)
    assert write(root, 2, budget=4 * PAGE, pages=9) == []
    assert there(root) == {1}


def test_a_smaller_budget_holds_at_once(root: Path) -> None:
    write(root, 1, 2, 3, 4)
    assert files.trim(root, 3 * PAGE) <= 3 * PAGE
    assert there(root) == {3, 4}
    files.trim(root, 0)
    assert there(root) == set()


def test_never_more_than_a_share_of_the_free_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, 1, 2, 3, 4)

    def full(path: Any) -> Any:
        return type("Disk", (), {"f_bavail": 25, "f_frsize": PAGE})

    monkeypatch.setattr(os, "statvfs", full)  # 25 pages are free, 5 held: 3 are a tenth
    assert write(root, 5) == [5]
    assert there(root) == {4, 5}


def test_there_are_never_too_many(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_FILES", 3)
    write(root, 1, 2, 3)
    write(root, 4, 5)
    assert there(root) == {3, 4, 5}


def test_a_time_to_come_keeps_nothing(root: Path) -> None:
    write(root, 1, 2, 3, budget=4 * PAGE)
    files.touch(path_of(root, 1), time.time_ns() + 10**15)  # the clock was wrong, and was set
    write(root, 4, budget=4 * PAGE)
    assert there(root) == {2, 3, 4}


# --- kills ------------------------------------------------------------------------------------------------------------


def each_step(tmp_path: Path, work: Callable[[Path], object], check: Callable[[Path], None]) -> int:
    """Kill `work` before its first step on the disk, its second and so on; `check` what is left each time."""
    for step in range(1, MOST_STEPS):
        root = tmp_path / f"kill{step}" / "cache" / "prompts"
        root.parent.parent.mkdir()
        write(root, 1, 2, 3)
        write(root, 11, folder=OTHER)
        killed = dies_at(step, lambda root=root: work(root))  # type: ignore[misc]
        check(root)
        if not killed:
            return step
    raise AssertionError("it does not end")


def is_sound(root: Path, budget: int) -> None:
    """What a killed process has left keeps to the budget, claims nothing that is not so, and is no hindrance."""
    assert taken(root) <= budget
    for path in root.glob("*/*.kv"):
        number = int(path.stem, 16)
        assert get(root, number, path.parent.name) == payload(number)
    assert write(root, 90, 91, budget=budget) == [90, 91]
    assert taken(root) <= budget
    assert not list(root.rglob("*.new"))
    assert {90, 91} <= there(root)


def test_killed_while_writing(tmp_path: Path) -> None:
    budget = 6 * PAGE  # all that is there before: each further one makes another go

    def work(root: Path) -> None:
        write(root, 21, 22, 23, budget=budget)
        write(root, 31, folder=files.folder_name("org/other", b"n" * 32), budget=budget)

    assert each_step(tmp_path, work, lambda root: is_sound(root, budget)) > 12


def test_killed_in_the_middle_of_a_file(root: Path) -> None:
    budget = 6 * PAGE
    write(root, 1, 2, 3, budget=budget)
    plain = os.write

    def half(fd: int, data: Any) -> int:
        plain(fd, memoryview(data)[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def work() -> None:
        os.write = half
        write(root, 4, budget=budget)

    status = os.waitstatus_to_exitcode(os.waitpid(in_a_process(work), 0)[1])
    assert status == -signal.SIGKILL
    assert len(list(root.rglob("*.new"))) == 1
    is_sound(root, budget)


@pytest.mark.parametrize("model", [None, "org/m"])
def test_killed_while_clearing(tmp_path: Path, model: str | None) -> None:
    def check(root: Path) -> None:
        is_sound(root, AMPLE)
        files.clear(root, model)
        assert there(root) == (set() if model is None else {11})

    assert each_step(tmp_path, lambda root: files.clear(root, model), check) > 4


def test_two_processes_at_once(root: Path) -> None:
    """Each writes and clears as it likes: the budget holds at every moment, and neither fails."""
    budget = 8 * PAGE
    write(root, 1)

    def writes(folder: str, start: int) -> Callable[[], None]:
        def work() -> None:
            for number in range(start, start + 40):
                with files.session(root, budget) as held:
                    if held is not None and held.prepare(root / folder, "org/m" if folder == FOLDER else "org/other"):
                        pieces = files.encode(header(number), [payload(number)])
                        held.put(root / folder, name_of(number), pieces, time.time_ns())
                assert taken_meanwhile(root) <= budget

        return work

    children = [in_a_process(work) for work in (writes(FOLDER, 10), writes(OTHER, 60))]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert taken(root) <= budget
    for path in root.glob("*/*.kv"):
        number = int(path.stem, 16)
        assert get(root, number, path.parent.name) == payload(number)


def taken_meanwhile(root: Path) -> int:
    """With the lock, so that nothing changes while it is looked at."""
    with files.session(root, AMPLE) as held:
        return 0 if held is None else taken(root)


def test_who_has_not_the_lock_does_not_write(root: Path) -> None:
    with files.session(root, AMPLE) as first, files.session(root, AMPLE) as second:
        assert first is not None
        assert second is None


# --- what lies there --------------------------------------------------------------------------------------------------

LEAD = len(files.MAGIC) + 4 + 32


def flip(at: int) -> Callable[[bytearray], bytes]:
    def change(data: bytearray) -> bytes:
        data[at] ^= 0x10
        return bytes(data)

    return change


CHANGES: dict[str, Callable[[bytearray], bytes]] = {
    "empty": lambda data: b"",
    "cut in the lead": lambda data: bytes(data[:20]),
    "cut in the header": lambda data: bytes(data[: LEAD + 5]),
    "cut by one": lambda data: bytes(data[:-1]),
    "one more": lambda data: bytes(data) + b"x",
    "much more": lambda data: bytes(data) + b"x" * files.MAX_HEADER_BYTES,
    "magic": flip(0),
    "header length": flip(9),
    "a huge header": lambda data: bytes(data[:8]) + b"\xff\xff\xff\xff" + bytes(data[12:]),
    "header digest": flip(14),
    "header": flip(LEAD + 2),
    "payload": flip(-1),
    "payload's first": flip(LEAD + 100),
    "noise": lambda data: bytes(range(256)) * (len(data) // 256),
    "another entry": lambda data: b"".join(files.encode(header(2), [payload(2)])),
    "another model": lambda data: b"".join(files.encode(header(1, key=b"x" * 32), [payload(1)])),
    "another namespace": lambda data: b"".join(files.encode(header(1, namespace=b"a"), [payload(1)])),
    "another beginning": lambda data: b"".join(files.encode(header(1, parent=b"q"), [payload(1)])),
    "another place": lambda data: b"".join(files.encode(header(1, first=64), [payload(1)])),
    "another kind": lambda data: b"".join(files.encode(header(1, kind="mark"), [payload(1)])),
    "no header": lambda data: no_header(data),
}


def no_header(data: bytearray) -> bytes:
    """Every digest is right, and what they are of is no header."""
    import hashlib

    raw = b"\x93" + b"\x01" * (int.from_bytes(data[8:12], "little") - 1)
    return bytes(data[:12]) + hashlib.sha256(raw).digest() + raw + bytes(data[LEAD + len(raw) :])


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_not_written_so_is_not_read(root: Path, change: str) -> None:
    write(root, 1)
    path = path_of(root, 1)
    path.write_bytes(CHANGES[change](bytearray(path.read_bytes())))
    with pytest.raises(Damaged):
        get(root, 1)


@pytest.mark.parametrize("what", ["fifo", "folder", "link", "nothing"])
def test_what_is_no_file_is_not_read(root: Path, what: str) -> None:
    write(root, 1, 2)
    path = path_of(root, 1)
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(path_of(root, 2))
    with pytest.raises((Damaged, OSError)):
        get(root, 1)
    files.clear(root)
    assert there(root) <= ({1} if what == "folder" else set())


def test_a_full_disk_leaves_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, 1)
    plain = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) > 100:
            return plain(fd, memoryview(data)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write(root, 2)
    monkeypatch.undo()
    assert there(root) == {1}
    assert not list(root.rglob("*.new"))


def test_only_its_own_are_shown_and_cleared(root: Path) -> None:
    write(root, 1, 2)
    write(root, 11, folder=OTHER)
    (root / "something").mkdir()
    (root / "something" / "else.kv").write_bytes(b"x")
    write(root, 21, folder=files.folder_name("org/m", b"n" * 32))  # the same model, with other weights
    (root / OTHER / "about").write_text("no JSON")
    assert [(use.model, use.entries) for use in files.usage(root)] == [("org/m", 3)]
    assert files.clear(root, "org/m") > 3 * PAGE
    assert path_of(root, 11, OTHER).exists()
    assert not path_of(root, 1).parent.exists()
    assert files.clear(root) > 0
    assert [path.name for path in root.rglob("*.kv")] == ["else.kv"]


def test_files_of_other_weights_go(root: Path) -> None:
    write(root, 1)
    write(root, 11, folder=OTHER)
    newer = files.folder_name("org/m", b"n" * 32)
    write(root, 21, folder=newer)
    files.remove_stale(root, newer)
    assert there(root) == {11, 21}


def test_a_folder_that_is_too_open_is_closed(root: Path) -> None:
    root.mkdir(parents=True, mode=0o755)
    os.chmod(root, 0o755)
    write(root, 1)
    assert root.stat().st_mode & 0o777 == 0o700


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = files.identity(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert files.identity(tmp_path) == before
    facts = weights.stat()
    weights.write_bytes(b"two")
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = files.identity(tmp_path)
    assert after != before
    (tmp_path / "config.json").write_text("{ }")
    assert files.identity(tmp_path) != after
