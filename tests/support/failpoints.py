"""Daemons that are killed before each of their steps on disk, and what the next one makes of what they leave.

For tests/faults/test_failpoints.py and tools/faults.py. What is done in between writes every file that the daemon
keeps: a file that it does not know has to be added to KNOWN, and its writing to `live`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
import tomllib
from pathlib import Path

import msgspec

from mlxd_client import Client, errors
from support import fake_model
from support.daemon import PATIENCE_S, Daemon
from support.hub import Hub

MORTAL_DAEMON = Path(__file__).with_name("mortal_daemon.py")
REPO = "org/model"
# What may lie in a home; a writer that was killed may have left `.NAME.new` beside what it wrote. `notify` is what
# support/activator.py hears with.
KNOWN = re.compile(
    r"(notify|mlxd\.lock|mlxd\.sock|\.mlxd\.sock\.\d+|downloads\.json|config\.toml|batch\.sqlite3\S*|logs/mlxd\.log(\.\d)?"
    r"|run/children/\d+\.json|run/tmp/.*|models/.*|hub/.*|cache/prompts/.*|(\S*/)?\.[\w.]+\.new)"
)


class Failpoints:
    """One hub, and a daemon of its own for each kill.

    Attributes:
        steps: how many there are, once a daemon has ended well; they differ a little from run to run.
    """

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.steps = 0
        self.commit = hub.commit(REPO, fake_model.files(200_000))

    def kill_at(self, step: int) -> bool:
        """A daemon is killed at this step of what `live` has it do, or ends well. Checks what it has left, and what
        the next one does with that.

        Returns: whether it was killed.
        """
        mortal = [sys.executable, str(MORTAL_DAEMON), str(step)]
        daemon = Daemon(bad_child="worker", program=mortal, env=self.hub.env(), drain_s=1)
        daemon.env["MORTAL_DAEMON"] = str(daemon.home / "models" / "count")
        daemon.model("m")
        try:
            killed = self._live(daemon)
            if not killed:
                self.steps = int((daemon.home / "models" / "count").read_text())
            check_files(daemon.home)
            daemon.program = [sys.executable, "-m", "mlxd"]
            daemon.expect_exit = 0
            with daemon, daemon.client() as client:
                self._go_on(daemon, client)
            return killed
        finally:
            daemon.remove()

    def _live(self, daemon: Daemon) -> bool:
        """All that makes it write. Returns whether it was killed meanwhile: nothing else may go wrong."""
        wrong: Exception | None = None
        try:
            daemon.start()
            with daemon.client(reconnect=False) as client:
                live(client, str(daemon.home / "models" / "m"))
        except (AssertionError, errors.MlxdError) as error:
            wrong = error
        process = daemon.process
        assert process is not None
        if process.poll() is None:
            process.terminate()
        status = process.wait(PATIENCE_S)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        assert status in (0, -9), f"it ended with {status}"
        if wrong is not None and status == 0:
            raise wrong
        return status == -9

    def _go_on(self, daemon: Daemon, client: Client) -> None:
        """The next one serves, and does all that the first was asked, whatever became of that."""
        give_up_at = time.monotonic() + PATIENCE_S
        while open_jobs := [job for job in client.jobs() if job.ended_at is None]:
            assert time.monotonic() < give_up_at, f"it does not go on with {open_jobs}"
            client.wait_job(open_jobs[0].job)
        with contextlib.suppress(errors.ModelNotFound):
            client.delete(REPO)
        live(client, str(daemon.home / "models" / "m"))
        assert client.process("all is well").text == "all is well"
        check_files(daemon.home)
        left = [path for path in (daemon.home / "run" / "children").iterdir() if path.name.endswith(".new")]
        assert not left, left


def live(client: Client, model: str) -> None:
    """What makes a daemon write each of its files, and remove it again. Raises what the client does."""
    client.load(model)
    assert client.process("one two", model=model).text == "one two"
    if "config.set" in client.connect().capabilities:
        client.call("config.set", {"values": {"keep_alive_s": 120.0}})
    items = [{"method": "process", "params": {"prompt": f"item {number}"}} for number in range(3)]
    batch = client.call("batch.submit", {"items": items, "model": model})
    client.wait_job(batch["job"])
    job = client.wait_job(client.download(REPO))
    assert job.state == "done", job
    assert client.verify(REPO).ok
    client.load(REPO)
    client.unload(REPO)
    client.delete(REPO)
    client.unload(model)


def check_files(home: Path) -> None:
    """Nothing lies there that is unknown, and all that is state can be read."""
    for path in home.rglob("*"):
        name = str(path.relative_to(home))
        if path.is_dir() and not path.is_symlink():
            continue
        assert KNOWN.fullmatch(name), f"{name} is no known file: see KNOWN"
        if name.endswith(".new"):
            continue
        if name == "downloads.json" or re.fullmatch(r"run/children/\d+\.json", name):
            msgspec.json.decode(path.read_bytes())
        elif name == "config.toml":
            tomllib.loads(path.read_text())
