"""Files of state: old or new whoever is killed when, and however full the disk is; and nobody writes them otherwise."""

from __future__ import annotations

import ast
import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxd.children.records import Records as ChildRecords
from mlxd.downloads import OpenJob
from mlxd.downloads import Records as DownloadRecords
from mlxd.service.spec import ServiceError, write_private
from mlxd.wholefiles import write_whole
from support.children import QuietLog
from support.hubcache import dies_at, in_a_process
from support.tmpfs import Tmpfs

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "daemon" / "src" / "mlxd"
OLD, NEW = b"old" * 1000, b"new" * 50_000


# --- the one function ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"durable": False}, {"shared": True}], ids=["plain", "not durable", "shared"])
@pytest.mark.parametrize("was_there", [False, True])
def test_killed_before_any_of_its_steps(tmp_path: Path, options: dict[str, bool], was_there: bool) -> None:
    steps = 0
    while True:
        steps += 1
        path = tmp_path / str(steps) / "state.json"
        path.parent.mkdir()
        if was_there:
            path.write_bytes(OLD)
        killed = dies_at(steps, lambda path=path: write_whole(path, NEW, **options))  # type: ignore[misc]
        assert (path.read_bytes() if path.exists() else None) in ((OLD, NEW) if was_there else (None, NEW))
        write_whole(path, OLD + NEW)  # the next writer is not in the dead one's way
        assert path.read_bytes() == OLD + NEW
        if not options.get("shared"):
            assert os.listdir(path.parent) == ["state.json"]
        if not killed:
            break
    assert steps > 2


def test_killed_in_the_middle_of_its_bytes(tmp_path: Path) -> None:
    """By the kernel, which takes some of a write and then ends the writer."""
    path = tmp_path / "state.json"
    path.write_bytes(OLD)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, resource.RLIM_INFINITY))
        write_whole(path, NEW)

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_process(work), 0)[1]) == -signal.SIGXFSZ
    assert path.read_bytes() == OLD
    assert len(os.listdir(tmp_path)) == 2, "it was to die in the middle"
    write_whole(path, NEW)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (NEW, ["state.json"])


def test_what_lies_aside_is_not_written_through(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "state.json", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"another's")
    (tmp_path / ".state.json.new").symlink_to(elsewhere)
    write_whole(path, NEW, mode=0o640)
    assert elsewhere.read_bytes() == b"another's"
    assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / ".state.json.new").mkdir()
    with pytest.raises(OSError):
        write_whole(path, OLD)
    assert path.read_bytes() == NEW


# --- every writer, on a disk that is full ---------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Tmpfs]:
    with Tmpfs(256 * 1024) as disk:
        yield disk


def write_downloads(folder: Path, size: int) -> Path:
    records = DownloadRecords(folder / "downloads.json", QuietLog())
    records.read()
    records.keep(OpenJob(job="download-1", model="org/" + "m" * size, started_at=1.0))
    return folder / "downloads.json"


def write_child(folder: Path, size: int) -> Path:
    with contextlib.suppress(OSError):  # told in the log, and no reason to stop
        ChildRecords(folder).write(os.getpid(), "worker", "m" * size, ["python"])
    return folder / f"{os.getpid()}.json"


def write_unit(folder: Path, size: int) -> Path:
    with contextlib.suppress(ServiceError):
        write_private(folder / "mlxd.service", b"x" * size)
    return folder / "mlxd.service"


@pytest.mark.parametrize("write", [write_downloads, write_child, write_unit])
def test_a_full_disk_leaves_the_old(small_disk: Tmpfs, write: Callable[[Path, int], Path]) -> None:
    folder = small_disk.folder
    path = write(folder, 10)
    old = path.read_bytes()
    small_disk.leave(0)
    assert write(folder, 5000) == path
    assert path.read_bytes() == old
    assert sorted(os.listdir(folder)) == sorted(["filler", path.name]), "something lies beside it"
    small_disk.relax()
    assert len(write(folder, 5001).read_bytes()) > 5000


# --- nobody writes otherwise ----------------------------------------------------------------------------------------

# Who else makes or changes files, and where it is shown what becomes of them when the writer is killed or the disk
# is full. A new writer has to use `write_whole`, or to stand here with its test.
OTHERS = {
    "wholefiles.py": "unit/test_whole_files.py",
    "logs.py": "unit/test_logs.py",  # lines are added; one that is torn is closed by a newline
    "server/listen.py": "faults/test_daemon_crash.py",  # a lock that holds nothing; a socket that is renamed
    "handover.py": "e2e/test_restart.py",  # a nameless file
    "promptfiles.py": "unit/test_prompt_files.py",
    "batch/schema.py": "unit/test_batch_store.py",  # SQLite
    "store/files.py": "unit/test_store_kills.py",
    "store/layout.py": "unit/test_store_kills.py",
    "store/remove.py": "unit/test_store_kills.py",
    "store/shared.py": "unit/test_store_kills.py",  # a lock that holds nothing
    "fetch/parts.py": "unit/test_fetch_parts.py",
    "sidecar.py": "e2e/test_sidecar.py",  # /dev/null
    "cli/main.py": "e2e/test_cli.py",  # /dev/null
    "cli/bugreport.py": "e2e/test_bug_report.py",  # a file for people, where they want it
    "cli/batch.py": "e2e/test_batch.py",  # the same
    "worker/alias.py": "unit/test_worker_families.py",  # a file in memory
    "service/systemd.py": "unit/test_service.py",  # for systemd to check, in a folder that goes at once
    "server/document.py": "unit/test_server_document.py",  # the project's own docs
}
METHODS = {"write_bytes", "write_text", "symlink_to", "hardlink_to", "rename"}
FUNCTIONS = {
    "os": {"replace", "rename", "link", "symlink", "truncate", "mkfifo", "sendfile", "fdopen", "posix_fallocate"},
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move"},
    "tempfile": {"mkstemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "mkdtemp"},
    "sqlite3": {"connect"},
}
WRITING = {"O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC"}


def writes(call: ast.Call) -> bool:
    """Whether a call looks like one that makes, changes or moves a file."""
    match call.func:
        case ast.Attribute(value=ast.Name(id=module), attr=name) if name in FUNCTIONS.get(module, ()):
            return True
        case ast.Attribute(value=ast.Name(id="os"), attr="open") | ast.Name(id="open"):
            words = {node.attr for part in call.args for node in ast.walk(part) if isinstance(node, ast.Attribute)}
            modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "mode")]
            texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
            return bool(words & WRITING) or any(set(text) & set("wax+") for text in texts)
        case ast.Attribute(attr=name) if name in METHODS or (name == "touch" and not call.args):
            return True
    return False


def test_nobody_else_writes_files() -> None:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        lines = [
            node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and writes(node)
        ]
        if lines:
            found[str(path.relative_to(SOURCE))] = lines
    unknown = {name: lines for name, lines in found.items() if name not in OTHERS}
    assert not unknown, f"these write files, and are neither by write_whole nor in OTHERS: {unknown}"
    assert set(OTHERS) <= set(found), f"these write no files any more: {set(OTHERS) - set(found)}"
    assert all((ROOT / "tests" / test).exists() for test in OTHERS.values())
