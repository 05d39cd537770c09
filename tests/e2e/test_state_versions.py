"""State of an older mlxd is read, that of a newer one refused with a sentence and left as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd import promptfiles
from mlxd.children.records import Records as ChildRecords
from mlxd.downloads import OpenJob, Records
from mlxd.stateversion import StateTooNew
from support.activator import Activator
from support.daemon import PATIENCE_S, Daemon

SAMPLES = Path(__file__).parents[1] / "samples"
OPEN = [
    OpenJob(job="download-1f2e3d-7", model="org/name", started_at=1760000000.25),
    OpenJob(job="download-1f2e3d-9", model="org/name@v2", started_at=1760000100.5, repair=True),
]
# Each file that a daemon reads back, with what a newer mlxd may have written there, and the version understood today.
NEWER = {
    "downloads.json": ('{"version": 99, "waiting": {"download-1": 1}}', 2),
    "run/children/77.json": ('{"version": 99, "pid": 77, "cgroup": "x"}', 1),
    "cache/prompts.version": ('{"version": 99}', 1),
}


class QuietLog:
    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: None


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLES / "state-1", tmp_path / "home"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- older ----------------------------------------------------------------------------------------------------------


def test_the_first_list_of_downloads_is_read_and_written_anew(home: Path) -> None:
    records = Records(home / "downloads.json", QuietLog())  # type: ignore[arg-type]
    assert records.read() == OPEN
    records.drop(OPEN[0].job)
    assert json.loads((home / "downloads.json").read_bytes())["version"] == 2
    again = Records(home / "downloads.json", QuietLog())  # type: ignore[arg-type]
    assert again.read() == OPEN[1:]


def test_records_of_children_without_a_version_are_read(home: Path) -> None:
    records = ChildRecords(home / "run" / "children")
    records.refuse_newer()
    (path,) = records.entries()
    record = records.read(path)
    assert record is not None
    assert (record.pid, record.version, record.argv[-1]) == (4194301, 1, "9")


def test_prompts_that_were_kept_before_are_still_there(home: Path) -> None:
    root = home / "cache" / "prompts"
    promptfiles.refuse_newer_files(root)
    assert [one.model for one in promptfiles.usage(root)] == ["mlxd/cleanup"]
    promptfiles.trim(root, 2**30)
    assert json.loads(promptfiles.version_file(root).read_bytes()) == {"version": 1}
    assert [one.model for one in promptfiles.usage(root)] == ["mlxd/cleanup"]


def test_a_daemon_takes_up_what_an_older_one_left() -> None:
    daemon = Daemon(bad_child="worker")
    shutil.copytree(SAMPLES / "state-1", daemon.home, dirs_exist_ok=True)
    with daemon, daemon.client() as client:
        for one in OPEN:  # there is no hub here, but the jobs are those that were open
            job = client.wait_job(one.job)
            assert (job.job, job.model, job.started_at) == (one.job, one.model, pytest.approx(one.started_at, abs=1))
        assert not (daemon.home / "run" / "children" / "4194301.json").exists()


# --- newer ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def activator() -> Iterator[Activator]:
    with Activator() as made:
        yield made


def told(path: Path, understood: int) -> str:
    return f"{path} was written by a newer mlxd: it has version 99, and mlxd 0.1.0 reads versions up to {understood}"


@pytest.mark.parametrize("name", NEWER)
def test_what_is_too_new_is_refused_and_left_alone(home: Path, name: str) -> None:
    text, understood = NEWER[name]
    (home / name).write_text(text)
    before = files(home)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLXD_")}
    command = [sys.executable, "-m", "mlxd", "serve"]
    done = subprocess.run(
        command, env=env | {"MLXD_HOME": str(home)}, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 1
    assert told(home / name, understood) in done.stderr
    after = files(home)
    log = after.pop("logs/mlxd.log").decode()
    assert "state is too new" in log
    assert {key: after[key] for key in before} == before
    assert not (home / "mlxd.sock").exists()


def test_under_a_manager_that_is_no_reason_to_start_again(activator: Activator) -> None:
    text, understood = NEWER["downloads.json"]
    (activator.home / "downloads.json").write_text(text)
    activator.start()
    status, said = activator.end()
    assert status == 0
    sentence = told(activator.home / "downloads.json", understood)
    assert sentence in said
    assert activator.hear() == "READY=1"
    assert activator.hear().startswith(f"STATUS=not running: {sentence}")
    (activator.home / "downloads.json").unlink()  # as it says
    activator.start()
    with activator.client() as client:
        client.ping()


@pytest.mark.parametrize("text", ["", "[", '{"version": "x"}', '{"version": null}', "3", '{"version": 1e99}'])
def test_what_is_damaged_is_not_taken_for_new(tmp_path: Path, text: str) -> None:
    path = tmp_path / "downloads.json"
    path.write_text(text)
    assert Records(path, QuietLog()).read() == []  # type: ignore[arg-type]


def test_the_error_says_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "downloads.json"
    path.write_text(NEWER["downloads.json"][0])
    with pytest.raises(StateTooNew) as caught:
        Records(path, QuietLog()).read()  # type: ignore[arg-type]
    assert (caught.value.path, caught.value.found, caught.value.understood) == (path, 99, 2)
    assert path.read_text() == NEWER["downloads.json"][0]
