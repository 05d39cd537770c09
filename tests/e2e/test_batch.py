"""Batch jobs with a real daemon: worked off beside interactive requests, surviving all, refused where wrong."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxd.batch.header import FILE
from mlxd.cli import exits
from mlxd.cli.main import main
from mlxd.runtime.batches import MOST_OPEN
from mlxd_client import AsyncClient, Client
from mlxd_client.errors import InvalidParams, ModelNotFound, NotFound, QueueFull, RpcError, Unsupported
from mlxd_client.sync import EventStream
from mlxd_client.types import Job
from support import batch_kills
from support.batch_kills import BatchKills
from support.daemon import PATIENCE_S, Daemon, until

MEGABYTE = 1_000_000


def prompts(*texts: str, **params: Any) -> list[dict[str, Any]]:
    return [
        {"method": "process", "custom_id": f"c{n}", "params": {"prompt": text, **params}}
        for n, text in enumerate(texts)
    ]


def texts(client: Client, job: str) -> list[str]:
    """What each item came to: its text, or the kind of its error."""
    found = []
    for result in client.results(job):
        assert (result.result is None) != (result.error is None)
        found.append(result.result.text if result.result else result.error.kind if result.error else "")
    return found


def job_until(events: EventStream, job: str, **facts: Any) -> Job:
    while True:
        event = events.get(PATIENCE_S)
        assert event is not None
        found = event.job
        if found is not None and found.job == job and all(getattr(found, name) == facts[name] for name in facts):
            return found


# --- what it is for -----------------------------------------------------------------------------------------------


def test_a_batch_is_answered_as_by_hand() -> None:
    said = [f"um so the number is {n} i think" for n in range(6)]
    with Daemon() as daemon, daemon.client() as client, client.events() as events:
        job = client.submit_batch(prompts(*said), name="numbers")
        assert (job.kind, job.state, job.total_items, job.name) == ("batch", "running", 6, "numbers")
        ended = client.wait_job(job.job)
        assert (ended.state, ended.done_items, ended.failed_items, ended.progress) == ("done", 6, 0, 1.0)
        by_hand = [client.process(text).text for text in said]
        assert texts(client, job.job) == by_hand
        assert job_until(events, job.job, state="done") == ended
        assert ended in client.jobs()
        assert client.batches() == [ended]
        chat = client.submit_batch([{"method": "chat", "params": {"messages": [{"role": "user", "content": "hi"}]}}])
        client.wait_job(chat.job)
        (only,) = client.results(chat.job)
        assert only.result is not None
        assert only.result.usage.completion_tokens > 0


def test_interactive_requests_go_first() -> None:
    """Where all slots are taken by items, one of them steps aside; it is answered later, and only once."""
    daemon = Daemon(bad_child="worker", steps=True, max_batch=2)
    with daemon, daemon.client() as client, client.events(["queue"]) as events:
        job = client.submit_batch(prompts(*(["!slow 1"] * 3)))
        until(events, "queue", active=2)
        assert client.process("at once").text == "at once"
        assert client.batch(job.job).done_items == 0
        daemon.step(0)
        assert client.wait_job(job.job).failed_items == 0
        assert texts(client, job.job) == ["piece0"] * 3


def test_what_waits_for_a_model_waits_for_others() -> None:
    """A batch job takes no memory from a model that somebody else uses, and gives its own back."""
    with Daemon(bad_child="worker", steps=True, memory_budget_bytes=3 * 10**9) as daemon, daemon.client() as client:
        ours, theirs = daemon.model("ours", 2 * 10**9), daemon.model("theirs", 2 * 10**9)
        with client.events() as events:
            client.process("x", model=theirs)
            job = client.submit_batch(prompts("!slow 1", model=ours))
            until(events, "loading_queued")
            assert client.model(theirs).state == "Ready"
            client.unload(theirs)
            until(events, "queue", active=1)
            client.process("x", model=theirs)
            until(events, "loading_queued")
            assert client.batch(job.job).done_items == 0
            daemon.step(0)
            client.unload(theirs)
            assert client.wait_job(job.job).done_items == 1


def test_the_same_by_the_other_client() -> None:
    async def run(daemon: Daemon) -> None:
        async with AsyncClient(daemon.socket, timeout_s=PATIENCE_S) as client:
            job = await client.submit_items((item for item in prompts(*["a b"] * 600)), name="many")
            await client.wait_job(job.job)
            found = [result async for result in client.results(job.job)]
            assert [result.index for result in found] == list(range(600))
            await client.delete_batch(job.job)
            assert await client.batches() == []
            with pytest.raises(NotFound):
                await client.batch_results(job.job)

    with Daemon(bad_child="worker") as daemon:
        asyncio.run(run(daemon))


# --- surviving ----------------------------------------------------------------------------------------------------


def test_cancelled_and_gone_on_with() -> None:
    daemon = Daemon(bad_child="worker", steps=True, batch_slots=1)
    with daemon, daemon.client() as client, client.events() as events:
        job = client.submit_batch(prompts("a", "b", "!slow 1", "c"))
        job_until(events, job.job, done_items=2)
        cancelled = client.cancel_job(job.job)
        assert (cancelled.state, cancelled.done_items) == ("cancelled", 2)
        until(events, "queue", active=0)
        assert texts(client, job.job) == ["a", "b"]
        assert client.batch_results(job.job).complete
        daemon.step(0)
        assert client.start_batch(job.job).state == "running"
        assert client.wait_job(job.job).done_items == 4
        assert texts(client, job.job) == ["a", "b", "piece0", "c"]


def test_asked_again_it_is_one_job() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        job = client.submit_batch(prompts("a", "b"), key="mine")
        client.wait_job(job.job)
        daemon.restart(crash=True)
        assert client.submit_batch(prompts("a", "b"), key="mine").job == job.job
        with pytest.raises(InvalidParams) as refused:
            client.submit_batch(prompts("a", "c"), key="mine")
        assert refused.value.details["field"] == "key"
        many = prompts(*["a"] * 700)
        job = client.submit_items(many, key="many")
        assert client.submit_items(many, key="many").job == job.job
        assert client.wait_job(job.job).total_items == 700


def test_killed_again_and_again() -> None:
    """The short form of `tools/dev.py soak --batch`."""
    with Daemon(bad_child="worker", batch_retry_s=0.01, log_level="warning") as daemon:
        kills = BatchKills(daemon, batch_kills.prompts(1500), seed=7)
        kills.run(8)
        assert sum(kills.kills.values()) >= 4


def test_a_drain_does_not_wait_for_a_batch() -> None:
    with Daemon(bad_child="worker", steps=True, drain_s=600) as daemon, daemon.client() as client:
        with client.events(["queue"]) as events:
            job = client.submit_batch(prompts("!slow 1", "!slow 1"))
            until(events, "queue", active=2)
        daemon.restart()  # it is given ten times as long as this waits for it
        daemon.step(0)
        assert client.wait_job(job.job).done_items == 2


def test_an_item_that_kills_its_worker_is_found_out() -> None:
    """Those that ran beside it are innocent, and answered."""
    with Daemon(bad_child="worker", batch_retry_s=0.01) as daemon, daemon.client() as client:
        job = client.submit_batch(prompts("a", "b", "!exit 3", "c", "!error", "d"))
        assert client.wait_job(job.job, wait_s=PATIENCE_S).failed_items == 2
        assert texts(client, job.job) == ["a", "b", "worker_died", "c", "internal_error", "d"]
        client.load("mlxd/cleanup")
        assert client.process("still here").text == "still here"


def test_a_job_whose_model_does_not_load_has_failed() -> None:
    with Daemon(bad_child="worker", batch_retry_s=0.01) as daemon, daemon.client() as client:
        model = daemon.model("!exit 1")
        job = client.submit_batch(prompts("a", "b", model=model))
        ended = client.wait_job(job.job, wait_s=PATIENCE_S)
        assert (ended.state, ended.done_items) == ("failed", 0)
        assert ended.error is not None
        assert ended.error.kind == "worker_died"


def test_a_damaged_file_is_set_aside() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        client.wait_job(client.submit_batch(prompts("a")).job)
        daemon.stop()
        (daemon.home / FILE).write_bytes(b"not a database at all " * 1000)
        daemon.restart()
        assert client.batches() == []
        (aside,) = daemon.home.glob(f"{FILE}.damaged-*")
        assert aside.name in daemon.log()
        assert client.wait_job(client.submit_batch(prompts("a")).job).state == "done"


def test_a_job_that_is_open_keeps_nobody_up_and_is_there_later() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        job = client.submit_batch(prompts("a"), open=True)
        assert (job.state, job.phase) == ("queued", "open")
        client.append_batch(job.job, [{"method": "process", "params": {"prompt": "b"}}], at=1)
        daemon.restart(crash=True)
        assert client.batch(job.job).total_items == 2
        client.start_batch(job.job)
        client.wait_job(job.job)
        assert texts(client, job.job) == ["a", "b"]
        client.delete_batch(job.job)


def test_so_many_may_be_under_way_however_they_come() -> None:
    async def submit_all(daemon: Daemon) -> list[Job | BaseException]:
        async with AsyncClient(daemon.socket, timeout_s=PATIENCE_S) as client:
            many = [client.submit_batch(prompts(str(n)), open=True) for n in range(MOST_OPEN + 20)]
            return await asyncio.gather(*many, return_exceptions=True)

    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        first = client.submit_batch(prompts("first"), key="mine", open=True)
        came = asyncio.run(submit_all(daemon))
        jobs = [job for job in came if isinstance(job, Job)]
        assert len(jobs) + 1 == len(client.batches()) == MOST_OPEN
        assert all(isinstance(job, Job | QueueFull) for job in came)
        with pytest.raises(QueueFull):
            client.submit_batch(prompts("one more"), key="another")
        assert client.submit_batch(prompts("first"), key="mine", open=True).job == first.job
        client.delete_batch(jobs[0].job, cancel=True)
        assert client.wait_job(client.submit_batch(prompts("one more")).job).state == "done"


# --- hostile ------------------------------------------------------------------------------------------------------

GOOD = {"method": "process", "params": {"prompt": "x"}}
HOSTILE: list[tuple[dict[str, Any], type[RpcError], str]] = [
    ({"items": []}, InvalidParams, "items"),
    ({"items": "x"}, InvalidParams, "items"),
    ({"items": [GOOD, {"method": "embed", "params": {}}]}, InvalidParams, "items[1].method"),
    ({"items": [GOOD, {"method": "process", "params": {}}]}, InvalidParams, "items[1].params.prompt"),
    ({"items": [{"method": "process", "params": {"prompt": "x", "temperature": 9}}]}, InvalidParams,
     "items[0].params.temperature"),
    ({"items": [{"method": "process", "params": {"prompt": "x", "stream": True}}]}, Unsupported,
     "items[0].params.stream"),
    ({"items": [GOOD, {**GOOD, "custom_id": ""}]}, InvalidParams, "items[1].custom_id"),
    ({"items": [{**GOOD, "custom_id": "a"}, {**GOOD, "custom_id": "a"}]}, InvalidParams, "items[1].custom_id"),
    ({"items": [{"method": "process", "params": {"prompt": "x", "schema": {}, "grammar": "g"}}]}, InvalidParams,
     "items[0].params.grammar"),
    ({"items": [GOOD, {"method": "process", "params": {"prompt": "x", "model": "no/such"}}]}, ModelNotFound,
     "items[1].params.model"),
    ({"items": [{"method": "process", "params": {"prompt": "x", "adapter": "/no/such"}}]}, RpcError,
     "items[0].params.adapter"),
    ({"items": [GOOD] * 1001}, InvalidParams, "items"),
    ({"items": [GOOD], "key": ""}, InvalidParams, "key"),
    ({"items": [GOOD], "priority": "interactive"}, InvalidParams, "priority"),
]  # fmt: skip


def test_what_cannot_be_is_refused_by_name() -> None:
    with Daemon(bad_child="worker") as daemon, daemon.client() as client:
        for params, kind, field in HOSTILE:
            with pytest.raises(kind) as refused:
                client.call("batch.submit", params)
            assert refused.value.details["field"] == field, params
        assert client.batches() == []
        job = client.submit_batch(prompts("a"))
        for method, params in (
            ("batch.append", {"job": job.job, "items": [GOOD]}),
            ("batch.results", {"job": job.job, "limit": 0}),
            ("batch.results", {"job": job.job, "after": 2**50}),
            ("batch.append", {"job": job.job}),
        ):
            with pytest.raises(InvalidParams):
                client.call(method, params)
        for method in ("get", "cancel", "delete", "start", "results"):
            with pytest.raises(NotFound):
                client.call(f"batch.{method}", {"job": "'; DROP TABLE jobs; --"})
        assert client.wait_job(job.job).done_items == 1
        with pytest.raises(NotFound):
            client.batch(next(job.job for job in client.jobs() if job.kind == "load"))


def test_a_large_job_is_small_in_memory() -> None:
    with Daemon(bad_child="worker", steps=True, log_level="error") as daemon, daemon.client() as client:
        process = psutil.Process(daemon.pid)
        with client.events(["job"]) as events:
            items = prompts(*["a"] * 2000, *["!slow 1 " + "x" * 100] * 98_000)
            job = client.submit_items(items)
            assert job.total_items == 100_000
            job_until(events, job.job, done_items=2000)
        assert process.memory_info().rss < 40 * MEGABYTE
        assert len(list(client.results(job.job))) == 2000
        assert process.memory_info().rss < 40 * MEGABYTE
        client.delete_batch(job.job, cancel=True)
        assert (daemon.home / FILE).stat().st_size < MEGABYTE


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(daemon: Daemon, *words: str) -> tuple[int, str, str]:
        status = main(["batch", *words, "--socket", str(daemon.socket)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_results_are_followed_as_they_come() -> None:
    with Daemon(bad_child="worker", steps=True) as daemon, daemon.client() as client:
        job = client.submit_batch(prompts("a", "!slow 1")).job
        command = [sys.executable, "-m", "mlxd", "batch", "results", job, "--follow"]
        with subprocess.Popen(command, env=daemon.env, stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["index"] == 0
            daemon.step(0)
            assert json.loads(following.stdout.readline())["index"] == 1
            assert following.wait(PATIENCE_S) == 0


def test_the_command(ran: Any, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [*prompts("a b", "c"), {"prompt": "short", "custom_id": "s"}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    with Daemon(bad_child="worker") as daemon:
        assert ran(daemon, "submit", os.devnull)[::2] == (exits.USAGE, "mlxd: invalid_params: there are no items\n")
        assert ran(daemon, "list")[1] == "there are no batch jobs\n"
        assert ran(daemon, "results", "batch-0-1", "-o", str(file))[0] == exits.FAILED
        assert file.stat().st_size  # it is not overwritten by what is not there
        status, out, _ = ran(daemon, "submit", str(file), "--name", "mine", "--key", "k")
        job = out.strip()
        assert status == 0
        assert ran(daemon, "submit", str(file), "--key", "k")[1].strip() == job
        assert ran(daemon, "wait", job)[:2] == (0, f"{job}: done, 3 of 3 done\n")
        assert "mine" in ran(daemon, "list")[1]
        results = [json.loads(line) for line in ran(daemon, "results", job, "--follow")[1].splitlines()]
        assert [(one["index"], one["custom_id"], one["result"]["text"]) for one in results] == [
            (0, "c0", "a b"), (1, "c1", "c"), (2, "s", "short"),
        ]  # fmt: skip
        assert len(ran(daemon, "results", job, "--after", "1")[1].splitlines()) == 1
        assert ran(daemon, "results", job, "-o", str(tmp_path / "no" / "file"))[::2] == (
            exits.USAGE, f"mlxd: invalid_params: {tmp_path}/no/file cannot be written: No such file or directory\n",
        )  # fmt: skip
        assert json.loads(ran(daemon, "show", job, "--json")[1])["done_items"] == 3
        assert ran(daemon, "rm", job)[0] == 0
        assert ran(daemon, "list")[1] == "there are no batch jobs\n"
        file.write_text('{"prompt": "x"}\n{"prompt": "x", "temperature": 9}\n')
        status, _, err = ran(daemon, "submit", str(file))
        assert status == 2
        assert "line 2" in err
        assert "temperature" in err
        assert ran(daemon, "show")[0] == 2
