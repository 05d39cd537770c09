"""Models from a hub: a real HTTP server on loopback, a real daemon, its real fetchers, from the wish to the answer."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxd.handover import choose_program
from mlxd_client import errors
from mlxd_client.sync import EventStream
from mlxd_client.types import Event, Job
from support import fake_model
from support.daemon import PATIENCE_S, Daemon, until
from support.hub import Hub
from support.restarts import Relay, newer

MODEL = "org/model"
MIB = 1024 * 1024
SIZE = 24 * MIB


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def files(size: int = SIZE, seed: int = 0) -> dict[str, bytes]:
    """A model that a bad_child can load, with weights of about this size."""
    return fake_model.files(size, seed)


def daemon_of(hub: Hub, **settings: Any) -> Daemon:
    """A daemon whose hub this is; its workers are stand-ins, its fetchers are real."""
    environment = hub.env() | settings.pop("env", {})
    return Daemon(**{"bad_child": "worker", "env": environment} | settings)


def finish(events: EventStream, job: str) -> Job:
    """Read events up to the end of a job."""
    while True:
        event = events.get(PATIENCE_S)
        assert event is not None
        if event.job is not None and event.job.job == job and event.job.ended_at is not None:
            return event.job


def moving(events: EventStream, job: str, least: int = 1) -> Event:
    """Read events up to the first that says that so many bytes are here."""
    while True:
        event = events.get(PATIENCE_S)
        assert event is not None
        found = event.job
        if found is not None and found.job == job and (found.done_bytes or 0) >= least:
            return event
        assert found is None or found.ended_at is None, found


def fetcher(daemon: Daemon) -> psutil.Process:
    (child,) = [child for child in daemon.children() if "mlxd.fetch" in " ".join(child.cmdline())]
    return child


def sent(hub: Hub, repo: str = MODEL) -> int:
    return hub.sent("model.safetensors", repo=repo)


# --- the whole way ------------------------------------------------------------------------------------------------


def test_from_the_hub_to_an_answer(hub: Hub) -> None:
    commit = hub.model("org/tiny")
    with daemon_of(hub, bad_child=None) as daemon, daemon.client() as client, client.events() as events:
        plan = client.plan("org/tiny")
        assert plan.revision == commit
        assert plan.fits
        assert 0 < plan.weights_bytes <= plan.download_bytes < plan.disk_free_bytes
        job = client.download("org/tiny")
        ended = finish(events, job)
        assert (ended.state, ended.progress, ended.revision, ended.error) == ("done", 1.0, commit, None)
        model = client.model("org/tiny")
        assert (model.state, model.source, model.revision) == ("Downloaded", "hub", commit)
        assert client.plan("org/tiny").download_bytes == 0
        counted = client.stats().downloads
        assert (counted.ended, counted.fetched_bytes) == ({"done": 1}, plan.download_bytes)
        assert client.chat("hello", model="org/tiny", max_tokens=3).usage.completion_tokens == 3
        assert client.verify("org/tiny").ok
        genuine = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], local_files_only=True))"
        shown = subprocess.run(
            [sys.executable, "-c", genuine, "org/tiny"], env=daemon.env, capture_output=True, text=True, check=True
        )
        assert shown.stdout.strip().endswith(f"snapshots/{commit}")


def test_events_tell_the_whole_story(hub: Hub) -> None:
    hub.commit(MODEL, files())
    with daemon_of(hub) as daemon, daemon.client() as client, client.events(topics=["models"]) as events:
        client.download(MODEL)
        seen = until(events, "download_completed")
        names = [event.name for event in seen]
        assert names[0] == "download_started"
        assert set(names[1:-1]) <= {"download_progress"}
        progress = [event.progress for event in seen if event.name == "download_progress"]
        assert progress == sorted(progress, key=lambda p: p or 0.0)
        states = [event.model.state for event in seen if event.model is not None]
        assert states == ["Downloading"] * (len(seen) - 1) + ["Downloaded"]


def test_whoever_asks_again_gets_the_same_job(hub: Hub) -> None:
    hub.commit(MODEL, files())
    hub.fault(MODEL, "hold", file="model.safetensors", after=MIB)
    with daemon_of(hub) as daemon, daemon.client() as client, daemon.client() as other, client.events() as events:
        job = client.download(MODEL)
        moving(events, job)
        assert other.download(MODEL) == job
        assert [one.job for one in other.jobs() if one.kind == "download"] == [job]
        hub.release()
        assert other.wait_job(job).state == "done"
        again = client.download(MODEL)  # nothing is newer
        assert client.wait_job(again).state == "done"
        assert sent(hub) <= SIZE + MIB


# --- ends and beginnings ------------------------------------------------------------------------------------------


def test_a_killed_fetcher_is_followed_by_one_that_goes_on(hub: Hub) -> None:
    hub.commit(MODEL, files())
    hub.fault(MODEL, "hold", file="model.safetensors", after=12 * MIB, times=1)
    with daemon_of(hub, download_connections=1) as daemon, daemon.client() as client, client.events() as events:
        job = client.download(MODEL)
        moving(events, job, 11 * MIB)
        fetcher(daemon).kill()
        ended = finish(events, job)
        assert ended.state == "done"
        assert sent(hub) <= SIZE + 8 * MIB + MIB
        assert client.verify(MODEL).ok


def test_a_killed_daemon_is_followed_by_one_that_goes_on(hub: Hub) -> None:
    hub.commit(MODEL, files())
    hub.fault(MODEL, "hold", file="model.safetensors", after=12 * MIB, times=1)
    daemon = daemon_of(hub, download_connections=1)
    with daemon:
        with daemon.client() as client, client.events() as events:
            job = client.download(MODEL)
            moving(events, job, 11 * MIB)
        daemon.restart(crash=True)
        with daemon.client() as client:
            assert client.job(job).kind == "download"
            assert client.wait_job(job).state == "done"
            assert client.model(MODEL).state == "Downloaded"
            assert sent(hub) <= SIZE + 8 * MIB + MIB
        daemon.restart()
        with daemon.client() as client:
            assert client.jobs() == []


@pytest.mark.parametrize("works", [True, False])
def test_a_daemon_that_takes_over_goes_on_with_it_and_so_does_one_that_stays(
    hub: Hub, tmp_path: Path, works: bool
) -> None:
    hub.commit(MODEL, files())
    hub.fault(MODEL, "hold", file="model.safetensors", after=12 * MIB, times=1)
    fails = "from mlxd.runtime import Runtime; Runtime.begin = lambda self: 1 / 0"
    with (
        Relay(bad_child="worker", env=hub.env(), download_connections=1) as daemon,
        daemon.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        with client.events() as events:
            job = client.download(MODEL)
            moving(events, job, 11 * MIB)
        pull = subprocess.Popen(
            [sys.executable, "-m", "mlxd", "pull", MODEL], env=daemon.env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert pull.stderr is not None
        assert pull.stderr.readline() == f"mlxd: downloading {MODEL}: job {job}\n"
        before = daemon.newest()
        choose_program(daemon.home, newer(tmp_path, before="" if works else fails))
        waiting = pool.submit(client.wait_job, job)
        if works:
            client.restart()
            before.wait(PATIENCE_S)
        else:
            with pytest.raises(errors.RestartFailed, match="ZeroDivisionError"):
                client.restart()
        assert client.wait_job(job).state == "done"
        assert waiting.result(PATIENCE_S).state == "done"
        told, complaints = pull.communicate(timeout=PATIENCE_S)
        assert (pull.returncode, "is there" in told, "daemon" in complaints) == (0, True, False), complaints
        assert client.status().version == ("9.9.9" if works else "0.1.0")
        assert sent(hub) <= SIZE + 8 * MIB + MIB
        assert client.verify(MODEL).ok


def test_a_daemon_that_is_asked_to_stop_does_not_wait_for_a_download(hub: Hub) -> None:
    hub.commit(MODEL, files())
    hub.fault(MODEL, "hold", file="model.safetensors", after=4 * MIB, times=1)
    with daemon_of(hub, download_connections=1) as daemon:
        with daemon.client() as client, client.events() as events:
            job = client.download(MODEL)
            moving(events, job, 3 * MIB)
        began = time.monotonic()
        daemon.restart()
        assert time.monotonic() - began < 5
        with daemon.client() as client:
            assert client.wait_job(job).state == "done"


def test_cancelling_keeps_what_is_there_and_leaves_siblings_alone(hub: Hub) -> None:
    hub.commit(MODEL, files())
    hub.commit("org/sibling", files(seed=1))
    hub.fault(MODEL, "hold", file="model.safetensors", after=12 * MIB)
    hub.fault("org/sibling", "hold", file="model.safetensors", after=12 * MIB, times=1)
    with daemon_of(hub, download_connections=1) as daemon, daemon.client() as client, client.events() as events:
        job, sibling = client.download(MODEL), client.download("org/sibling")
        moving(events, job, 11 * MIB)
        began = time.monotonic()
        assert client.cancel_job(job).state == "cancelled"
        until(events, "download_cancelled")
        assert time.monotonic() - began < 1.0
        assert client.job(sibling).state == "running"
        with pytest.raises(errors.ModelNotDownloaded):
            client.load(MODEL)
        hub.release()
        hub.clear()
        assert client.wait_job(sibling).state == "done"
        before = sent(hub)
        assert client.wait_job(client.download(MODEL)).state == "done"
        assert sent(hub) - before <= SIZE - 11 * MIB + 8 * MIB
        assert client.verify(MODEL).ok


def test_discarding_leaves_nothing(hub: Hub) -> None:
    hub.commit(MODEL, files())
    hub.fault(MODEL, "hold", file="model.safetensors", after=12 * MIB)
    with daemon_of(hub, download_connections=1) as daemon, daemon.client() as client, client.events() as events:
        job = client.download(MODEL)
        moving(events, job, MIB)
        client.cancel_job(job, discard=True)
        until(events, "download_cancelled")
        client.delete(MODEL)  # comes after the discarding, on the same thread
        counted = client.stats().downloads
        assert counted.ended == {"cancelled": 1}
        assert MIB <= counted.fetched_bytes <= 13 * MIB
        assert not list((daemon.home / "hub").rglob("*.mlxd-part"))


# --- what fails ---------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_fetched_again_and_at_most_three_times(hub: Hub) -> None:
    hub.commit(MODEL, files(2 * MIB))
    hub.fault(MODEL, "flip", file="model.safetensors", at=MIB, times=1)
    hub.commit("org/rotten", files(2 * MIB, seed=1))
    hub.fault("org/rotten", "flip", file="model.safetensors", at=MIB)
    with daemon_of(hub) as daemon, daemon.client() as client:
        ended = client.wait_job(client.download(MODEL))
        assert (ended.state, ended.attempts) == ("done", 2)
        assert client.verify(MODEL).ok
        ended = client.wait_job(client.download("org/rotten"))
        assert ended.state == "failed"
        assert ended.error is not None
        assert ended.error.kind == "verification_failed"
        assert ended.error.details["file"] == "model.safetensors"
        assert ended.error.details["attempts"] == 3
        assert client.model("org/rotten").state == "NotDownloaded"


def test_what_the_hub_does_not_have_or_does_not_give(hub: Hub) -> None:
    hub.commit("org/gated", files(MIB))
    hub.gate("org/gated", token="right")
    with daemon_of(hub, env={"HF_TOKEN": "hf_wrongtoken"}) as daemon, daemon.client() as client:
        ended = client.wait_job(client.download("org/nothing"))
        assert ended.error is not None
        assert ended.error.kind == "model_not_found"
        ended = client.wait_job(client.download("org/gated"))
        assert ended.error is not None
        assert ended.error.kind == "permission_denied"
        assert hub.endpoint in ended.error.message or "hf auth login" in ended.error.message
        assert "hf_wrongtoken" not in daemon.log() + str(client.jobs())
        for nonsense in ("org/../x", "a/b/c", "-x/y", "org/x@../y"):
            with pytest.raises(errors.ModelNotFound):
                client.download(nonsense)
        with pytest.raises(errors.Unsupported):
            client.download("mlxd/cleanup")
        with pytest.raises(errors.InvalidParams):
            client.download("org/gated@v1", revision="v2")


def test_a_token_opens_what_is_gated_and_goes_nowhere_else(hub: Hub) -> None:
    hub.commit("org/gated", files(MIB))
    hub.gate("org/gated", token="hf_right")
    with daemon_of(hub, env={"HF_TOKEN": "hf_right"}) as daemon, daemon.client() as client:
        assert client.wait_job(client.download("org/gated")).state == "done"
        assert any(request.had_authorization for request in hub.requests())
        assert not any(request.had_authorization for request in hub.requests() if "/lfs/" in request.path)
        assert "hf_right" not in daemon.log()


# --- updates, deletes, repairs ------------------------------------------------------------------------------------


def test_an_update_is_fetched_beside_and_the_old_one_goes_when_nobody_uses_it(hub: Hub) -> None:
    old = hub.commit(MODEL, files(2 * MIB))
    with daemon_of(hub) as daemon, daemon.client() as client, client.events() as events:
        client.wait_job(client.download(MODEL))
        client.load(MODEL, keep_alive=-1)
        new = hub.commit(MODEL, files(2 * MIB, seed=1))
        assert client.models()[-1].latest_revision is None
        (model,) = [one for one in client.models(updates=True) if one.id == MODEL]
        assert (model.revision, model.latest_revision) == (old, new)
        ended = client.wait_job(client.download(MODEL))
        assert (ended.state, ended.revision) == ("done", new)
        model = client.model(MODEL)
        assert (model.state, model.revision, model.latest_revision) == ("Ready", new, None)
        snapshots = daemon.home / "hub" / "models--org--model" / "snapshots"
        assert {path.name for path in snapshots.iterdir()} == {old, new}  # its worker still has the old one
        assert client.process("one two", model=MODEL).text == "one two"
        client.unload(MODEL)
        until(events, "unloaded")
        give_up_at = time.monotonic() + PATIENCE_S
        while (snapshots / old).exists():
            assert time.monotonic() < give_up_at
            time.sleep(0.01)
        assert client.process("one two", model=MODEL).text == "one two"
        assert client.verify(MODEL).ok


def test_a_pinned_revision_stays(hub: Hub) -> None:
    old = hub.commit(MODEL, files(2 * MIB))
    with daemon_of(hub) as daemon, daemon.client() as client:
        client.wait_job(client.download(MODEL, revision=old))
        pinned = f"{MODEL}@{old}"
        assert client.model(pinned).state == "Downloaded"
        hub.commit(MODEL, files(2 * MIB, seed=1))
        client.wait_job(client.download(MODEL))
        assert client.model(pinned).revision == old
        assert client.model(MODEL).revision != old
        assert client.delete(MODEL) > 0
        assert client.verify(pinned).ok
        assert client.delete(pinned) > 0
        assert [model.id for model in client.models()] == ["mlxd/cleanup"]


def test_deleting_is_refused_while_it_is_used_and_frees_what_it_says(hub: Hub) -> None:
    hub.commit(MODEL, files(2 * MIB))
    hub.fault(MODEL, "hold", file="model.safetensors", after=MIB, times=1)
    with daemon_of(hub, steps=True) as daemon, daemon.client() as client, client.events() as events:
        job = client.download(MODEL)
        moving(events, job)
        with pytest.raises(errors.ModelBusy):
            client.delete(MODEL)
        hub.release()
        client.wait_job(job)
        with client.acquire(MODEL), pytest.raises(errors.ModelBusy):
            client.delete(MODEL)
        with client.stream_process("!slow 2", model=MODEL) as stream:
            until(events, "generation_started")
            with pytest.raises(errors.ModelBusy):
                client.delete(MODEL)
            daemon.step(0, 1)
            list(stream)
        assert client.delete(MODEL) >= 2 * MIB  # it is loaded and idle
        until(events, "deleted")
        with pytest.raises(errors.ModelNotFound):
            client.model(MODEL)
        with pytest.raises(errors.ModelNotFound):
            client.delete(MODEL)
        assert not (daemon.home / "hub" / "models--org--model").exists()
        with pytest.raises(errors.Unsupported):
            client.delete("mlxd/cleanup")


def test_rot_is_found_and_mended(hub: Hub) -> None:
    hub.commit(MODEL, files(2 * MIB))
    with daemon_of(hub) as daemon, daemon.client() as client:
        client.wait_job(client.download(MODEL))
        (weights,) = (daemon.home / "hub" / "models--org--model" / "snapshots").glob("*/model.safetensors")
        blob = weights.resolve()
        with open(blob, "r+b") as file:
            file.seek(MIB)
            byte = file.read(1)
            file.seek(MIB)
            file.write(bytes([byte[0] ^ 1]))
        found = client.verify(MODEL)
        assert not found.ok
        assert [(bad.file, bad.reason) for bad in found.bad_files] == [("model.safetensors", "hash")]
        assert client.wait_job(client.download(MODEL, repair=True)).state == "done"
        assert client.verify(MODEL).ok
        os.truncate(weights.resolve(), 1000)
        assert [bad.file for bad in client.verify(MODEL).bad_files] == ["model.safetensors"]
        assert client.wait_job(client.download(MODEL, repair=True)).state == "done"
        assert client.verify(MODEL).ok


# --- requests for what is not there -------------------------------------------------------------------------------


def test_by_default_a_request_is_told_what_the_download_would_take(hub: Hub) -> None:
    hub.commit(MODEL, files(2 * MIB))
    with daemon_of(hub) as daemon, daemon.client() as client:
        with pytest.raises(errors.ModelNotDownloaded) as refused:
            client.process("one two", model=MODEL)
        assert refused.value.details["plan"]["download_bytes"] >= 2 * MIB
        for use in (client.load, client.acquire):
            with pytest.raises(errors.ModelNotDownloaded):
                use(MODEL)
        with pytest.raises(errors.ModelNotFound):
            client.process("one two", model="org/nothing")


def test_however_many_ask_few_processes_do() -> None:
    """Each of these names would need a process of its own, which takes longer to start than forty clients to ask."""
    with Hub() as hub, daemon_of(hub) as daemon:
        clients = [daemon.client() for _ in range(40)]
        most, refused = 0, []

        def ask(number: int) -> None:
            with clients[number] as client:
                try:
                    client.process("one two", model=f"org/nothing-{number}")
                except errors.RpcError as error:
                    refused.append(error.kind)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        while len(refused) < 40:
            most = max(most, len(daemon.children()))
        for thread in threads:
            thread.join()
        assert set(refused) == {"model_not_found"}
        assert most <= 4 + 4  # those that ask, and those that have asked and are on their way out


def test_where_the_settings_allow_it_a_request_fetches_its_model_first(hub: Hub) -> None:
    hub.commit(MODEL, files(2 * MIB))
    with daemon_of(hub, download="auto") as daemon, daemon.client() as client, client.events() as events:
        with client.stream_process("one two", model=MODEL) as stream:
            phases = [piece.phase for piece in stream.pieces() if piece.phase is not None]
        assert phases[0] == "downloading"
        assert stream.result.text == "one two"
        hub.commit("org/other", files(2 * MIB, seed=1))
        hub.fault("org/other", "hold", file="model.safetensors", after=MIB)
        with client.stream_process("one two", model="org/other", timeout_s=60) as waiting:
            until(events, "download_progress", id="org/other")
            waiting.close()
        assert client.model("org/other").state == "Downloading"  # the download is nobody's
        with pytest.raises(errors.DeadlineExceeded):
            client.process("one two", model="org/other", timeout_s=0.2)


def test_offline_nothing_is_asked(hub: Hub) -> None:
    hub.commit(MODEL, files(2 * MIB))
    with daemon_of(hub, env={"HF_HUB_OFFLINE": "1"}) as daemon, daemon.client() as client:
        with pytest.raises(errors.ModelNotFound):
            client.process("one two", model=MODEL)
        ended = client.wait_job(client.download(MODEL))
        assert ended.error is not None
        assert ended.error.kind == "download_failed"
        assert client.models(updates=True)
        assert hub.requests() == []


def test_downloads_can_be_turned_off(hub: Hub) -> None:
    with daemon_of(hub, download="never") as daemon, daemon.client() as client:
        with pytest.raises(errors.ModelNotFound):
            client.process("one two", model=MODEL)
        with pytest.raises(errors.Unsupported):
            client.download(MODEL)
        assert hub.requests() == []


# --- others meanwhile ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_of_two_hundred_files(hub: Hub) -> None:
    many = files(MIB)
    many |= {f"part-{number:03}.json": b'{"n": %d}' % number for number in range(200)}
    hub.commit(MODEL, many)
    with daemon_of(hub) as daemon, daemon.client() as client, client.events() as events:
        job = client.download(MODEL)
        assert finish(events, job).state == "done"
        (snapshot,) = (daemon.home / "hub" / "models--org--model" / "snapshots").iterdir()
        assert len(list(snapshot.iterdir())) == len(many)


def test_children_are_gone_afterwards(hub: Hub) -> None:
    hub.commit(MODEL, files(MIB))
    with daemon_of(hub) as daemon, daemon.client() as client:
        client.wait_job(client.download(MODEL))
        psutil.wait_procs(daemon.children(), timeout=10)
        assert daemon.children() == []
