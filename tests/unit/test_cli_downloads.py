"""`pull` and its kin against a scripted daemon: what they ask, what they show from events alone, what ctrl-C does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxd.cli import exits
from mlxd.cli.main import main
from mlxd_client import errors, types
from support.scripted_daemon import NOTHING, PATIENCE_S, Connection, ScriptedDaemon, beside, completion, model
from support.terminal import MLXD, Terminal

MB = 1_000_000
GB = 1000 * MB
Run = Callable[..., tuple[int, str, str]]
Start = Callable[..., Terminal]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(str(tmp_path / "s")) as made:
        yield made


@pytest.fixture
def mlxd(daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        command, *rest = arguments
        status = main([command, "--socket", daemon.path, *rest])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


@pytest.fixture
def terminal() -> Iterator[Start]:
    made: list[Terminal] = []

    def start(*arguments: str, **environment: str) -> Terminal:
        made.append(Terminal(*arguments, **environment))
        return made[-1]

    yield start
    for each in made:
        each.close()


class Download:
    """A download of org/m that the test steers; `script` runs once per subscription, beside it.

    Attributes:
        job: as it is now, which is what the daemon answers.
        here: the model, where the disk holds it.
        connection: of the newest subscription.
    """

    def __init__(self, daemon: ScriptedDaemon, script: Callable[[Download], None] | None = None) -> None:
        self.job = types.Job(
            job="d-1", kind="download", state="running", model="org/m", phase="planning", started_at=1000.0
        )
        self.here: types.Model | None = None
        self.subscriptions = 0
        self.stopping = False
        self._daemon = daemon
        self._script = script
        self._rev = 0
        daemon.on("models.get", self._model)
        daemon.on("models.download", {"job": "d-1"})
        daemon.on("jobs.get", lambda _connection, _request: self.job)
        daemon.on("jobs.wait", lambda _connection, _request: self.job)
        daemon.on("jobs.cancel", self._cancel)
        daemon.on("events.subscribe", beside(self._subscribe))

    def tell(self, **changes: Any) -> None:
        """The job changes, and whoever subscribed hears of it."""
        self.job = msgspec.structs.replace(self.job, **changes)
        self.send("job", model_id=self.job.model, job=self.job)

    def send(self, name: str, **fields: Any) -> None:
        self._rev += 1
        self.connection.event(self._rev, name, **fields)

    def at(self, done: int, total: int = 1000, **changes: Any) -> None:
        """So many MB of so many are there."""
        self.tell(phase="downloading", done_bytes=done * MB, total_bytes=total * MB, progress=done / total, **changes)

    def end(self, state: str = "done", **changes: Any) -> None:
        if state == "done":
            self.here = model("org/m", "Downloaded", revision="new", size_bytes=1000 * MB)
        self.tell(state=state, ended_at=1042.0, **changes)

    def requests(self, method: str) -> list[dict[str, Any]]:
        return [
            request.get("params", {})
            for connection in self._daemon.connections
            for request in connection.requests(method)
        ]

    def _model(self, _connection: Connection, request: dict[str, Any]) -> types.Model:
        if self.here is None:
            raise errors.ModelNotFound(f"there is no model {request['params']['model']}")
        return self.here

    def _cancel(self, _connection: Connection, _request: dict[str, Any]) -> types.Job:
        answer = self.job  # the fetcher is still ending when the daemon answers
        self.tell(state="cancelled", ended_at=1010.0)
        return answer

    def _subscribe(self, connection: Connection, request: dict[str, Any]) -> Any:
        self.connection = connection
        self.subscriptions += 1
        ended = self.job.state in ("done", "failed", "cancelled")
        snapshot = types.Snapshot(jobs=[] if ended else [self.job], stopping=self.stopping)
        connection.reply(
            request["id"], types.SubscribeResult(subscription=1, epoch="e1", rev=self._rev, snapshot=snapshot)
        )
        if self._script is not None:
            self._script(self)
        return NOTHING


def brings_it(download: Download) -> None:
    for done in (0, 40, 120, 130, 420, 1000):
        download.at(done, rate_bytes_s=10.0 * MB)
    download.tell(phase="verifying", progress=1.0)
    download.end()


# --- pull, where nobody looks ---------------------------------------------------------------------------------------


def test_pull_tells_the_start_the_tenths_and_the_end(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon, brings_it)
    status, out, err = mlxd("pull", "org/m")
    assert (status, out) == (0, "org/m, 1.0 GB, is there after 42 s\n")
    assert err.splitlines() == [
        "mlxd: downloading org/m: job d-1",
        "mlxd: downloading, 10%, 120 MB of 1.0 GB, 10.0 MB/s, 88 s left",
        "mlxd: downloading, 40%, 420 MB of 1.0 GB, 10.0 MB/s, 58 s left",
        "mlxd: downloading, 100%, 1.0 GB of 1.0 GB, 10.0 MB/s, 0 s left",
    ]
    assert download.requests("models.download") == [{"model": "org/m"}]
    # Events tell everything: nothing was asked again and again.
    assert len(download.requests("jobs.get")) == 1
    assert download.requests("events.subscribe") == [{"topics": ["jobs", "download_progress", "daemon_stopping"]}]


def test_pull_says_when_files_are_fetched_again(daemon: ScriptedDaemon, mlxd: Run) -> None:
    def script(download: Download) -> None:
        download.tell(attempts=2)  # before anybody knows how much it is
        download.at(120)
        download.tell(phase="retrying", attempts=3)
        download.tell(phase="downloading")
        download.end()

    Download(daemon, script)
    err = mlxd("pull", "org/m", "--revision", "v1", "--repair")[2]
    assert err.splitlines()[1:] == [
        "mlxd: asking the hub, attempt 2",
        "mlxd: downloading, attempt 2, 10%, 120 MB of 1.0 GB",
        "mlxd: retrying, attempt 3, 10%, 120 MB of 1.0 GB",
    ]


def test_pull_sends_its_options(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon, brings_it)
    assert mlxd("pull", "org/m", "--revision", "v1", "--repair")[1] == "org/m, 1.0 GB, is whole after 42 s\n"
    assert download.requests("models.download") == [{"model": "org/m", "revision": "v1", "repair": True}]
    assert download.requests("models.get")[0] == {"model": "org/m@v1"}


def test_progress_of_the_model_is_enough(daemon: ScriptedDaemon, mlxd: Run) -> None:
    def script(download: Download) -> None:
        download.at(0)
        download.send("download_progress", model_id="org/other", progress=0.9)
        download.send("job", model_id="org/m", job=msgspec.structs.replace(download.job, job="d-2", progress=0.95))
        download.send("download_progress", model_id="org/m", progress=0.5)
        download.end()

    Download(daemon, script)
    err = mlxd("pull", "org/m")[2]
    assert err.splitlines() == ["mlxd: downloading org/m: job d-1", "mlxd: downloading, 50%, 500 MB of 1.0 GB"]


def test_pull_of_what_is_there(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon)
    download.job = msgspec.structs.replace(download.job, state="done", ended_at=1000.1)
    download.here = model("org/m", "Ready", revision="new", size_bytes=1000 * MB)
    assert mlxd("pull", "org/m") == (0, "org/m, 1.0 GB, is there already, the newest revision\n", "")


def test_pull_of_a_newer_revision(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon, brings_it)
    download.here = model("org/m", "Ready", revision="old", size_bytes=900 * MB)
    assert mlxd("pull", "org/m")[1] == "org/m, 1.0 GB, is there after 42 s\n"


def test_pull_as_json(daemon: ScriptedDaemon, mlxd: Run) -> None:
    Download(daemon, brings_it)
    status, out, err = mlxd("pull", "org/m", "--json")
    assert (status, err) == (0, "")
    (line,) = out.splitlines()
    assert json.loads(line)["state"] == "done"


def test_pull_detached(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon)
    assert mlxd("pull", "org/m", "--detach")[:2] == (0, "org/m is downloaded in the daemon: job d-1\n")
    assert json.loads(mlxd("pull", "org/m", "--detach", "--json")[1])["job"] == "d-1"
    assert download.subscriptions == 0


@pytest.mark.parametrize(
    ("kind", "code"),
    [("download_failed", 10), ("insufficient_disk", 11), ("verification_failed", 12), ("permission_denied", 13),
     ("of_a_newer_daemon", 1)],
)  # fmt: skip
def test_what_a_download_failed_with(daemon: ScriptedDaemon, mlxd: Run, kind: str, code: int) -> None:
    def script(download: Download) -> None:
        download.at(100)
        download.end("failed", error=types.ErrorObject(kind=kind, message="it\nfailed", details={"file": "a"}))

    download = Download(daemon, script)
    status, out, err = mlxd("pull", "org/m")
    assert (status, out) == (code, "")
    assert err.splitlines()[-1] == f"mlxd: {kind}: it failed"
    status, out, err = mlxd("pull", "org/m", "--json")  # it has ended by now: no event will come
    assert status == code
    assert json.loads(out)["state"] == "failed"
    assert json.loads(err)["error"]["data"] == {"kind": kind, "details": {"file": "a"}}
    assert download.subscriptions == 2


def test_somebody_else_cancels_it(daemon: ScriptedDaemon, mlxd: Run) -> None:
    Download(daemon, lambda download: download.end("cancelled"))
    status, _, err = mlxd("pull", "org/m")
    assert status == exits.CANCELLED
    assert err.splitlines()[-1] == "mlxd: cancelled: the download of org/m was cancelled"


@pytest.mark.parametrize("left_out", [False, True])
def test_pull_goes_on_after_it_lagged(daemon: ScriptedDaemon, mlxd: Run, left_out: bool) -> None:
    def script(download: Download) -> None:
        download.at(100)
        if left_out:  # the end was among what was dropped
            download.job = msgspec.structs.replace(download.job, state="done", ended_at=1042.0)
            download.send("lagged", dropped=7, snapshot=types.Snapshot())
        else:
            download.send("lagged", dropped=7, snapshot=types.Snapshot(jobs=[download.job]))
            download.end()

    Download(daemon, script)
    status, out, _ = mlxd("pull", "org/m")
    assert (status, out) == (0, "org/m, 1.0 GB, is there after 42 s\n")


def test_pull_outlives_its_daemon(daemon: ScriptedDaemon, mlxd: Run) -> None:
    """The goal is stated again, to whatever daemon listens now."""

    def script(download: Download) -> None:
        if download.subscriptions == 1:
            download.at(300)
            for connection in list(daemon.connections):
                connection.drop()
        else:
            download.at(900)
            download.end()

    download = Download(daemon, script)
    status, out, err = mlxd("pull", "org/m")
    assert (status, out) == (0, "org/m, 1.0 GB, is there after 42 s\n")
    assert err.count("the daemon went away") == 1
    assert len(download.requests("models.download")) == 2


def test_pull_follows_a_daemon_that_takes_over(daemon: ScriptedDaemon, mlxd: Run) -> None:
    """It need not be started, and nobody has to hear of it."""

    def script(download: Download) -> None:
        if download.subscriptions == 1:
            download.at(300)
            download.send("daemon_stopping", details={"reason": "restart", "version": "9.9.9", "pid": 7})
        elif download.subscriptions == 2:
            download.at(900)
            download.end()

    download = Download(daemon, script)
    status, out, err = mlxd("pull", "org/m", "--no-start")
    assert (status, out) == (0, "org/m, 1.0 GB, is there after 42 s\n")
    assert err.count("downloading org/m") == 1
    assert "daemon" not in err
    assert len(download.requests("models.download")) == 2


def test_a_daemon_that_always_dies_is_left_alone(daemon: ScriptedDaemon, mlxd: Run) -> None:
    def script(download: Download) -> None:
        for connection in list(daemon.connections):  # not the next one, which comes as soon as the first is gone
            connection.drop()

    download = Download(daemon, script)
    status, _, err = mlxd("pull", "org/m")
    assert status == exits.NO_DAEMON
    assert err.count("the daemon went away") == 3
    assert download.subscriptions == 4


def test_no_start_holds_for_a_pull_too(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon, lambda download: download.connection.drop())
    assert mlxd("pull", "org/m", "--no-start")[0] == exits.NO_DAEMON
    assert download.subscriptions == 1


@pytest.mark.parametrize("at_once", [False, True])
def test_a_daemon_that_is_told_to_stop_is_not_started_again(daemon: ScriptedDaemon, mlxd: Run, at_once: bool) -> None:
    def script(download: Download) -> None:
        if not at_once:
            download.send("daemon_stopping")

    download = Download(daemon, script)
    download.stopping = at_once
    status, _, err = mlxd("pull", "org/m")
    assert status == exits.BUSY
    assert "the download goes on when it runs again" in err
    assert download.subscriptions == 1


def test_ctrl_c_where_nobody_can_be_asked_leaves_it_running(daemon: ScriptedDaemon) -> None:
    download = Download(daemon)
    process = subprocess.Popen(
        [*MLXD, "pull", "org/m", "--socket", daemon.path], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "mlxd: downloading org/m: job d-1\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (exits.INTERRUPTED, "")
    assert "is downloaded further in the daemon" in err
    assert "`mlxd jobs cancel d-1` ends it" in err
    assert download.requests("jobs.cancel") == []


# --- pull, on a terminal --------------------------------------------------------------------------------------------


def waits_in_the_middle(download: Download) -> None:
    download.tell(state="queued", phase="queued")
    download.at(250, state="running", rate_bytes_s=5.0 * MB)


def test_the_bar(daemon: ScriptedDaemon, terminal: Start) -> None:
    go_on = threading.Event()

    def script(download: Download) -> None:
        waits_in_the_middle(download)
        go_on.wait(PATIENCE_S)
        download.tell(phase="verifying", progress=1.0, done_bytes=1000 * MB)
        download.end()

    download = Download(daemon, script)
    download.job.model = "org/\x1b]0;evil\x07[red]m"
    screen = terminal("pull", "org/m", "--socket", daemon.path)
    screen.until("[red]m")
    screen.until("waiting for its turn")
    screen.until("downloading")
    screen.until("━")
    screen.until("25%")
    screen.until("250 MB of 1.0 GB")
    screen.until("5.0 MB/s")
    screen.until("2 min left")
    go_on.set()
    screen.until("verifying")
    screen.until("org/m, 1.0 GB, is there after 42 s")
    assert screen.end() == 0
    assert "\x1b]0;" not in screen.shown
    assert screen.shown.rindex("\x1b[?25h") > screen.shown.rindex("\x1b[?25l")  # the cursor is back


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_draw_gets_lines(daemon: ScriptedDaemon, terminal: Start, term: str) -> None:
    Download(daemon, brings_it)
    screen = terminal("pull", "org/m", "--socket", daemon.path, TERM=term)
    assert screen.end() == 0
    assert "downloading, 10%, 120 MB of 1.0 GB" in screen.shown
    assert "\x1b[?25l" not in screen.shown


def interrupted(daemon: ScriptedDaemon, terminal: Start) -> tuple[Download, Terminal]:
    """A pull that was asked by ctrl-C, and asks back."""
    download = Download(daemon, waits_in_the_middle)
    screen = terminal("pull", "org/m", "--socket", daemon.path)
    screen.until("250 MB of 1.0 GB")
    screen.interrupt()
    screen.until("Cancel the download (c), or leave it running in the daemon (Enter)?")
    return download, screen


def test_ctrl_c_and_c_cancels_the_download(daemon: ScriptedDaemon, terminal: Start) -> None:
    download, screen = interrupted(daemon, terminal)
    screen.type("c\n")
    screen.until("the download is cancelled; what has come stays")
    assert screen.end() == exits.INTERRUPTED
    assert download.requests("jobs.cancel") == [{"job": "d-1"}]
    assert "Traceback" not in screen.shown


@pytest.mark.parametrize("answer", ["\n", "\x04", "no\n"])
def test_ctrl_c_and_anything_else_leaves_it_running(daemon: ScriptedDaemon, terminal: Start, answer: str) -> None:
    download, screen = interrupted(daemon, terminal)
    screen.type(answer)
    screen.until("is downloaded further in the daemon")
    assert screen.end() == exits.INTERRUPTED
    assert download.requests("jobs.cancel") == []


def test_a_second_ctrl_c_leaves_it_running(daemon: ScriptedDaemon, terminal: Start) -> None:
    download, screen = interrupted(daemon, terminal)
    screen.interrupt()
    screen.until("is downloaded further in the daemon")
    assert screen.end() == exits.INTERRUPTED
    assert download.requests("jobs.cancel") == []
    assert "Traceback" not in screen.shown


def test_a_download_that_ended_while_the_question_stood(daemon: ScriptedDaemon, terminal: Start) -> None:
    download, screen = interrupted(daemon, terminal)
    download.end()
    daemon.on("jobs.cancel", lambda _connection, _request: download.job)
    screen.type("c\n")
    screen.until("org/m was there already: nothing was left to cancel")
    assert screen.end() == exits.INTERRUPTED


# --- rm, verify, plan, catalog, list --updates, jobs ----------------------------------------------------------------


def test_rm(daemon: ScriptedDaemon, mlxd: Run) -> None:
    def delete(_connection: Connection, request: dict[str, Any]) -> Any:
        if request["params"]["model"] == "org/busy":
            raise errors.ModelBusy("org/busy is loaded")
        return {"freed_bytes": 4 * GB}

    daemon.on("models.delete", delete)
    assert mlxd("rm", "org/a") == (0, "org/a is deleted, 4.0 GB are free again\n", "")
    status, out, err = mlxd("rm", "org/a", "org/busy", "org/b")
    assert status == exits.BUSY
    assert [line.split()[0] for line in out.splitlines()] == ["org/a", "org/b"]
    assert err == "mlxd: model_busy: org/busy is loaded\n"
    lines = [json.loads(line) for line in mlxd("rm", "org/a", "org/b", "--json")[1].splitlines()]
    assert lines == [{"model": "org/a", "freed_bytes": 4 * GB}, {"model": "org/b", "freed_bytes": 4 * GB}]


@pytest.mark.parametrize(("typed", "deleted"), [("y\n", True), ("\n", False), ("\x04", False)])
def test_rm_asks_on_a_terminal(daemon: ScriptedDaemon, terminal: Start, typed: str, deleted: bool) -> None:
    daemon.on("models.list", types.ModelsResult(models=[model("org/a", "Downloaded", size_bytes=4 * GB)]))
    daemon.on("models.delete", {"freed_bytes": 3 * GB})
    screen = terminal("rm", "org/a", "--socket", daemon.path)
    screen.until("Delete org/a (4.0 GB)? [y/N]")
    screen.type(typed)
    screen.until("3.0 GB are free again" if deleted else "nothing was deleted")
    assert screen.end() == (0 if deleted else exits.CANCELLED)
    assert bool(daemon.connections[-1].requests("models.delete")) == deleted


def test_rm_does_not_ask_where_it_was_told_not_to(daemon: ScriptedDaemon, terminal: Start) -> None:
    daemon.on("models.delete", {"freed_bytes": 3 * GB})
    screen = terminal("rm", "-y", "org/a", "--socket", daemon.path)
    screen.until("3.0 GB are free again")
    assert screen.end() == 0


ROTTEN = types.VerifyResult(
    ok=False,
    bad_files=[types.BadFile(file="model.safetensors", reason="hash"), types.BadFile(file="a.json", reason="new")],
)


def test_verify(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("models.verify", types.VerifyResult(ok=True))
    assert mlxd("verify", "org/m") == (0, "org/m: every file is as it should be\n", "")
    assert json.loads(mlxd("verify", "org/m", "--json")[1]) == {"ok": True}
    daemon.on("models.verify", ROTTEN)
    status, out, err = mlxd("verify", "org/m")
    assert status == exits.BAD_FILES
    assert out.splitlines() == [
        "org/m: bad files: 2",
        "  model.safetensors has other bytes than the hub's",
        "  a.json new",
    ]
    assert err == "mlxd: to mend it: mlxd verify --repair org/m\n"
    status, out, err = mlxd("verify", "org/m", "--json")
    assert (status, json.loads(out)["bad_files"][0]["file"], err) == (exits.BAD_FILES, "model.safetensors", "")


def test_verify_repairs(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon, brings_it)
    daemon.on("models.verify", ROTTEN)
    status, out, err = mlxd("verify", "org/m", "--repair")
    assert status == 0
    assert out.splitlines()[-1] == "org/m is whole again"
    assert "downloading, 10%" in err
    assert download.requests("models.download") == [{"model": "org/m", "repair": True}]
    lines = [json.loads(line) for line in mlxd("verify", "org/m", "--repair", "--json")[1].splitlines()]
    assert (lines[0]["ok"], lines[1]["state"]) == (False, "done")
    daemon.on("models.verify", types.VerifyResult(ok=True))
    assert mlxd("verify", "org/m", "--repair")[1] == "org/m: every file is as it should be\n"
    assert len(download.requests("models.download")) == 2


def plan(**changes: Any) -> types.Plan:
    made = types.Plan(
        model="org/m", revision="0123456789abcdef", download_bytes=1 * GB, disk_free_bytes=50 * GB,
        weights_bytes=1 * GB, kv_bytes=470 * MB, memory_bytes=1_604 * MB, memory_available_bytes=8 * GB, fits=True,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_plan(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("models.plan", plan(evicts=["org/a", "org/b"], load_s=1.25))
    status, out, _ = mlxd("plan", "org/m", "--context", "8192", "--revision", "v1")
    assert status == 0
    assert out.splitlines() == [
        "model      org/m, revision 0123456789ab",
        "download   1.0 GB",
        "disk       50.0 GB free",
        "memory     1.6 GB: weights 1.0 GB, KV cache 470 MB",
        "available  8.0 GB",
        "fits       yes, once org/a and org/b made room",
        "load       took 1.2 s the last time",
    ]
    sent = daemon.connections[-1].requests("models.plan")[0]["params"]
    assert sent == {"model": "org/m", "context_length": 8192, "revision": "v1"}
    short = {"disk_free_bytes": 400 * MB, "disk_missing_bytes": 664 * MB}
    daemon.on("models.plan", plan(fits=False, memory_available_bytes=1 * GB, **short))
    out = mlxd("plan", "org/m")[1]
    assert "fits       no: 604 MB of memory are missing" in out
    assert "disk       400 MB free: 664 MB are missing" in out
    daemon.on("models.plan", plan(download_bytes=0))
    assert "download   nothing: it is all there" in mlxd("plan", "org/m")[1]
    assert json.loads(mlxd("plan", "org/m", "--json")[1])["kv_bytes"] == 470 * MB


def test_catalog(daemon: ScriptedDaemon, mlxd: Run) -> None:
    entries = [
        types.CatalogEntry(
            model="org/a", uses=["general", "light"], size_bytes=1 * GB, memory_bytes=2 * GB, smallest_mac_gb=8,
            default=True, state="Ready",
        ),
        types.CatalogEntry(
            model="org/b", uses=["coding"], size_bytes=0, memory_bytes=0, smallest_mac_gb=0, fits=False
        ),
    ]  # fmt: skip
    daemon.on("models.catalog", types.CatalogResult(entries=entries, memory_bytes=9 * GB))
    status, out, _ = mlxd("catalog")
    assert status == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "MODEL FOR SIZE MEMORY MAC STATE FITS",
        "org/a general, light (default) 1.0 GB 2.0 GB 8 GB Ready yes",
        "org/b coding - - - NotDownloaded no",
        "All models together may take 9.0 GB of this machine's memory.",
    ]
    assert mlxd("catalog", "--use", "coding", "-q")[1] == "org/b\n"
    assert mlxd("catalog", "--use", "vision")[1] == "there are none for vision\n"
    assert [entry["model"] for entry in json.loads(mlxd("catalog", "--json")[1])["entries"]] == ["org/a", "org/b"]


def test_list_marks_newer_revisions(daemon: ScriptedDaemon, mlxd: Run) -> None:
    models = [
        model("org/old", "Ready", revision="a", latest_revision="0123456789abcdef", phase="downloading", progress=0.5),
        model("org/new", "Downloading", progress=0.25, phase="downloading"),
    ]
    daemon.on("models.list", types.ModelsResult(models=models))
    status, out, _ = mlxd("list", "--updates")
    assert status == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "MODEL STATE SIZE CONTEXT SOURCE UPDATE",
        "org/old Ready, update 50% - - hub 0123456789ab",
        "org/new Downloading 25% - - hub",
    ]
    assert daemon.connections[-1].requests("models.list")[0]["params"] == {"updates": True}


JOBS = [
    types.Job(job="d-1", kind="download", state="running", model="org/m", phase="downloading", progress=0.5,
              done_bytes=500 * MB, total_bytes=1000 * MB),
    types.Job(job="l-1", kind="load", state="failed", model="org/n",
              error=types.ErrorObject(kind="load_failed", message="no room")),
]  # fmt: skip


def test_jobs(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("jobs.list", types.JobsResult(jobs=JOBS))
    assert [" ".join(line.split()) for line in mlxd("jobs")[1].splitlines()] == [
        "JOB KIND MODEL STATE DONE BEGUN ERROR",
        "d-1 download org/m downloading 50% 500 MB of 1.0 GB -",
        "l-1 load org/n failed - - load_failed: no room",
    ]
    assert mlxd("jobs", "--quiet")[1] == "d-1\n"
    assert [job["job"] for job in json.loads(mlxd("jobs", "--json")[1])] == ["d-1", "l-1"]
    daemon.on("jobs.list", types.JobsResult(jobs=[]))
    assert mlxd("jobs")[1] == "there are no jobs\n"


def test_jobs_cancel(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("jobs.cancel", msgspec.structs.replace(JOBS[0], state="cancelled"))
    assert mlxd("jobs", "cancel", "d-1")[:2] == (0, "d-1 is cancelled; what has come stays for a later pull\n")
    assert daemon.connections[-1].requests("jobs.cancel")[0]["params"] == {"job": "d-1"}
    assert mlxd("jobs", "cancel", "d-1", "--discard")[1] == "d-1 is cancelled; what had come is removed\n"
    assert daemon.connections[-1].requests("jobs.cancel")[0]["params"] == {"job": "d-1", "discard": True}
    daemon.on("jobs.cancel", JOBS[1])
    assert mlxd("jobs", "cancel", "l-1")[1] == "l-1 had ended before: failed\n"
    assert json.loads(mlxd("jobs", "cancel", "l-1", "--json")[1])["state"] == "failed"
    for wrong in (("jobs", "cancel"), ("jobs", "--discard")):
        assert mlxd(*wrong)[0] == exits.USAGE


# --- what is not downloaded -----------------------------------------------------------------------------------------


def refuses(download: Download, answer: Any, **details: Any) -> Callable[[Connection, dict[str, Any]], Any]:
    """Answers once the model is here, and refuses until then."""

    def reply(_connection: Connection, _request: dict[str, Any]) -> Any:
        if download.here is None:
            raise errors.ModelNotDownloaded("org/m is not on this machine", model="org/m", **details)
        return answer

    return reply


def test_a_missing_model_is_told_with_its_plan(daemon: ScriptedDaemon, mlxd: Run) -> None:
    download = Download(daemon, brings_it)
    daemon.on("process", refuses(download, completion("Hi."), plan=msgspec.to_builtins(plan())))
    status, out, err = mlxd("run", "-m", "org/m", "hello")
    assert (status, out) == (exits.NOT_DOWNLOADED, "")
    assert err.splitlines() == [
        "mlxd: model_not_downloaded: org/m is not on this machine",
        "mlxd: download 1.0 GB, 50.0 GB are free on the disk; memory 1.6 GB, 8.0 GB are available",
        "mlxd: to download it: mlxd pull org/m",
    ]
    status, out, err = mlxd("run", "-m", "org/m", "hello", "--json")
    assert (status, out) == (exits.NOT_DOWNLOADED, "")
    assert json.loads(err)["error"]["data"]["details"]["plan"]["kv_bytes"] == 470 * MB
    assert download.requests("models.download") == []


@pytest.mark.parametrize("details", [{}, {"plan": {"model": 3}}, {"plan": None}])
def test_a_missing_model_without_a_plan(daemon: ScriptedDaemon, mlxd: Run, details: dict[str, Any]) -> None:
    daemon.on("models.load", refuses(Download(daemon), None, **details))
    status, _, err = mlxd("load", "org/m")
    assert status == exits.NOT_DOWNLOADED
    assert err.splitlines()[1:] == ["mlxd: to download it: mlxd pull org/m"]


def test_what_does_not_fit_is_said_with_the_plan(daemon: ScriptedDaemon, mlxd: Run) -> None:
    told = msgspec.to_builtins(plan(fits=False, memory_available_bytes=1 * GB))
    daemon.on("models.load", refuses(Download(daemon), None, plan=told))
    assert "mlxd: does it fit: no: 604 MB of memory are missing" in mlxd("load", "org/m")[2].splitlines()


@pytest.mark.parametrize(("typed", "wanted"), [("y\n", True), ("\n", False), ("\x04", False)])
def test_run_offers_to_download(daemon: ScriptedDaemon, terminal: Start, typed: str, wanted: bool) -> None:
    download = Download(daemon, brings_it)

    def reply(connection: Connection, request: dict[str, Any]) -> Any:
        answer = refuses(download, completion("Hello there."), plan=msgspec.to_builtins(plan()))(connection, request)
        connection.stream(request["id"], 0, phase="downloading", progress=0.5)  # as with the setting `auto`
        connection.stream(request["id"], 1, text="Hello there.")
        return answer

    daemon.on("process", reply)
    screen = terminal("run", "-m", "org/m", "hello", "--socket", daemon.path)
    screen.until("model_not_downloaded: org/m is not on this machine")
    screen.until("download 1.0 GB")
    screen.until("Download it now? [y/N]")
    screen.type(typed)
    if wanted:
        screen.until("downloading the model 50%")
        screen.until("Hello there.")
    else:
        screen.until("mlxd pull org/m")
    assert screen.end() == (0 if wanted else exits.NOT_DOWNLOADED)
    assert len(download.requests("models.download")) == wanted


def test_chat_offers_to_download_and_asks_again(daemon: ScriptedDaemon, terminal: Start) -> None:
    download = Download(daemon, brings_it)

    def reply(connection: Connection, request: dict[str, Any]) -> Any:
        answer = refuses(download, completion("HI"))(connection, request)
        connection.stream(request["id"], 0, text="HI")
        return answer

    daemon.on("chat", reply)
    screen = terminal("chat", "-m", "org/m", "--socket", daemon.path)
    screen.until(">>> ")
    screen.type("hi\n")
    screen.until("Download it now? [y/N]")
    screen.type("n\n")
    screen.until("mlxd pull org/m")
    screen.until(">>> ")
    screen.type("hello\n")
    screen.until("Download it now? [y/N]")
    screen.type("y\n")
    screen.until("HI")
    screen.until(">>> ")
    screen.type("\x04")
    assert screen.end() == 0
    asked = [
        request["params"]["messages"] for connection in daemon.connections for request in connection.requests("chat")
    ]
    assert [[turn["content"] for turn in turns] for turns in asked] == [["hi"], ["hello"], ["hello"]]


def test_a_pull_loads_rich_only_for_its_bar(daemon: ScriptedDaemon) -> None:
    Download(daemon, brings_it)
    script = "import sys\nfrom mlxd.cli.main import main\nassert main(sys.argv[1:]) == 0\nprint('rich' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, "pull", "org/m", "--json", "--socket", daemon.path], capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "False"
