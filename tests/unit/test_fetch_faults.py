"""A real fetcher against a hub that errs, and on a disk that fills up: it recovers or says why, and nothing false lies
in the cache afterwards."""

from __future__ import annotations

import itertools
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd.childwire import Fetch
from mlxd_client.errors import DownloadFailed, InsufficientDisk, RpcError, VerificationFailed
from support.fetching import FetcherProcess, fetch, fetch_error, plan, verify, where
from support.hub import EVIL_ETAGS, EVIL_NAMES, Hub, synthetic_files

MIB = 1 << 20
FILE = "model.safetensors"
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def repo() -> str:
    return f"org/faulty-{next(_NUMBERS)}"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def folder(cache: Path, repo: str) -> Path:
    return cache / ("models--" + repo.replace("/", "--"))


def weights(hub: Hub, repo: str) -> int:
    asked = hub.requests(repo=repo, file="*.safetensors")
    return sum(request.bytes_sent for request in asked if request.status in (200, 206))


def assert_whole(hub: Hub, cache: Path, repo: str, commit: str) -> None:
    snapshot = folder(cache, repo) / "snapshots" / commit
    assert verify(hub.env(), snapshot).bad_files == []
    assert (folder(cache, repo) / "refs" / "main").read_text() == commit


def assert_nothing_is_claimed(cache: Path, repo: str) -> None:
    """No snapshot, no ref, and no blob of weights."""
    for name in ("snapshots", "refs"):
        assert not list((folder(cache, repo) / name).glob("*"))
    assert not [path for path in cache.rglob("*") if len(path.name) == 64]


# --- faults that pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how", "twice_at_most"),
    [
        ("drop", {"at": 5 * MIB + 1}, MIB),
        ("reset", {"at": 5 * MIB + 1}, 8 * MIB),
        ("short", {"by": 1000}, MIB),
        ("short_length", {"by": 1000}, 8 * MIB),
        ("stall", {"at": 5 * MIB + 1}, 8 * MIB),
        ("trickle", {"at": 5 * MIB + 1, "bytes_per_s": 100.0}, 8 * MIB),
        ("wrong_range", {}, 8 * MIB),
        ("wrong_total", {}, 8 * MIB),
        ("chunked", {}, 0),
        ("gzip", {}, 0),
        ("ignore_range", {}, 16 * MIB),
        ("status", {"status": 503, "where": ["resolve"]}, 0),
        ("status", {"status": 500, "where": ["lfs"]}, 0),
        ("status", {"status": 403, "where": ["lfs"]}, 0),
        ("status", {"status": 408}, 0),
        ("status", {"status": 416}, 0),
        ("drop", {}, 0),
    ],
)
def test_what_passes_is_got_over(
    hub: Hub, repo: str, cache: Path, kind: str, how: dict[str, Any], twice_at_most: int
) -> None:
    commit = hub.synthetic(repo, shard_bytes=16 * MIB)
    fault = hub.fault(repo, kind, file=FILE, times=1, **how)
    if kind == "status" and how["status"] == 403:
        # How a signed address that has expired looks: the one in use is dropped, the hub asked for another.
        hub.clear(fault)
        fault = hub.fault(repo, kind, file=FILE, skip=2, times=1, **how)
    fetched = fetch(hub.env(), cache, repo, stall_s=1.0)
    assert hub.fired(fault) == (0 if kind == "gzip" else 1)
    assert_whole(hub, cache, repo, commit)
    assert fetched.fetched_bytes <= fetched.size_bytes + twice_at_most + 512 * 1024


def test_a_flipped_byte_is_noticed_and_the_file_fetched_again(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=6 * MIB)
    hub.fault(repo, "flip", file=FILE, at=3 * MIB, times=1)
    with FetcherProcess(hub.env()) as fetcher:
        fetched = fetcher.ask("fetch", Fetch(where=where(cache, repo)))
    assert max(at.attempts for at in fetcher.progress) == 2
    assert fetched["fetched_bytes"] >= 12 * MIB
    assert_whole(hub, cache, repo, commit)


def test_a_flipped_byte_in_a_small_file_is_noticed_too(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shards=2, shard_bytes=MIB)
    for name in ("tokenizer.json", "*.index.json"):
        hub.fault(repo, "flip", file=name, times=1)
    fetch(hub.env(), cache, repo)
    assert_whole(hub, cache, repo, commit)


def test_the_server_says_how_long_to_wait(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=MIB)
    hub.fault(repo, "status", file=FILE, status=429, retry_after="2", times=1)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.send("fetch", Fetch(where=where(cache, repo)), 1)
        hub.wait_requests(1, repo=repo, file=FILE, status=429)
        began = time.monotonic()
        fetcher.answer()
        assert time.monotonic() - began > 1.8
    assert "retrying" in {at.phase for at in fetcher.progress}
    assert_whole(hub, cache, repo, commit)


def test_the_metadata_is_asked_for_again(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=MIB)
    hub.fault(repo, "status", where=["info"], status=429, retry_after="1", times=1)
    hub.fault(repo, "drop", where=["info"], times=1)
    fetch(hub.env(), cache, repo)
    assert_whole(hub, cache, repo, commit)


def test_as_long_as_something_comes_it_goes_on(hub: Hub, repo: str, cache: Path) -> None:
    """More drops than attempts, each after 8 MiB at least."""
    commit = hub.synthetic(repo, shard_bytes=64 * MIB)
    fault = hub.fault(repo, "drop", file=FILE, after=9 * MIB, times=5)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.ask("fetch", Fetch(where=where(cache, repo), connections=1))
    assert hub.fired(fault) == 5
    assert_whole(hub, cache, repo, commit)


def test_connections_that_fail_together_have_failed_once(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=32 * MIB)
    hub.fault(repo, "hold", file=FILE, times=8)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.send("fetch", Fetch(where=where(cache, repo)), 1)
        hub.wait_held(8, repo=repo)
        hub.fault(repo, "drop", file=FILE, times=8, where=["lfs"])
        hub.release(repo=repo)
        fetcher.answer()
    assert_whole(hub, cache, repo, commit)


def test_a_slow_line_is_shared_by_fewer_connections_and_not_given_up(hub: Hub, repo: str, cache: Path) -> None:
    """Four connections share what is enough for one: each brings too little, all of them together do not."""
    files = synthetic_files(4, 300_000)
    commit = hub.commit(repo, files)
    for number in range(1, 5):
        hub.fault(repo, "trickle", file=f"model-0000{number}-*", after=0, bytes_per_s=30_000.0, times=1)
    with FetcherProcess(hub.env()) as fetcher:
        order = Fetch(where=where(cache, repo), connections=4, stall_s=1.0, floor_bytes_s=60_000, attempts=1)
        fetcher.ask("fetch", order)
    assert max(at.attempts for at in fetcher.progress) == 1
    assert_whole(hub, cache, repo, commit)


def test_a_server_without_ranges_serves_a_resumed_file_too(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=16 * MIB)
    hold = hub.fault(repo, "hold", file=FILE, at=14 * MIB)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.send("fetch", Fetch(where=where(cache, repo)), 1)
        fetcher.until_progress(lambda at: at.done_bytes > 8 * MIB)
        fetcher.kill()
    hub.clear(hold)
    hub.fault(repo, "ignore_range", file=FILE)
    fetch(hub.env(), cache, repo)
    assert_whole(hub, cache, repo, commit)


def test_a_branch_that_moves_meanwhile_does_not_mix(hub: Hub, repo: str, cache: Path) -> None:
    old = hub.commit(repo, synthetic_files(2, MIB))
    new = hub.commit(repo, synthetic_files(3, MIB))
    hub.move(repo, old)
    hub.fault(repo, "moves", value=new, times=1)
    assert fetch(hub.env(), cache, repo).commit == old
    assert_whole(hub, cache, repo, old)
    assert fetch(hub.env(), cache, repo).commit == new
    assert_whole(hub, cache, repo, new)


# --- faults that stay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how", "reason"),
    [
        ("drop", {}, ""),
        ("stall", {"after": 1000}, "nothing came in time"),
        ("trickle", {"after": 0, "bytes_per_s": 100.0}, "fewer than"),
        ("short_length", {"by": 10}, ""),
        ("status", {"status": 503}, "HTTP 503"),
        ("redirect", {}, "redirects"),
        ("redirect", {"value": "file:///etc/passwd"}, "redirect"),
        ("redirect", {"value": "http://user@127.0.0.1/"}, "redirect"),
        ("redirect", {"value": "http://127.0.0.1:1/?signature=hf_s3cret"}, "refused"),
        ("size", {"value": 2 * MIB}, "as long as"),
    ],
)
def test_what_stays_is_told_after_three_attempts(
    hub: Hub, repo: str, cache: Path, kind: str, how: dict[str, Any], reason: str
) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    hub.fault(repo, kind, file=FILE, **how)
    error = fetch_error(hub.env(), cache, repo, stall_s=0.5)
    assert isinstance(error, DownloadFailed)
    assert error.details["file"] == FILE
    assert error.details["attempts"] == 3
    assert reason.lower() in error.details["reason"].lower()
    assert error.details["host"] in ("127.0.0.1", "localhost")
    assert "hf_s3cret" not in str(error.to_wire())
    assert_nothing_is_claimed(cache, repo)


def test_attempts_are_a_setting(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    fault = hub.fault(repo, "status", file=FILE, status=502, where=["resolve"])
    assert fetch_error(hub.env(), cache, repo, attempts=1).details["attempts"] == 1
    assert hub.fired(fault) == 1


def test_what_cannot_change_is_not_tried_again(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    fault = hub.fault(repo, "status", file=FILE, status=404, where=["resolve"])
    error = fetch_error(hub.env(), cache, repo)
    assert isinstance(error, DownloadFailed)
    assert error.details["reason"] == "HTTP 404"
    assert hub.fired(fault) == 1


@pytest.mark.parametrize("kind", ["flip", "oid"])
def test_wrong_bytes_three_times_are_told(hub: Hub, repo: str, cache: Path, kind: str) -> None:
    hub.synthetic(repo, shard_bytes=9 * MIB)
    how: dict[str, Any] = {"at": MIB} if kind == "flip" else {"value": "d" * 64}
    hub.fault(repo, kind, file=FILE, **how)
    error = fetch_error(hub.env(), cache, repo)
    assert isinstance(error, VerificationFailed)
    assert error.details["file"] == FILE
    assert error.details["attempts"] == 3
    assert weights(hub, repo) == 27 * MIB
    assert_nothing_is_claimed(cache, repo)


def test_a_file_that_is_unsound_on_the_hub_itself_is_told(hub: Hub, repo: str, cache: Path) -> None:
    hub.commit(repo, {**synthetic_files(1, MIB), FILE: b"\xff" * 4096})
    error = fetch_error(hub.env(), cache, repo)
    assert isinstance(error, VerificationFailed)
    assert error.details["file"] == FILE
    assert weights(hub, repo) == 4096, "the same bytes would come again"
    assert_nothing_is_claimed(cache, repo)


def test_a_config_that_is_none_is_told(hub: Hub, repo: str, cache: Path) -> None:
    hub.commit(repo, {**synthetic_files(1, MIB), "config.json": b"[1"})
    assert fetch_error(hub.env(), cache, repo).kind == "model_invalid"
    assert not (folder(cache, repo) / "refs").exists()
    with pytest.raises(RpcError, match=r"config\.json"):
        plan(hub.env(), cache, repo)


def test_what_failed_goes_on_when_asked_again(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=16 * MIB)
    fault = hub.fault(repo, "drop", file=FILE, at=12 * MIB)
    fetch_error(hub.env(), cache, repo, connections=1)
    hub.clear(fault)
    before = weights(hub, repo)
    fetch(hub.env(), cache, repo)
    assert weights(hub, repo) - before <= 5 * MIB
    assert_whole(hub, cache, repo, commit)


# --- a hub that lies --------------------------------------------------------------------------------------------------


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_evil_names_become_no_paths(hub: Hub, repo: str, cache: Path, tmp_path: Path) -> None:
    good = synthetic_files(1, 4096)
    commit = hub.commit(repo, {**good, **dict.fromkeys(EVIL_NAMES, b"evil")})
    fetch(hub.env(), cache, repo)
    snapshot = folder(cache, repo) / "snapshots" / commit
    assert {path.name for path in snapshot.iterdir()} == set(good)
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}
    assert {path.name for path in cache.iterdir()} == {folder(cache, repo).name}
    assert len(list((folder(cache, repo) / "blobs").iterdir())) == len(good)


def test_evil_etags_are_not_even_looked_at(hub: Hub, repo: str, cache: Path, tmp_path: Path) -> None:
    for number, etag in enumerate(EVIL_ETAGS):
        name = f"{repo}-{number}"
        commit = hub.synthetic(name, shard_bytes=4096)
        hub.fault(name, "etag", value=etag)
        if "\0" in etag:  # that is no HTTP
            assert isinstance(fetch_error(hub.env(), cache, name), DownloadFailed)
        else:
            fetch(hub.env(), cache, name)
            assert (folder(cache, name) / "refs" / "main").read_text() == commit
    assert {path.name for path in tmp_path.iterdir()} == {"hub"}
    assert all(path.name.startswith("models--org--faulty") for path in cache.iterdir())


def test_evil_commits_are_refused(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    with FetcherProcess(hub.env()) as fetcher:
        for commit in ("../../x", "", "main", "/etc/x", "c" * 39 + "\n", "C" * 40, "x" * 40):
            fault = hub.fault(repo, "commit", value=commit)
            with pytest.raises(DownloadFailed):
                fetcher.ask("fetch", Fetch(where=where(cache, repo)))
            hub.clear(fault)
    assert not cache.exists()


def test_another_commit_than_was_asked_for_is_refused(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=4096)
    hub.fault(repo, "commit", value="d" * 40)
    assert isinstance(fetch_error(hub.env(), cache, repo, at={"revision": commit}), DownloadFailed)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("raw", b""), ("raw", b"\xff\xfe"), ("raw", b"[" * 100_000), ("json", []), ("json", 7), ("json", {}),
        ("json", {"sha": "a" * 40}), ("json", {"sha": "a" * 40, "siblings": 5}), ("json", {"siblings": [None]}),
        ("json", {"sha": "a" * 40, "siblings": [{"rfilename": {"x": 1}}]}), ("json", {"sha": ["a"], "siblings": {}}),
        ("huge", 40 * MIB),
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
def test_metadata_that_is_none_is_refused(hub: Hub, repo: str, cache: Path, kind: str, value: Any) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    hub.fault(repo, kind, value=value, where=["info"])
    with FetcherProcess(hub.env()) as fetcher:
        with pytest.raises(RpcError) as caught:
            fetcher.ask("fetch", Fetch(where=where(cache, repo)))
        assert peak_bytes(fetcher) < 120e6
    assert caught.value.kind in ("download_failed", "model_invalid")
    assert fetcher.stderr == b"", "nothing unforeseen happened"
    assert not cache.exists()


def peak_bytes(fetcher: FetcherProcess) -> int:
    try:
        lines = Path(f"/proc/{fetcher.process.pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("size", -1), ("size", 2**60), ("size", "7"), ("size", 1.5), ("oid", "../../x"), ("oid", ""), ("oid", 7),
     ("strip", ["lfs.sha256"]), ("strip", ["lfs.size"]), ("strip", ["lfs", "size", "blobId"])],
)  # fmt: skip
def test_sizes_and_hashes_that_are_none_are_refused(hub: Hub, repo: str, cache: Path, kind: str, value: Any) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    hub.fault(repo, kind, file=FILE, value=value, where=["info"])
    error = fetch_error(hub.env(), cache, repo)
    assert error.kind == "download_failed"
    assert not cache.exists()


def test_more_than_the_disk_holds_is_refused_before_a_byte_comes(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    hub.fault(repo, "size", file=FILE, value=2**49, where=["info"])
    error = fetch_error(hub.env(), cache, repo)
    assert isinstance(error, InsufficientDisk)
    details = error.details
    assert details["needed_bytes"] > 2**49
    assert details["missing_bytes"] == details["needed_bytes"] - details["free_bytes"] > 0
    assert weights(hub, repo) == 0
    assert not cache.exists()


# --- a disk that fails ------------------------------------------------------------------------------------------------

# The process's own writes fail from the given number of bytes on, as on a disk that fills up.
_FULL = """
    import errno, os, runpy, sys, threading
    limit, lock, write = int(sys.argv.pop(1)), threading.Lock(), os.pwritev
    code = getattr(errno, sys.argv.pop(1))
    def pwritev(fd, pieces, at):
        global limit
        with lock:
            limit -= sum(map(len, pieces))
            if limit < 0:
                raise OSError(code, os.strerror(code))
        return write(fd, pieces, at)
    os.pwritev = pwritev
    sys.argv[0] = "mlxd.fetch"
    runpy.run_module("mlxd.fetch", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("code", "kind"),
    [("ENOSPC", "insufficient_disk"), ("EDQUOT", "insufficient_disk"), ("EIO", "download_failed"),
     ("EROFS", "permission_denied")],
)  # fmt: skip
def test_a_disk_that_fails_meanwhile_ends_it_and_what_came_stays(
    hub: Hub, repo: str, cache: Path, code: str, kind: str
) -> None:
    commit = hub.synthetic(repo, shard_bytes=16 * MIB)
    command = [sys.executable, "-c", textwrap.dedent(_FULL), str(12 * MIB), code]
    with FetcherProcess(hub.env(), command=command) as fetcher, pytest.raises(RpcError) as caught:
        fetcher.ask("fetch", Fetch(where=where(cache, repo)))
    assert caught.value.kind == kind
    if kind == "insufficient_disk":
        details = caught.value.details
        assert details["missing_bytes"] == details["needed_bytes"] - details["free_bytes"] > 0
    assert_nothing_is_claimed(cache, repo)
    assert plan(hub.env(), cache, repo).download_bytes <= 9 * MIB
    fetch(hub.env(), cache, repo)
    assert_whole(hub, cache, repo, commit)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    cache.mkdir(mode=0o500)
    error = fetch_error(hub.env(), cache, repo)
    assert error.kind == "permission_denied"
    assert error.details["folder"].startswith(str(cache))
