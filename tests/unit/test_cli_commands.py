"""Each command against a scripted daemon: what it asks, what it prints, as text, as JSON and on a terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd.cli import exits
from mlxd.cli.daemon import gone
from mlxd.cli.main import main
from mlxd_client import errors, types
from support.scripted_daemon import NOTHING, PATIENCE_S, Connection, ScriptedDaemon, beside, completion, model
from support.terminal import Terminal


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(str(tmp_path / "s")) as made:
        yield made


@pytest.fixture
def mlxd(daemon: ScriptedDaemon, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        command, *rest = arguments
        status = main([command, "--socket", daemon.path, *rest])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


Run = Callable[..., tuple[int, str, str]]

STATUS = types.Status(
    version="0.1.0", pid=4242, uptime_s=7320, rss_bytes=31_000_000, clients=3, subscribers=1,
    models=types.StatusModels(known=4, loaded=1), queue=types.StatusQueue(waiting=2, running=1),
    memory=types.Memory(budget_bytes=8_000_000_000, used_bytes=20_000_000),
    workers=[
        types.WorkerHealth(
            model="org/m", deaths=3, breaker="open",
            last_death=types.ErrorObject(kind="worker_died", message="killed by SIGKILL"),
        )
    ],
)  # fmt: skip
MODELS = [
    model("mlxd/cleanup", "Ready", size_bytes=8_300_000, context_length=1024, memory_bytes=9_000_000, active=1,
          waiting=2),
    model("org/big", "Loading", size_bytes=4_200_000_000, progress=0.4, phase="loading"),
    model("org/pinned", "Ready", memory_bytes=10, leases=1),
    model("org/other", "Downloaded", error=types.ErrorObject(kind="load_failed", message="it did not fit")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _times_from_now() -> None:
    """A long run may get here minutes after it read this file."""
    STATUS.workers[0].retry_at = time.time() + 7410
    MODELS[0].idle_unload_at = time.time() + 235


# --- status, list, ps, load, unload ---------------------------------------------------------------------------------


STATS = types.Stats(
    since_at=1.0, clients=types.ClientTotals(open=3, subscribers=1, accepted=9, refused=0),
    events=types.EventTotals(published=5, dropped=3, lagged=1), downloads=types.DownloadTotals(),
    models=[
        types.ModelStats(model="mlxd/cleanup", now_tokens_per_s=33.6,
                         requests={"chat": {"stop": 3, "length": 1, "cancelled": 2}, "embed": {"done": 1}}),
        types.ModelStats(model="org/m", requests={"process": {"worker_died": 3}}),
    ],
)  # fmt: skip


def test_status(daemon: ScriptedDaemon, mlxd: Run) -> None:
    whole = {
        "activated": True,
        "memory": types.Memory(
            budget_bytes=8_000_000_000, used_bytes=20_000_000, available_bytes=5_000_000_000,
            pressure=types.Pressure(level="critical", source="psi", since_at=time.time() - 130),
        ),
    }  # fmt: skip
    job = types.Job(
        job="download-1", kind="download", state="running", model="org/big", phase="verifying", progress=0.5
    )
    daemon.on("status", types.Status(**{**_fields(STATUS), **whole}))
    daemon.on("stats", STATS)
    daemon.on("models.list", {"models": MODELS})
    daemon.on("jobs.list", {"jobs": [job]})
    status, out, err = mlxd("status")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "mlxd      0.1.0, process 4242, up 2 h 2 min, started for its first client",
        "memory    31.0 MB itself, models 20.0 MB of 8.0 GB; the system has 5.0 GB left",
        "pressure  critical for 2 min, by psi",
        "models    1 loaded of 4 known",
        "          mlxd/cleanup: Ready, 9.0 MB, 1 running, 2 waiting, 34 tokens/s, unloads in 3 min",
        "          org/big: Loading 40%, 0 running, 0 waiting",
        "          org/pinned: Ready, 10 B, 0 running, 0 waiting",
        "requests  1 running, 2 waiting; so far 5 answered, 3 failed, 2 cancelled",
        "job       download of org/big: verifying 50%",
        "clients   3, of them 1 subscribed to events",
        "events    3 lost by subscribers that did not keep up",
        "worker    org/m: died 3 times, last: killed by SIGKILL; not started again for 2 h 3 min",
    ]


def test_status_of_an_older_daemon(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("status", STATUS)
    daemon.on("models.list", {"models": []})
    daemon.on("jobs.list", {"jobs": []})
    status, out, err = mlxd("status")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "mlxd      0.1.0, process 4242, up 2 h 2 min",
        "memory    31.0 MB itself, models 20.0 MB of 8.0 GB",
        "models    1 loaded of 4 known",
        "requests  1 running, 2 waiting",
        "clients   3, of them 1 subscribed to events",
        "worker    org/m: died 3 times, last: killed by SIGKILL; not started again for 2 h 3 min",
    ]
    assert json.loads(mlxd("status", "--json")[1])["queue"] == {"waiting": 2, "running": 1}


def test_list(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("models.list", types.ModelsResult(models=MODELS))
    status, out, _ = mlxd("list")
    assert status == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "MODEL STATE SIZE CONTEXT SOURCE LAST ERROR",
        "mlxd/cleanup Ready 8.3 MB 1024 hub",
        "org/big Loading 4.2 GB - hub",
        "org/pinned Ready - - hub",
        "org/other Downloaded - - hub it did not fit",
    ]
    assert mlxd("list", "-q")[1].split() == [each.id for each in MODELS]
    assert [each["id"] for each in json.loads(mlxd("list", "--json")[1])] == [each.id for each in MODELS]


def test_ps(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("models.list", types.ModelsResult(models=MODELS))
    assert [" ".join(line.split()) for line in mlxd("ps")[1].splitlines()] == [
        "MODEL STATE MEMORY ACTIVE WAITING UNLOADS",
        "mlxd/cleanup Ready 9.0 MB 1 2 in 3 min",
        "org/big Loading 40% - 0 0 -",
        "org/pinned Ready 10 B 0 0 leased",
    ]
    daemon.on("models.list", types.ModelsResult(models=[]))
    assert mlxd("ps")[1] == "no model is loaded\n"
    assert mlxd("ps", "--json")[1] == "[]\n"


def test_what_is_not_here_is_not_listed(daemon: ScriptedDaemon, mlxd: Run) -> None:
    """Neither what could not be downloaded, nor, as loaded, what is on its way."""
    models = [
        model("org/gone", "NotDownloaded", error=types.ErrorObject(kind="download_failed", message="the hub was down")),
        model("org/coming", "Downloading", phase="downloading", progress=0.5),
        model("org/next", "Downloaded", phase="queued"),
    ]
    daemon.on("models.list", types.ModelsResult(models=models))
    assert mlxd("list", "-q")[1].split() == ["org/coming", "org/next"]
    assert "the hub was down" not in mlxd("list")[1]
    assert len(json.loads(mlxd("list", "--json")[1])) == 3
    assert [" ".join(line.split()) for line in mlxd("ps")[1].splitlines()[1:]] == [
        "org/next Downloaded, queued - 0 0 -"
    ]


def test_load_and_unload(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("models.load", MODELS[0])
    daemon.on("models.unload", model("mlxd/cleanup", "Downloaded"))
    status, out, _ = mlxd("load", "mlxd/cleanup", "--keep-alive", "5m")
    assert status == 0
    assert out.startswith("mlxd/cleanup is ready after ")
    assert daemon.connections[-1].requests("models.load")[0]["params"] == {"model": "mlxd/cleanup", "keep_alive": 300.0}
    assert mlxd("unload", "mlxd/cleanup")[1] == "mlxd/cleanup is unloaded\n"
    assert json.loads(mlxd("unload", "./x", "--json")[1])["state"] == "Downloaded"
    assert daemon.connections[-1].requests("models.unload")[0]["params"] == {"model": os.path.abspath("x")}


def test_load_with_a_system_turn(daemon: ScriptedDaemon, mlxd: Run, tmp_path: Path) -> None:
    daemon.on("models.load", MODELS[0])
    (tmp_path / "system").write_text("be brief\n")
    for words, system in ((("--system", "be kind"), "be kind"), (("--system-file", "system"), "be brief\n")):
        words = words if words[0] == "--system" else (words[0], str(tmp_path / words[1]))
        assert mlxd("load", "org/m", *words)[0] == 0
        asked = daemon.connections[-1].requests("models.load")[0]["params"]
        assert asked == {"model": "org/m", "system": system}
    (tmp_path / "latin").write_bytes(b"\xe4\xff")
    for name in ("latin", "missing"):
        status, _, err = mlxd("load", "org/m", "--system-file", str(tmp_path / name))
        assert status == exits.USAGE
        assert f"{tmp_path / name} cannot be read" in err


# --- cache ------------------------------------------------------------------------------------------------------------

KEPT = types.CacheResult(
    models=[
        types.ModelCache(
            model="mlxd/cleanup",
            memory=types.CacheInMemory(hits=5, misses=2, saved_tokens=12_345, bytes=9_000_000),
            disk=types.CacheOnDisk(entries=7, bytes=4_000_000, hits=1, saved_tokens=64, failures=2),
        ),
        types.ModelCache(model="org/fresh", memory=types.CacheInMemory()),
        types.ModelCache(model="org/gone", disk=types.CacheOnDisk(entries=1, bytes=1_000_000)),
    ],
    disk_bytes=5_000_000, memory_budget_bytes=800_000_000, disk_budget_bytes=4_000_000_000,
)  # fmt: skip


def test_cache(daemon: ScriptedDaemon, mlxd: Run) -> None:
    for one in KEPT.models:
        if one.disk is not None:
            one.disk.last_used_at = time.time() - 130
    daemon.on("cache.list", KEPT)
    assert [" ".join(line.split()) for line in mlxd("cache")[1].splitlines()] == [
        "MODEL HITS MISSES TOKENS SAVED MEMORY ENTRIES DISK LAST USED",
        "mlxd/cleanup 5 2 12,345 9.0 MB 7 4.0 MB 2 min ago",
        "org/fresh 0 0 0 0 B - - -",
        "org/gone - - - - 1 1.0 MB 2 min ago",
        "2 files could not be read or written, and were removed",
        "memory: at most 800 MB for each model; disk: 5.0 MB of at most 4.0 GB",
    ]
    assert json.loads(mlxd("cache", "--json")[1])["disk_bytes"] == 5_000_000
    daemon.on("cache.list", types.CacheResult(models=[], disk_bytes=0, memory_budget_bytes=0, disk_budget_bytes=0))
    assert mlxd("cache")[1].splitlines() == ["nothing is kept", "memory: off; disk: off"]


def test_cache_clear(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("cache.clear", types.ClearCacheResult(memory_bytes=9_000_000, disk_bytes=4_000_000))
    assert mlxd("cache", "clear")[1] == "cleared: 9.0 MB in memory and 4.0 MB on disk are free again\n"
    assert daemon.connections[-1].requests("cache.clear")[0].get("params", {}) == {}
    assert json.loads(mlxd("cache", "clear", "org/m", "--json")[1]) == {
        "memory_bytes": 9_000_000,
        "disk_bytes": 4_000_000,
    }
    assert daemon.connections[-1].requests("cache.clear")[0]["params"] == {"model": "org/m"}


# --- stop -----------------------------------------------------------------------------------------------------------


def test_stop_waits_for_the_end(daemon: ScriptedDaemon, mlxd: Run) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    daemon.on("status", types.Status(**{**_fields(STATUS), "pid": process.pid}))

    def end(_connection: Connection, _request: dict[str, Any]) -> dict[str, Any]:
        os.unlink(daemon.path)
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        return {}

    daemon.on("shutdown", end)
    assert mlxd("stop") == (0, "mlxd has stopped\n", "")
    Path(daemon.path).touch()  # the fixture removes it


def _fields(status: types.Status) -> dict[str, Any]:
    return {name: getattr(status, name) for name in status.__struct_fields__}


def test_stop_says_when_it_takes_too_long(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("status", types.Status(**{**_fields(STATUS), "pid": os.getpid()}))
    daemon.on("shutdown", {})
    status, _, err = mlxd("stop", "--timeout", "0")
    assert status == exits.FAILED
    assert "still runs" in err


def test_stop_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", "--socket", str(tmp_path / "nobody")]) == 0
    assert capsys.readouterr().out == "mlxd is not running\n"
    assert main(["stop", "--json", "--socket", str(tmp_path / "nobody")]) == 0
    assert capsys.readouterr().out == '{"stopped":false}\n'


def test_ended_processes_are_seen(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert gone(str(tmp_path / "no-socket"), process.pid, 0)


# --- run ------------------------------------------------------------------------------------------------------------


def test_run_prints_the_whole_text_into_a_pipe(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("process", completion("I think so."))
    assert mlxd("run", "um", "i think so") == (0, "I think so.\n", "")
    assert daemon.connections[-1].requests("process")[0]["params"] == {"prompt": "um i think so"}


def test_run_sends_every_option(daemon: ScriptedDaemon, mlxd: Run, tmp_path: Path) -> None:
    daemon.on("process", completion("x"))
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    line = (
        "run -m org/m --system be-brief --max-tokens 5 --temperature 0 --top-p 0.5 --top-k 3 --min-p 0.1 "
        "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --seed 7 --logprobs 2 "
        f"--stop A --stop B --logit-bias 42=-100 --schema {schema} --no-thinking --keep-alive forever "
        "--timeout 9 --priority batch hello"
    )
    assert mlxd(*line.split())[0] == 0
    assert daemon.connections[-1].requests("process")[0]["params"] == {
        "prompt": "hello", "model": "org/m", "system": "be-brief", "max_tokens": 5, "temperature": 0, "top_p": 0.5,
        "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3,
        "seed": 7, "logprobs": 2, "stop": ["A", "B"], "logit_bias": {"42": -100}, "schema": {"type": "object"},
        "thinking": False, "keep_alive": -1, "timeout_s": 9, "priority": "batch",
    }  # fmt: skip


def test_run_takes_standard_input(daemon: ScriptedDaemon, mlxd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.on("process", completion("x"))

    def pipe(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    pipe("grüße\nan alle\n".encode())
    assert mlxd("run")[0] == 0
    assert daemon.connections[-1].requests("process")[0]["params"] == {"prompt": "grüße\nan alle"}
    pipe(b" \n")
    status, _, err = mlxd("run", "-")
    assert (status, err) == (exits.USAGE, "mlxd: the prompt is empty\n")


def test_run_takes_rules_from_files(daemon: ScriptedDaemon, mlxd: Run, tmp_path: Path) -> None:
    daemon.on("process", completion("x"))
    file = tmp_path / "answer.lark"
    file.write_text('start: "yes" | "no"\n')
    for option, value in (("grammar", str(file)), ("grammar", file.read_text()), ("schema", "true")):
        assert mlxd("run", f"--{option}", value, "hello")[0] == 0
        sent = daemon.connections[-1].requests("process")[0]["params"][option]
        assert sent == (True if option == "schema" else file.read_text())


@pytest.mark.parametrize(
    "bad",
    ["--grammar=/nowhere", "--logit-bias=x=1", "--schema={", "--schema=/nowhere", "--schema=[]", "--keep-alive=x"],
)
def test_run_refuses_bad_options(mlxd: Run, bad: str) -> None:
    with pytest.raises(SystemExit) as ended:
        mlxd("run", bad, "hello")
    assert ended.value.code == exits.USAGE


def test_run_streams_where_asked(daemon: ScriptedDaemon, mlxd: Run) -> None:
    def stream(connection: Connection, request: dict[str, Any]) -> Any:
        connection.stream(request["id"], 0, phase="loading", progress=0.5)
        connection.stream(request["id"], 1, text="I think ")
        connection.stream(request["id"], 2, text="so.")
        return completion("I think so.")

    daemon.on("process", stream)
    assert mlxd("run", "--stream", "x") == (0, "I think so.\n", "")
    lines = [json.loads(line) for line in mlxd("run", "--stream", "--json", "x")[1].splitlines()]
    assert "".join(line.get("text", "") for line in lines[:-1]) == "I think so."
    assert lines[0]["phase"] == "loading"
    assert lines[-1]["finish_reason"] == "stop"
    assert json.loads(mlxd("run", "--json", "x")[1])["text"] == "I think so."


def test_run_warns_of_invented_words(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("process", completion("Meet Tofia.", invented=["Tofia"]))
    status, out, err = mlxd("run", "meet maria", "-v")
    assert (status, out) == (0, "Meet Tofia.\n")
    assert err.splitlines()[0] == "mlxd: the answer has words that the prompt does not account for: Tofia"
    daemon.on("process", completion("x", invented=[f"w{n}" for n in range(200)]))
    told = mlxd("run", "meet maria")[2]
    assert told.endswith(": w0, w1, w2, w3, w4, w5, w6, w7 and 192 more\n")
    assert "tokens/s" in err.splitlines()[1]


# --- events ---------------------------------------------------------------------------------------------------------


def subscribed() -> Callable[[Connection, dict[str, Any]], Any]:
    """Answers a subscription, then sends three events."""

    def reply(connection: Connection, request: dict[str, Any]) -> Any:
        known = {"id": "org/m", "state": "Downloaded", "source": "hub"}
        answer = {"subscription": 1, "epoch": "e1", "rev": 5, "snapshot": {"models": [known]}}
        connection.reply(request["id"], answer)
        connection.event(6, "loading_started", model_id="org/m", model=model("org/m", "Loading", phase="loading"))
        connection.event(7, "loading_progress", model_id="org/m", progress=0.25)
        connection.event(8, "error", model_id="org/m", error=types.ErrorObject(kind="load_failed", message="no room"))
        return NOTHING

    return reply


def test_events(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("events.subscribe", subscribed())
    status, out, _ = mlxd("events", "--count", "3", "--topic", "models", "--model", "org/m")
    assert status == 0
    request = daemon.connections[-1].requests("events.subscribe")[0]
    assert request["params"] == {"topics": ["models"], "models": ["org/m"]}
    assert [line.split("  ", 1)[1] for line in out.splitlines()] == [
        "org/m is Downloaded",
        "loading_started  org/m  → Loading, loading",
        "loading_progress  org/m  25%",
        "error  org/m  load_failed: no room",
    ]


def test_events_as_json(daemon: ScriptedDaemon, mlxd: Run) -> None:
    daemon.on("events.subscribe", subscribed())
    lines = [json.loads(line) for line in mlxd("events", "--count", "3", "--json")[1].splitlines()]
    assert [line["name"] for line in lines] == ["snapshot", "loading_started", "loading_progress", "error"]
    assert [line["rev"] for line in lines] == [5, 6, 7, 8]
    assert lines[0]["snapshot"]["models"][0]["id"] == "org/m"


# --- on a terminal --------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        made.append(Terminal(*arguments))
        return made[-1]

    yield start
    for each in made:
        each.close()


Start = Callable[..., Terminal]


def test_tables_on_a_terminal(daemon: ScriptedDaemon, terminal: Start) -> None:
    daemon.on("models.list", types.ModelsResult(models=[model("org/\x1b[31mevil", "Ready"), *MODELS]))
    screen = terminal("list", "--socket", daemon.path)
    assert screen.end() == 0
    assert "\x1b[1mMODEL" in screen.shown
    assert "org/[31mevil" in screen.shown
    assert "\x1b[31m" not in screen.shown


def test_run_streams_to_a_terminal(daemon: ScriptedDaemon, terminal: Start) -> None:
    def stream(connection: Connection, request: dict[str, Any]) -> Any:
        connection.stream(request["id"], 0, phase="loading", progress=0.5)
        connection.stream(request["id"], 1, reasoning="hmm")
        call = {"id": "1", "name": "clock", "arguments": {"zone": "\x1b]0;evil\x07"}}
        connection.stream(
            request["id"], 2, tool_calls=[call], malformed_tool_calls=[{"text": "x", "reason": "no call"}]
        )
        connection.stream(request["id"], 3, text="I think\x1b]0;evil\x07 so.")
        connection.cancel_of(request["id"]).wait(PATIENCE_S)
        connection.fail(request["id"], errors.Cancelled("the request was cancelled"))
        return NOTHING

    daemon.on("process", beside(stream))
    screen = terminal("run", "x", "--socket", daemon.path)
    screen.until("so.")
    assert "loading the model 50%" in screen.shown
    assert "\r\x1b[K\x1b[2mhmm\x1b[0m" in screen.shown
    assert '{"id":"1","name":"clock","arguments":{"zone":"\\u001b]0;evil\\u0007"}}' in screen.shown
    assert "malformed: no call" in screen.shown
    assert "I think]0;evil so." in screen.shown
    screen.interrupt()
    assert screen.end() == exits.INTERRUPTED
    assert "Traceback" not in screen.shown


def test_run_without_a_prompt_on_a_terminal(daemon: ScriptedDaemon, terminal: Start) -> None:
    screen = terminal("run", "--socket", daemon.path)
    assert screen.end() == exits.USAGE
    assert "there is no prompt" in screen.shown


# --- chat -----------------------------------------------------------------------------------------------------------


def echo(connection: Connection, request: dict[str, Any]) -> Any:
    """Answers with the last turn, in two pieces."""
    text = request["params"]["messages"][-1]["content"].upper()
    connection.stream(request["id"], 0, text=text[:2])
    connection.stream(request["id"], 1, text=text[2:])
    return completion(text)


def turns(daemon: ScriptedDaemon) -> list[list[str]]:
    """What each chat request held, as `role: content`."""
    return [
        [f"{turn['role']}: {turn['content']}" for turn in request["params"]["messages"]]
        for connection in daemon.connections
        for request in connection.requests("chat")
    ]


def test_chat_from_a_pipe(daemon: ScriptedDaemon, mlxd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.on("chat", echo)
    lines = b'hello\n\n/system be brief\nworld\n/clear\n"""\ntwo\nlines"""\n/bye\nnever\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    status, out, err = mlxd("chat", "--temperature", "0")
    assert (status, err) == (0, "")
    assert out == "HELLO\nWORLD\nTWO\nLINES\n"
    assert turns(daemon) == [
        ["user: hello"],
        ["system: be brief", "user: hello", "assistant: HELLO", "user: world"],
        ["system: be brief", "user: two\nlines"],
    ]


def test_chat_shows_images(daemon: ScriptedDaemon, mlxd: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def seen(connection: Connection, request: dict[str, Any]) -> Any:
        connection.stream(request["id"], 0, text="seen")
        return completion("seen")

    daemon.on("chat", seen)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"what is it\n/image /other.png\nand that\n")))
    assert mlxd("chat", "--image", "cat.png", "--image", "/dog.png")[0] == 0
    sent = [
        request["params"]["messages"] for connection in daemon.connections for request in connection.requests("chat")
    ]
    first = [
        {"type": "image", "path": str(tmp_path / "cat.png")},
        {"type": "image", "path": "/dog.png"},
        {"type": "text", "text": "what is it"},
    ]
    second = [{"type": "image", "path": "/other.png"}, {"type": "text", "text": "and that"}]
    assert [turn["content"] for turn in sent[0]] == [first]
    assert [turn["content"] for turn in sent[-1]][::2] == [first, second]


def test_chat_from_a_pipe_ends_with_the_first_failure(
    daemon: ScriptedDaemon, mlxd: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise errors.ModelNotFound("there is no model x")

    daemon.on("chat", fail)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    status, _, err = mlxd("chat", "-m", "x")
    assert (status, err) == (exits.NO_MODEL, "mlxd: model_not_found: there is no model x\n")
    assert len(turns(daemon)) == 1


def test_chat_as_json(daemon: ScriptedDaemon, mlxd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.on("chat", echo)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo")))
    assert [json.loads(line)["text"] for line in mlxd("chat", "--json")[1].splitlines()] == ["ONE", "TWO"]


def test_ctrl_c_cancels_the_answer_and_not_the_program(daemon: ScriptedDaemon, terminal: Start) -> None:
    def slow(connection: Connection, request: dict[str, Any]) -> Any:
        if request["params"]["messages"][-1]["content"] != "slow":
            return echo(connection, request)
        connection.stream(request["id"], 0, text="I be")
        connection.cancel_of(request["id"]).wait(PATIENCE_S)
        connection.fail(request["id"], errors.Cancelled("the request was cancelled"))
        return NOTHING

    daemon.on("chat", beside(slow))
    screen = terminal("chat", "--socket", daemon.path)
    screen.until(">>> ")
    screen.type("slow\n")
    screen.until("I be")
    screen.interrupt()
    screen.until(">>> ")
    screen.type("more\n")
    screen.until("MORE")
    assert turns(daemon)[-1] == ["user: slow", "assistant: I be", "user: more"]
    screen.until(">>> ")
    screen.interrupt()
    screen.until("ctrl-C again")
    screen.until(">>> ")
    screen.interrupt()
    assert screen.end() == exits.INTERRUPTED
    assert "Traceback" not in screen.shown


def test_chat_on_a_terminal(daemon: ScriptedDaemon, terminal: Start) -> None:
    daemon.on("chat", echo)
    screen = terminal("chat", "--socket", daemon.path)
    screen.until(">>> ")
    screen.type("/help\n")
    screen.until("/system TEXT")
    screen.until(">>> ")
    screen.type("/nonsense\n")
    screen.until("there is no command /nonsense")
    screen.until(">>> ")
    screen.type("\x04")
    assert screen.end() == 0


def test_several_answers_are_shown_one_after_the_other(daemon: ScriptedDaemon, mlxd: Run) -> None:
    made = completion("one")
    made.alternatives = [types.Alternative(text=text, finish_reason="stop", completion_tokens=1) for text in "ab"]
    daemon.on("process", made)
    assert mlxd("run", "--n", "3", "x") == (0, "one\n\na\n\nb\n", "")
    assert daemon.connection().requests("process")[-1]["params"]["n"] == 3
    status, out, _ = mlxd("run", "--json", "--n", "3", "x")
    assert [each["text"] for each in json.loads(out)["alternatives"]] == ["a", "b"]
    status, out, err = mlxd("run", "--stream", "--n", "3", "x")
    assert (status, out) == (exits.USAGE, "")
    assert "--json" in err
