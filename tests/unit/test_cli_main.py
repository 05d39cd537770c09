"""The command as a whole: how quick, how light, what it says when something is wrong, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd.cli import exits
from mlxd.cli.common import duration, model_ref
from mlxd.cli.main import build_parser, main
from mlxd.cli.output import bytes_text, safe, seconds_text
from mlxd_client import errors
from support.scripted_daemon import NOTHING, ScriptedDaemon
from support.terminal import interrupt

ROOT = Path(__file__).parents[2]
MLXD = [sys.executable, "-m", "mlxd"]
HEAVY = (
    "rich",
    "asyncio",
    "uvloop",
    "mlx",
    "mlx_lm",
    "numpy",
    "structlog",
    "psutil",
    "transformers",
    "huggingface_hub",
)

SUBSCRIBED = {
    "subscription": 1, "epoch": "e", "rev": 1,
    "snapshot": {"models": [{"id": "org/m", "state": "Ready", "source": "hub"}], "jobs": []},
}  # fmt: skip


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(str(tmp_path / "s")) as made:
        yield made


def loaded_by(*arguments: str) -> set[str]:
    """The top-level modules that a command line loads, beyond what the interpreter had."""
    script = (
        "import sys\nbefore = set(sys.modules)\nfrom mlxd.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('\\n', *{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_is_quick() -> None:
    """Processor time, since other processes share this machine: at most 150 ms, a bare interpreter included."""

    def cpu_s() -> float:
        process = subprocess.Popen([*MLXD, "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage.ru_utime + usage.ru_stime

    assert min(cpu_s() for _ in range(5)) < 0.15


def test_help_and_socket_commands_load_nothing_heavy(daemon: ScriptedDaemon) -> None:
    slow = {"msgspec", "pathlib", "shutil", "subprocess", "threading"}  # what only some commands need
    for option in ("--help", "--version"):
        assert loaded_by(option).isdisjoint({*HEAVY, *slow})
    daemon.on("models.list", {"models": []})
    assert loaded_by("list", "--json", "--socket", daemon.path).isdisjoint(HEAVY)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for command in (
        "serve", "run", "chat", "list", "ps", "load", "unload", "pull", "rm", "verify", "plan", "catalog", "jobs",
        "events", "status", "stop", "completion",
    ):  # fmt: skip
        assert re.search(rf"^    {command}\b", shown, re.MULTILINE)
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"mlxd \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("line", ["no-such-command", "list --no-such-option", "load", "run --top-k x", "ps extra"])
def test_usage_errors(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == exits.USAGE
    assert "usage: mlxd" in capsys.readouterr().err


# --- failures -------------------------------------------------------------------------------------------------------


def test_every_kind_has_an_exit_code() -> None:
    assert set(errors.BY_KIND) <= set(exits.BY_KIND)
    described = (ROOT / "docs" / "cli.md").read_text()
    for kind, code in exits.BY_KIND.items():
        assert re.search(rf"^\| {code} \|.*`{kind}`", described, re.MULTILINE), f"docs/cli.md misses {kind} at {code}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ModelNotFound("there is no model x"), 4),
        (errors.QueueFull("512 requests wait already", retry_after_s=2.0), 6),
        (errors.WorkerDied("the worker was killed\nby signal 9"), 9),
        (errors.Cancelled("the request was cancelled"), 5),
        (errors.DownloadFailed("the hub went away", model="org/m"), 10),
        (errors.InsufficientDisk("the disk lacks 2 GB"), 11),
        (errors.PermissionDenied("org/m is gated: accept its terms on the hub"), 13),
        (errors.Unsupported("the model cannot honour a schema", option="schema"), 2),
    ],
)
def test_a_failure_is_one_sentence_with_its_kind(
    daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str], error: errors.RpcError, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    daemon.on("models.load", fail)
    assert main(["load", "x", "--socket", daemon.path]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"mlxd: {error.kind}: {' '.join(error.message.split())}\n"
    assert main(["load", "x", "--socket", daemon.path, "--json"]) == code
    assert json.loads(capsys.readouterr().err) == {"error": error.to_wire()}


def test_no_start_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--no-start", "--socket", str(tmp_path / "nobody")]) == exits.NO_DAEMON
    assert capsys.readouterr().err.startswith("mlxd: connect_failed: no mlxd listens at ")
    assert main(["status", "--no-start", "--socket", "/" + "x" * 200]) != 0
    assert capsys.readouterr().err.count("\n") == 1


def test_a_daemon_that_goes_away(daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.on("status", lambda connection, _request: (connection.drop(), NOTHING)[1])
    assert main(["status", "--socket", daemon.path]) == exits.NO_DAEMON
    assert "connection_lost" in capsys.readouterr().err


def test_who_is_hung_up_on_hears_of_settings_that_are_wrong(
    daemon: ScriptedDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a service whose daemon cannot run."""
    monkeypatch.setenv("MLXD_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text("max_bacth = 3")
    daemon.on("status", lambda connection, _request: (connection.drop(), NOTHING)[1])
    assert main(["status", "--socket", daemon.path]) == exits.NO_DAEMON
    assert "did you mean max_batch?" in capsys.readouterr().err


def test_a_worker_that_died_is_quoted(daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise errors.WorkerDied("the worker exited with code 1", last_words="Traceback\nImportError: no mlx")

    daemon.on("models.load", fail)
    assert main(["load", "x", "--socket", daemon.path]) == exits.MODEL_FAILED
    told = "mlxd: worker_died: the worker exited with code 1; its last words: ImportError: no mlx\n"
    assert capsys.readouterr().err == told


def test_a_reader_that_has_enough(daemon: ScriptedDaemon) -> None:
    daemon.on(
        "models.list", {"models": [{"id": f"org/{n:0200}", "state": "Ready", "source": "hub"} for n in range(5000)]}
    )
    command = f"{' '.join(MLXD)} list --socket {daemon.path} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == str(exits.BROKEN_PIPE)


def test_a_reader_that_leaves_while_nothing_happens(daemon: ScriptedDaemon) -> None:
    daemon.on("events.subscribe", SUBSCRIBED)
    command = f"{' '.join(MLXD)} events --socket {daemon.path} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=30)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == str(exits.BROKEN_PIPE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", ["list", "list --json", "metrics", "events"])
def test_a_full_disk_under_the_output_is_one_sentence(daemon: ScriptedDaemon, command: str) -> None:
    daemon.on("models.list", {"models": []})
    daemon.on("metrics", {"text": "x 1\n", "content_type": "text/plain"})
    daemon.on("events.subscribe", SUBSCRIBED)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*MLXD, *command.split(), "--socket", daemon.path],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
        )
    assert done.returncode == exits.FAILED
    told = done.stderr if "--json" not in command else json.loads(done.stderr)["error"]["message"] + "\n"
    assert told.removeprefix("mlxd: client_error: ") == "the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_fault_of_ours(daemon: ScriptedDaemon, closed: str) -> None:
    daemon.on("models.list", {"models": []})
    command = f"{' '.join(MLXD)} list --socket {daemon.path} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(["bash", "-c", f"{' '.join(MLXD)} run --no-start <&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (exits.USAGE, "mlxd: the prompt is empty\n")


def test_what_a_terminal_cannot_show_is_replaced(daemon: ScriptedDaemon) -> None:
    daemon.on("models.list", {"models": [{"id": "org/modèle→", "state": "Ready", "source": "hub"}]})
    done = subprocess.run(
        [*MLXD, "list", "-q", "--socket", daemon.path], env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("org/modèle?\n".encode("latin-1"), b"")


@pytest.mark.parametrize("module", ["argparse", "mlxd_client.errors", "mlxd.cli.exits", "mlxd.cli.watch"])
def test_ctrl_c_while_it_begins_says_nothing(module: str) -> None:
    """Most of the start is imports; here ctrl-C comes with one of them."""
    script = (
        "import sys\n"
        "class Interrupted:\n    def find_spec(self, name, *_):\n        if name == sys.argv[1]:\n"
        "            sys.meta_path.remove(self)\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from mlxd.cli.main import main\nsys.exit(main(['status', '--no-start']))"
    )
    done = subprocess.run([sys.executable, "-c", script, module], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (exits.INTERRUPTED, "", "")


def test_a_mistyped_command_is_told_what_it_may_have_been(capsys: pytest.CaptureFixture[str]) -> None:
    for line, meant in (("stauts", "stats or status"), ("service instal", "install or uninstall")):
        with pytest.raises(SystemExit):
            main(line.split())
        assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


def test_a_bare_mlxd_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == exits.USAGE
    assert "bug-report" in capsys.readouterr().err


def test_ctrl_c_cancels_the_request(daemon: ScriptedDaemon) -> None:
    def begin(connection: object, request: dict[str, object]) -> object:
        return NOTHING

    daemon.on("process", begin)
    process = subprocess.Popen(
        [*MLXD, "run", "hello", "--socket", daemon.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    connection = daemon.connection()
    (request,) = connection.wait_for("process")
    interrupt(process)
    assert connection.cancel_of(request["id"]).wait(20)
    out, err = process.communicate(timeout=20)
    assert process.returncode == exits.INTERRUPTED
    assert (out, err) == ("", "")


def test_started_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A command starts `mlxd serve` where nothing listens, and tells it where."""
    from mlxd_client import connect

    started: list[str] = []
    made = ScriptedDaemon(str(tmp_path / "s"))
    made.on("models.list", {"models": []})

    class Process:
        pid = 1

        def poll(self) -> None:
            return None

    def spawn(command: list[str], path: str) -> connect.Child:
        started.append(path)
        made.start()
        return connect.Child(Process(), command)

    monkeypatch.setattr(connect, "spawn", spawn)
    try:
        assert main(["list", "--quiet", "--socket", made.path]) == 0
    finally:
        made.stop()
    assert started == [made.path]


# --- small things ---------------------------------------------------------------------------------------------------


def test_sizes_and_durations() -> None:
    sizes = (0, 999, 1000, 15_500_000, 999_960_000, 4_200_000_000, 3_000_000_000_000)
    assert [bytes_text(size) for size in sizes] == [
        "0 B", "999 B", "1.0 kB", "15.5 MB", "1.0 GB", "4.2 GB", "3.0 TB",
    ]  # fmt: skip
    assert bytes_text(None) == "-"
    assert [seconds_text(s) for s in (-3, 1.4, 119, 300, 7200, 7500, 90_000 * 2)] == [
        "0 s", "1 s", "119 s", "5 min", "2 h", "2 h 5 min", "2 d 2 h",
    ]  # fmt: skip
    assert [duration(text) for text in ("90", "1.5s", "5m", "2h", "1d", "forever", "-1")] == [
        90, 1.5, 300, 7200, 86_400, -1, -1,
    ]  # fmt: skip


def test_folders_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/u")
    assert model_ref("./m") == str(tmp_path / "m")
    assert model_ref("~/m") == "/u/m"
    assert [model_ref(ref) for ref in ("org/m", "/abs", "alias", "~m")] == ["org/m", "/abs", "alias", "~m"]


def test_terminals_are_told_nothing() -> None:
    assert safe("a\x1b[31mb\x07\r\x9b1mc\n\td\u00e9") == "a[31mb1mc\n\td\u00e9"


def test_options_of_the_wire_are_all_there() -> None:
    from mlxd_client.types import GenerateParams

    parsed = vars(build_parser().parse_args(["run", "x"]))
    # `stream` has a meaning of its own here, `cache_prompt` serves programs that know what they repeat.
    assert set(GenerateParams.__struct_fields__) - {"cache_prompt"} <= parsed.keys()


def test_serve_names_wrong_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXD_HOME", str(tmp_path / "home"))
    assert main(["serve", "--set", "max_batch=many"]) == exits.USAGE
    assert capsys.readouterr().err == (
        "mlxd: invalid_settings: max_batch cannot be 'many' (--set max_batch): expected `int`, got `str`\n"
    )
    assert main(["serve", "--set", "max_bach=3"]) == exits.USAGE
    assert "did you mean max_batch?" in capsys.readouterr().err
    assert main(["serve", "--set", "max_batch"]) == exits.USAGE
    assert main(["serve", "--set", 'catalog={"org/m": {"sise": 1}}']) == exits.USAGE
    assert "sise" in capsys.readouterr().err
