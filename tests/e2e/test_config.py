"""Settings of a daemon that runs: by clients, by SIGHUP, by the file; whole or not at all, whoever dies meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from mlxd_client import Client, errors
from mlxd_client.sync import EventStream
from mlxd_client.types import Event
from support.daemon import PATIENCE_S, Daemon, until
from support.tmpfs import Tmpfs

CLEANUP = "mlxd/cleanup"
WRITTEN = "# mine\nkeep_alive_s = 200 # seconds\n\n[aliases]\nold = 'mlxd/cleanup'\n"


@contextlib.contextmanager
def running(text: str | None = WRITTEN, **settings: Any) -> Iterator[tuple[Daemon, Client, EventStream]]:
    """A daemon with this config.toml."""
    daemon = Daemon(bad_child="worker", **settings)
    if text is not None:
        (daemon.home / "config.toml").write_text(text)
    with daemon, daemon.client() as client, client.events() as events:
        yield daemon, client, events


def told(events: EventStream, name: str = "config_changed") -> Event:
    return until(events, name)[-1]


def written(daemon: Daemon) -> dict[str, Any]:
    return tomllib.loads((daemon.home / "config.toml").read_text())


def value(client: Client, name: str) -> Any:
    return client.config_get(name).settings[name].value


# --- looking ------------------------------------------------------------------------------------------------------


def test_each_setting_says_where_it_comes_from_and_when_a_change_takes_effect() -> None:
    with running(drain_s=4) as (daemon, client, _):
        found = client.config_get()
        path = str(daemon.home / "config.toml")
        assert found.path == path
        shown = {name: (one.value, one.origin, one.place, one.applies) for name, one in found.settings.items()}
        assert shown["keep_alive_s"] == (200.0, "file", f"{path}:2", "now")
        assert shown["drain_s"] == (4.0, "environment", "MLXD_DRAIN_S", "now")
        assert shown["queue_limit"] == (512, "default", None, "now")
        assert shown["home"] == (str(daemon.home), "environment", "MLXD_HOME", "restart")
        assert shown["kv_bits"][3] == "load"
        assert (found.error, found.restart, found.warnings) == (None, [], [])
        assert list(client.config_get("blas", "aliases").settings) == ["blas", "aliases"]
        with pytest.raises(errors.InvalidParams, match="did you mean keep_alive_s"):
            client.config_get("keepalive_s")


# --- config.set ---------------------------------------------------------------------------------------------------


def test_a_client_changes_settings_and_the_file_keeps_its_comments() -> None:
    with running() as (daemon, client, events):
        client.load(CLEANUP)
        before = client.model(CLEANUP).idle_unload_at
        change = client.config_set({"keep_alive_s": 50, "aliases.new": CLEANUP}, unset=["aliases.old"])
        assert (change.changed, change.restart, change.overridden) == (["aliases", "keep_alive_s"], [], {})
        event = told(events)
        assert event.details == {"by": "client", "changed": ["aliases", "keep_alive_s"], "restart": []}
        after = client.model(CLEANUP).idle_unload_at
        assert before is not None
        assert after is not None
        assert before - after == pytest.approx(150, abs=5)
        assert client.model("new").id == CLEANUP
        with pytest.raises(errors.ModelNotFound):
            client.model("old")
        text = (daemon.home / "config.toml").read_text()
        assert text.startswith("# mine\nkeep_alive_s = 50 # seconds\n")
        assert written(daemon) == {"keep_alive_s": 50, "aliases": {"new": CLEANUP}}
        client.unload(CLEANUP)
        assert psutil.Process(daemon.pid).memory_info().rss < 40_000_000, "a change costs no room for ever"


def test_the_next_daemon_has_them_too() -> None:
    with running(None) as (daemon, client, _):
        client.config_set({"default_model": "org/other", "memory_budget_bytes": 10**9})
        daemon.restart()
        assert value(client, "default_model") == "org/other"
        assert client.status().memory.budget_bytes == 10**9


@pytest.mark.parametrize(
    ("values", "unset", "said"),
    [
        ({"keep_alive_s": 5, "keepalive": {}}, [], "did you mean keep_alive"),
        ({"keep_alive_s": "long"}, [], "keep_alive_s cannot be 'long'"),
        ({"keep_alive_s": -2}, [], ">= -1"),
        ({"keep_alive_s": True}, [], "expected `float`"),
        ({"keep_alive.org/a": "x"}, [], "keep_alive.org/a cannot be 'x'"),
        ({"keep_alive_s.x": 1}, [], "keep_alive_s is no table"),
        ({"aliases": {"": "x"}}, [], "aliases"),
        ({"aliases": {"x": 1}}, [], "aliases.x cannot be 1"),
        ({"aliases": [["x", "y"]]}, [], "aliases"),
        ({"home": "/tmp/x"}, [], "home cannot be set in a file"),
        ({"keep_alive_s": 5}, ["keep_alive_s"], "is in `values` and in `unset`"),
        ({"aliases": {}, "aliases.a": "b"}, [], "set twice"),
        ({}, ["no_such"], "there is no setting 'no_such'"),
        ({}, [], "nothing to set"),
        ({"pinned": ["x"] * 257}, [], "pinned"),
    ],
)
def test_what_is_wrong_is_refused_by_name_and_nothing_is_half_done(shared, values, unset, said) -> None:
    daemon, client, _ = shared
    with pytest.raises(errors.InvalidParams) as caught:
        client.config_set({"max_batch": 7, **values} if values else {}, unset=unset)
    assert said in caught.value.message
    assert caught.value.details["field"] in ("values", "unset")
    assert (daemon.home / "config.toml").read_text() == WRITTEN
    assert value(client, "max_batch") == 32


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Daemon, Client, EventStream]]:
    with running() as made:
        yield made


@pytest.mark.parametrize("name", ["worker_command", "fetcher_command", "blas"])
def test_clients_do_not_say_what_is_run(shared, name: str) -> None:
    daemon, client, _ = shared
    for ask in ({"values": {name: "/bin/true"}}, {"unset": [name]}):
        with pytest.raises(errors.PermissionDenied, match="not by clients"):
            client.config_set(**ask)
    assert (daemon.home / "config.toml").read_text() == WRITTEN


def test_hostile_values_cost_nobody_but_who_sends_them(shared) -> None:
    daemon, client, _ = shared
    deep: Any = "x"
    for _ in range(50):
        deep = {"a": deep}
    hostile: list[dict[str, Any]] = [
        {"default_model": "x" * 300_000}, {"default_model": ""}, {"aliases.a\nb = 1\n[evil]": "x" * 5000},
        {"catalog": {"org/x": deep}}, {"catalog": {"org/x": {"uses": None}}}, {"queue_limit": 2**53},
        {"keep_alive": {f"m{n}": 1 for n in range(20_000)}, "queue_limit": 0}, {"personas": 5},
        {"": 1}, {".": 1}, {"aliases.": "x"}, {"x" * 4000: 1}, {"drain_s": 1e308}, {"__class__": 1},
        {"catalog.org/x": {"size": 1}}, {"catalog": {"org/x": {"size_bytes": None}}},
        {"personas.x": {"schema": {"const": None}}},
    ]  # fmt: skip
    for values in hostile:
        with pytest.raises(errors.InvalidParams) as refused:
            client.config_set(values)
        assert refused.value.details["field"].startswith("values")
        assert client.process("one two").text == "one two"
    assert (daemon.home / "config.toml").read_text() == WRITTEN


def test_a_name_is_data_and_never_more_of_the_file() -> None:
    with running() as (daemon, client, _):
        client.config_set({'aliases.a"\n[evil]\nb': CLEANUP})
        assert written(daemon) == {"keep_alive_s": 200, "aliases": {"old": CLEANUP, 'a"\n[evil]\nb': CLEANUP}}


def test_what_the_environment_says_wins_and_is_said_to() -> None:
    with running(keep_alive_s=70) as (daemon, client, _):
        change = client.config_set({"keep_alive_s": 60, "max_batch": 3})
        assert (change.changed, change.overridden) == (["max_batch"], {"keep_alive_s": "MLXD_KEEP_ALIVE_S"})
        assert written(daemon)["keep_alive_s"] == 60
        assert value(client, "keep_alive_s") == 70


def test_two_clients_at_once_lose_nothing() -> None:
    with running() as (daemon, client, _):

        def change(number: int) -> None:
            with daemon.client() as mine:
                for n in range(5):
                    mine.config_set({f"aliases.{number}-{n}": CLEANUP})

        threads = [threading.Thread(target=change, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted = {"old": CLEANUP} | {f"{number}-{n}": CLEANUP for number in range(2) for n in range(5)}
        assert written(daemon)["aliases"] == wanted == value(client, "aliases")


# --- the file and the signal --------------------------------------------------------------------------------------


def test_a_change_of_the_file_is_taken_over_by_itself() -> None:
    with running() as (daemon, client, events):
        path = daemon.home / "config.toml"
        path.write_text("max_batch = 5\n")
        event = told(events)
        assert event.details == {"by": "file", "changed": ["aliases", "keep_alive_s", "max_batch"], "restart": []}
        assert (value(client, "max_batch"), value(client, "keep_alive_s")) == (5, 300.0)
        aside = daemon.home / "aside"
        aside.write_text("max_batch = 5\nlog_level = 'debug'\n")
        aside.rename(path)  # as editors do
        assert (told(events).details or {})["changed"] == ["log_level"]
        with daemon.client() as another:
            another.ping()
        assert "client_connected" in daemon.log(), "a line for debugging"
        path.unlink()
        assert (told(events).details or {})["changed"] == ["max_batch", "log_level"]


def test_a_wrong_file_changes_nothing_and_is_told_until_it_is_right() -> None:
    with running() as (daemon, client, events):
        path = daemon.home / "config.toml"
        for text, setting, line in (
            ("keep_alive_s = 5\nmax_batch = 'x'\n", "max_batch", 2),
            ("keep_alive_s = = 5", None, 1),
            ("zzz = 1", "zzz", 1),
        ):
            path.write_text(text)
            os.kill(daemon.pid, signal.SIGHUP)
            error = told(events, "config_failed").error
            assert error is not None
            assert error.kind == "invalid_settings"
            assert error.details == ({"setting": setting} if setting else {}) | {"place": f"{path}:{line}"}
            assert client.config_get().error == client.status().config_error == error
            assert value(client, "keep_alive_s") == 200.0
        with pytest.raises(errors.InvalidSettings, match="zzz"):
            client.config_reload()
        with pytest.raises(errors.InvalidSettings, match="zzz"):
            client.config_set({"keep_alive_s": 1})
        assert path.read_text() == "zzz = 1"
        assert "settings cannot be used" in daemon.log()
        path.write_text(WRITTEN)
        assert client.config_reload().changed == []
        assert told(events).details == {"by": "client", "changed": [], "restart": []}
        assert client.status().config_error is None


def test_sighup_is_for_everything_that_can_change_while_it_runs() -> None:
    with running() as (daemon, client, events):
        other = daemon.model("other")
        client.load(CLEANUP)
        (daemon.home / "config.toml").write_text(
            f"pinned = ['{CLEANUP}']\npreload = ['{other}']\nlog_level = 'error'\nmemory_budget_bytes = 3_000_000_000\n"
            "requests_in_flight = 3\ndownload = 'never'\nqueue_limit = 9\n"
        )
        os.kill(daemon.pid, signal.SIGHUP)
        seen = until(events, "loading_completed", id=other)
        names = [event.name for event in seen]
        assert {"config_changed", "model_changed"} <= set(names)
        assert client.model(CLEANUP).pinned
        assert client.model(other).preload
        assert client.status().memory.budget_bytes == 3_000_000_000
        with daemon.client() as another:
            another.ping()
            hello = another.hello
            assert hello is not None
            assert (hello.limits.requests_in_flight, hello.limits.queue) == (3, 9)
        with pytest.raises(errors.Unsupported, match="turned off"):
            client.download("org/name")
        said = daemon.log()
        client.process("x")
        assert daemon.log() == said, "nothing is an error"


def test_the_command_asks_the_daemon_that_runs() -> None:
    with running(max_batch=9) as (daemon, client, events):

        def mlxd(*words: str) -> tuple[int, str, str]:
            command = [sys.executable, "-m", "mlxd", "config", *words]
            env = {name: value for name, value in daemon.env.items() if name != "MLXD_MAX_BATCH"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
            return done.returncode, done.stdout, done.stderr

        def standing() -> str:
            command = [sys.executable, "-m", "mlxd", "status"]
            return subprocess.run(command, env=daemon.env, capture_output=True, text=True, check=True).stdout

        assert mlxd("get", "max_batch")[1] == "9\n", "the daemon's, not this shell's"
        assert mlxd("set", "keep_alive_s", "77")[1] == "keep_alive_s is changed, at once\n"
        assert value(client, "keep_alive_s") == 77
        status, out, err = mlxd("set", "max_batch=3", "kv_bits.org/a=4")
        assert (status, out) == (0, "kv_bits is changed, for models that are loaded from then on\n")
        assert "MLXD_MAX_BATCH wins" in err
        assert mlxd("set", "blas", "bundled")[0] == 13
        assert mlxd("reload")[1] == "nothing has changed\n"
        (daemon.home / "config.toml").write_text("max_batch = 'x'")
        status, _, err = mlxd("reload")
        assert (status, "max_batch cannot be 'x'" in err) == (2, True)
        assert "what the file said before stands" in mlxd("keep_alive_s")[2]
        assert "max_batch cannot be 'x'" in standing()
        assert mlxd("path")[1] == f"{daemon.home}/config.toml\n"
        told(events)


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_daemon_that_is_killed_while_it_writes_leaves_the_old_or_the_new() -> None:
    with running() as (daemon, client, _):
        path = daemon.home / "config.toml"
        for number in range(1, 5):
            before = tomllib.loads(path.read_text())
            with daemon.client(start=False, reconnect=False) as writer:
                done, answered = threading.Semaphore(0), list[str]()
                thread = threading.Thread(target=_set_until_it_dies, args=(writer, number, done, answered))
                thread.start()
                for _ in range(number):
                    assert done.acquire(timeout=PATIENCE_S)
                daemon.kill()  # in the midst of the next
                thread.join()
            left = tomllib.loads(path.read_text())
            grown = left["aliases"]
            assert grown.keys() >= before["aliases"].keys() | set(answered), "what was answered is on disk"
            assert left["keep_alive_s"] == 200
            assert "# mine" in path.read_text()
            daemon.restart()
            assert value(client, "aliases") == grown
        assert not [name for name in os.listdir(daemon.home) if "new" in name and name != ".config.toml.new"]


def _set_until_it_dies(client: Client, number: int, done: threading.Semaphore, answered: list[str]) -> None:
    with contextlib.suppress(errors.ClientError):
        for n in range(10_000):
            client.config_set({f"aliases.{number}-{n}": CLEANUP})
            answered.append(f"{number}-{n}")
            done.release()


def test_a_full_disk() -> None:
    with Tmpfs(64 * 1024) as disk, running(None) as (daemon, client, _):
        target = disk.folder / "config.toml"
        target.write_text(WRITTEN)
        (daemon.home / "config.toml").symlink_to(target)
        client.config_reload()
        disk.leave(0)
        with pytest.raises(errors.InsufficientDisk, match=r"config\.toml cannot be written"):
            client.config_set({"aliases": {f"alias {n}": "x" * 100 for n in range(300)}})
        assert target.read_text() == WRITTEN
        assert value(client, "aliases") == {"old": CLEANUP}
        assert set(os.listdir(disk.folder)) == {"filler", "config.toml"}
        disk.relax()
        assert client.config_set({"max_batch": 2}).changed == ["max_batch"]


def test_a_lock_that_is_never_given_back_is_an_error_in_time() -> None:
    holder = "import sys, fcntl, os; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print(1, flush=True); input()"
    with running() as (daemon, client, _):
        command = [sys.executable, "-c", holder, str(daemon.home)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            began = time.monotonic()
            with pytest.raises(errors.PermissionDenied, match="another process"):
                client.config_set({"max_batch": 2}, wait_s=PATIENCE_S)
            assert time.monotonic() - began < 20
            assert client.process("x").text == "x"
            process.communicate("\n")
        assert client.config_set({"max_batch": 2}).changed == ["max_batch"]


def test_a_change_that_hangs_does_not_hold_up_the_end() -> None:
    with running(drain_s=0) as (daemon, _client, _):
        fd = os.open(daemon.home, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(daemon.socket))
                for number, (method, params) in enumerate((("config.set", {"values": {"max_batch": 2}}), ("ping", {}))):
                    frame = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
                    sock.sendall(json.dumps(frame).encode() + b"\n")
                assert b'"id":1' in sock.recv(4096), "the change is under way"
                began = time.monotonic()
                assert daemon.stop() == 0
                assert time.monotonic() - began < 2
        finally:
            os.close(fd)


def test_a_terminal_that_goes_takes_the_daemon_along() -> None:
    import pty

    leader, follower = pty.openpty()
    daemon = Daemon(bad_child="worker")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxd", "serve"], env=daemon.env, stdin=follower, stdout=follower, stderr=follower,
        start_new_session=True,
    )  # fmt: skip
    try:
        os.close(follower)
        with daemon.client(start=lambda: None) as client:
            client.ping()
            os.kill(process.pid, signal.SIGHUP)
            client.ping()
        os.close(leader)
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        daemon.remove()
