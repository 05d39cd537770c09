"""A real fetcher against a hub that behaves: what it leaves on disk, what it fetches again, what it refuses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd.childwire import Fetch
from mlxd_client.errors import DownloadFailed, InvalidRequest, MethodNotFound, ModelInvalid, ModelNotFound, RpcError
from support.fetching import FetcherProcess, fetch, fetch_error, plan, verify, where
from support.hub import Hub, sparse_safetensors, synthetic_files

MIB = 1 << 20
_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def repo() -> str:
    """A repository of one's own."""
    return f"org/healthy-{next(_NUMBERS)}"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def folder(cache: Path, repo: str) -> Path:
    return cache / ("models--" + repo.replace("/", "--"))


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if ".mlxd" in path.name]


def weights(hub: Hub, repo: str) -> int:
    """Bytes of weights that were sent, without the redirects to them."""
    asked = hub.requests(repo=repo, file="*.safetensors")
    return sum(request.bytes_sent for request in asked if request.status in (200, 206))


def genuine(hub: Hub, cache: Path, repo: str, *, offline: bool, revision: str = "main") -> str:
    """What huggingface_hub's own snapshot_download makes of the cache."""
    script = (
        "import sys, huggingface_hub as h; "
        "print(h.snapshot_download(sys.argv[1], revision=sys.argv[2], local_files_only=sys.argv[3] == 'offline'))"
    )
    env = {**os.environ, **hub.env(cache)}
    arguments = [sys.executable, "-c", script, repo, revision, "offline" if offline else "online"]
    return subprocess.run(arguments, env=env, check=True, capture_output=True, text=True).stdout.strip()


# --- what a download leaves -----------------------------------------------------------------------------------------


def test_a_model_arrives_as_huggingface_hub_itself_would_have_put_it_there(hub: Hub, repo: str, cache: Path) -> None:
    files = synthetic_files(3, 5 * MIB + 3)
    commit = hub.commit(
        repo, {**files, "README.md": b"x", "model.py": b"x", "sub/config.json": b"{}", "empty.txt": b""}
    )
    with FetcherProcess(hub.env()) as fetcher:
        fetched = fetcher.ask("fetch", Fetch(where=where(cache, repo)))
    assert fetched["commit"] == commit
    snapshot = folder(cache, repo) / "snapshots" / commit
    assert genuine(hub, cache, repo, offline=True) == str(snapshot)
    assert {path.name for path in snapshot.iterdir()} == {*files, "empty.txt"}
    for name, content in files.items():
        expected = content if isinstance(content, bytes) else content.read()
        assert (snapshot / name).read_bytes() == expected
    etags = hub.etags(repo, commit)
    assert all(os.readlink(snapshot / name) == f"../../blobs/{etags[name]}" for name in files)
    assert (folder(cache, repo) / "refs" / "main").read_text() == commit
    assert leftovers(cache) == []
    assert fetched["size_bytes"] == fetched["fetched_bytes"] == sum(path.stat().st_size for path in snapshot.iterdir())
    assert verify(hub.env(), snapshot).bad_files == []
    assert fetcher.stderr == b""


def test_what_huggingface_hub_has_fetched_is_not_fetched_again(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shards=2, shard_bytes=MIB)
    genuine(hub, cache, repo, offline=False)
    before = weights(hub, repo)
    assert plan(hub.env(), cache, repo).download_bytes == 0
    assert fetch(hub.env(), cache, repo).fetched_bytes == 0
    assert weights(hub, repo) == before


def test_a_plan_needs_metadata_and_settings_only(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shards=2, shard_bytes=MIB)
    seen = plan(hub.env(), cache, repo)
    assert not cache.exists(), "nothing is written"
    assert weights(hub, repo) == 0
    assert seen.commit == commit
    assert seen.download_bytes == seen.size_bytes > seen.weights_bytes == 2 * MIB
    assert seen.context_length == 512
    longer = plan(hub.env(), cache, repo, context_length=128)
    assert longer.kv_bytes * 4 == seen.kv_bytes
    assert seen.memory_bytes - longer.memory_bytes == seen.kv_bytes - longer.kv_bytes


def test_a_pinned_revision_gets_a_ref_of_its_own_and_a_commit_only_then(hub: Hub, repo: str, cache: Path) -> None:
    old = hub.synthetic(repo, shard_bytes=MIB)
    hub.tag(repo, "v1", old)
    refs = folder(cache, repo) / "refs"
    fetch(hub.env(), cache, repo, at={"revision": old})
    assert not refs.exists()
    fetch(hub.env(), cache, repo, at={"revision": old, "pin": True})
    assert {path.name for path in refs.iterdir()} == {old}
    fetch(hub.env(), cache, repo, at={"revision": "v1", "pin": True})
    assert (refs / "v1").read_text() == old
    assert weights(hub, repo) == MIB, "the bytes came once"


def test_an_update_fetches_what_is_new(hub: Hub, repo: str, cache: Path) -> None:
    first = synthetic_files(2, MIB)
    old = hub.commit(repo, first)
    fetch(hub.env(), cache, repo)
    name = "model-00002-of-00002.safetensors"
    new = hub.commit(repo, first | {name: sparse_safetensors(MIB, seed=9, name="weight.1")})
    assert plan(hub.env(), cache, repo).download_bytes == MIB
    assert fetch(hub.env(), cache, repo).fetched_bytes == MIB
    assert (folder(cache, repo) / "refs" / "main").read_text() == new
    assert (folder(cache, repo) / "snapshots" / old / name).exists(), "who uses the old one goes on doing so"


def test_many_files_need_little_memory(hub: Hub, repo: str, cache: Path) -> None:
    hub.commit(repo, synthetic_files(199, 64 * 1024) | {"big.safetensors": sparse_safetensors(MIB)})
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.ask("fetch", Fetch(where=where(cache, repo)))
        assert peak_bytes(fetcher) < 120e6
        assert not any("big" in request.path for request in hub.requests(repo=repo)), "the index does not name it"


def test_a_large_file_needs_little_memory(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=192 * MIB)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.ask("fetch", Fetch(where=where(cache, repo)))
        assert peak_bytes(fetcher) < 120e6


def peak_bytes(fetcher: FetcherProcess) -> int:
    """Resident, the most it ever was; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{fetcher.process.pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- on the way -----------------------------------------------------------------------------------------------------


def test_progress_is_told_at_most_ten_times_a_second_and_only_grows(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shards=2, shard_bytes=4 * MIB)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.ask("fetch", Fetch(where=where(cache, repo), rate_bytes_s=8 * MIB))
    downloading = [at for at in fetcher.progress if at.phase != "planning"]
    assert len(downloading) >= 3
    assert all(before.done_bytes <= after.done_bytes for before, after in itertools.pairwise(downloading))
    assert {at.total_bytes for at in downloading} == {8 * MIB + small(hub, repo)}
    assert {at.attempts for at in downloading} == {1}
    assert {at.phase for at in fetcher.progress} <= {"planning", "downloading", "verifying"}
    assert any(at.rate_bytes_s > 0 for at in downloading)
    spent = fetcher.progress_at[-1] - fetcher.progress_at[0]
    assert len(fetcher.progress) <= 10 * spent + 2


def small(hub: Hub, repo: str) -> int:
    return sum(hub.sent(name, repo=repo) for name in ("config.json", "tokenizer*", "*.index.json"))


def test_a_rate_limit_holds(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=4 * MIB)
    began = time.monotonic()
    fetch(hub.env(), cache, repo, rate_bytes_s=4 * MIB)
    assert time.monotonic() - began > 0.7


def test_heartbeats_come_while_the_hub_says_nothing(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    fault = hub.fault(repo, "hold", where=["info"])
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.send("fetch", Fetch(where=where(cache, repo)), 1)
        hub.wait_held(repo=repo)
        for _ in range(3):
            fetcher.until(lambda message: message.get("method") == "heartbeat", timeout_s=5)
        assert all(after - before < 1.5 for before, after in itertools.pairwise(fetcher.beats))
        hub.clear(fault)
        fetcher.answer()


def test_killed_it_goes_on_from_where_it_was(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shards=2, shard_bytes=24 * MIB)
    order = Fetch(where=where(cache, repo))
    fault = hub.fault(repo, "hold", file="*.safetensors", at=20 * MIB)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.send("fetch", order, 1)
        at = fetcher.until_progress(lambda at: at.done_bytes > 30 * MIB)
        fetcher.kill()
    hub.clear(fault)
    assert not (folder(cache, repo) / "refs").exists(), "half a model is none"
    left = plan(hub.env(), cache, repo).download_bytes
    assert left <= at.total_bytes - at.done_bytes + 8 * MIB
    fetched = fetch(hub.env(), cache, repo)
    assert fetched.fetched_bytes <= left
    assert verify(hub.env(), folder(cache, repo) / "snapshots" / fetched.commit).bad_files == []


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "pipe"])
def test_it_ends_at_once_and_leaves_the_part(hub: Hub, repo: str, cache: Path, how: str) -> None:
    hub.synthetic(repo, shard_bytes=8 * MIB)
    hub.fault(repo, "hold", file="*.safetensors", at=6 * MIB)
    with FetcherProcess(hub.env()) as fetcher:
        fetcher.send("fetch", Fetch(where=where(cache, repo)), 1)
        fetcher.until_progress(lambda at: at.done_bytes > 4 * MIB)
        began = time.monotonic()
        if how == "stop":
            fetcher.send("stop", {})
        elif how == "SIGTERM":
            fetcher.process.terminate()
        else:
            fetcher._socket.close()
        assert fetcher.process.wait(10) == 0
        assert time.monotonic() - began < 1.0
    assert fetcher.stderr == b""
    hub.clear(repo=repo)
    assert plan(hub.env(), cache, repo).download_bytes < 5 * MIB


def test_two_fetchers_of_one_model_share_the_work(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shards=2, shard_bytes=8 * MIB)
    fault = hub.fault(repo, "hold", file="*.safetensors", at=6 * MIB)
    order = Fetch(where=where(cache, repo))
    with FetcherProcess(hub.env()) as first, FetcherProcess(hub.env()) as second:
        first.send("fetch", order, 1)
        hub.wait_held(2, repo=repo)
        second.send("fetch", order, 1)
        waiting = second.until_progress(lambda at: at.total_bytes > 0)
        assert waiting.done_bytes > 4 * MIB, "what the other has is counted"
        hub.clear(fault)
        assert first.answer()["commit"] == second.answer()["commit"]
    assert weights(hub, repo) <= 18 * MIB
    assert leftovers(cache) == []


def test_when_one_of_two_is_killed_the_other_takes_over(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shard_bytes=8 * MIB)
    fault = hub.fault(repo, "hold", file="*.safetensors", at=6 * MIB)
    order = Fetch(where=where(cache, repo))
    with FetcherProcess(hub.env()) as first, FetcherProcess(hub.env()) as second:
        first.send("fetch", order, 1)
        hub.wait_held(1, repo=repo)
        second.send("fetch", order, 1)
        second.until_progress(lambda at: at.total_bytes > 0)
        first.kill()
        hub.clear(fault)
        assert second.answer()["commit"] == commit
    assert verify(hub.env(), folder(cache, repo) / "snapshots" / commit).bad_files == []


# --- rot --------------------------------------------------------------------------------------------------------------


def test_rot_is_found_and_mended(hub: Hub, repo: str, cache: Path) -> None:
    commit = hub.synthetic(repo, shards=2, shard_bytes=MIB)
    fetch(hub.env(), cache, repo)
    snapshot = folder(cache, repo) / "snapshots" / commit
    name = "model-00001-of-00002.safetensors"
    blob = (snapshot / name).resolve()
    good = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert [(bad.file, bad.reason) for bad in verify(hub.env(), snapshot).bad_files] == [(name, "hash")]
    assert fetch(hub.env(), cache, repo).fetched_bytes == 0, "sizes are all that is looked at, unless asked for more"
    assert fetch(hub.env(), cache, repo, repair=True).fetched_bytes == MIB
    assert blob.read_bytes() == good
    assert verify(hub.env(), snapshot).bad_files == []
    blob.write_bytes(good[:-1])
    assert fetch(hub.env(), cache, repo).fetched_bytes == MIB, "another size is seen without asking"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["nowhere", "f" * 40])
def test_a_revision_that_is_not_there(hub: Hub, repo: str, cache: Path, revision: str) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    error = fetch_error(hub.env(), cache, repo, at={"revision": revision})
    assert isinstance(error, ModelNotFound)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["../../etc", "a/b/c", "", "x" * 200, "a--b", "a\nb", "org/name?x=1", "org/name#x"])
def test_a_repository_that_cannot_be_is_asked_nobody(hub: Hub, cache: Path, name: str) -> None:
    before = len(hub.requests())
    assert isinstance(fetch_error(hub.env(), cache, name), ModelNotFound)
    assert len(hub.requests()) == before


@pytest.mark.parametrize("revision", ["../x", "a b", "refs/../x", "", "x?y", "x\ny", "/x", "Main"])
def test_a_revision_that_cannot_be_is_asked_nobody(hub: Hub, repo: str, cache: Path, revision: str) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    assert isinstance(fetch_error(hub.env(), cache, repo, at={"revision": revision}), ModelNotFound)
    assert hub.requests(repo=repo) == []


def test_a_repository_without_safetensors(hub: Hub, repo: str, cache: Path) -> None:
    hub.commit(repo, {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"x"})
    error = fetch_error(hub.env(), cache, repo)
    assert isinstance(error, ModelInvalid)
    assert "pickle" in error.message
    assert not cache.exists()


def test_offline_nothing_is_asked(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    offline = hub.env() | {"HF_HUB_OFFLINE": "1"}
    error = fetch_error(offline, cache, repo)
    assert isinstance(error, DownloadFailed)
    assert "offline" in error.message
    with pytest.raises(DownloadFailed, match="offline"):
        plan(offline, cache, repo)
    assert hub.requests(repo=repo) == []


def test_a_hub_that_is_not_there(cache: Path, hub: Hub) -> None:
    error = fetch_error(hub.env() | {"HF_ENDPOINT": "http://127.0.0.1:1"}, cache)
    assert isinstance(error, DownloadFailed)
    assert error.details["host"] == "127.0.0.1:1"
    assert error.details["attempts"] == 3
    assert error.details["reason"] == "Connection refused"


def test_a_folder_that_cannot_be_written(hub: Hub, repo: str, tmp_path: Path) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    (tmp_path / "file").write_text("in the way")
    error = fetch_error(hub.env(), tmp_path / "file", repo)
    assert error.kind in ("download_failed", "model_invalid")
    assert (tmp_path / "file").read_text() == "in the way"


def test_it_does_one_thing_and_nothing_else(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    fault = hub.fault(repo, "hold", where=["info"])
    with FetcherProcess(hub.env()) as fetcher:
        with pytest.raises(MethodNotFound):
            fetcher.ask("generate", {})
        with pytest.raises(RpcError, match="where"):
            fetcher.ask("fetch", {})
        fetcher.send("fetch", Fetch(where=where(cache, repo)), 2)
        hub.wait_held(repo=repo)
        with pytest.raises(InvalidRequest):
            fetcher.ask("fetch", Fetch(where=where(cache, repo)))
        hub.clear(fault)
        fetcher.answer(2)


def test_the_newest_commits_of_those_that_the_hub_knows(hub: Hub, repo: str) -> None:
    commit = hub.synthetic(repo, shard_bytes=4096)
    hub.synthetic(f"{repo}-bad", shard_bytes=4096)
    hub.fault(f"{repo}-bad", "json", where=["info"], value={"sha": "../../x"})
    with FetcherProcess(hub.env()) as fetcher:
        answer = fetcher.ask("latest", {"repos": [repo, "org/none", f"{repo}-bad", "../x"]})
    assert answer == {"commits": {repo: commit}}


# --- the token --------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "s3cret" * 5


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shards=2, shard_bytes=MIB)
    hub.gate(repo, TOKEN)
    with FetcherProcess(hub.env() | {"HF_TOKEN": TOKEN}) as fetcher:
        fetcher.ask("fetch", Fetch(where=where(cache, repo)))
    asked = hub.requests(repo=repo)
    assert {(request.host.split(":")[0], request.had_authorization) for request in asked} == {
        ("127.0.0.1", True), ("localhost", False),
    }  # fmt: skip
    assert TOKEN not in str(fetcher.messages)
    assert TOKEN.encode() not in fetcher.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in cache.rglob("*") if path.is_file())


def test_the_token_is_found_in_its_file_too(hub: Hub, repo: str, cache: Path, tmp_path: Path) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    hub.gate(repo, TOKEN)
    (tmp_path / "token").write_text(TOKEN + "\n")
    fetch(hub.env() | {"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "token")}, cache, repo)


@pytest.mark.parametrize("token", ["", "hf_wrong"])
@pytest.mark.parametrize("gate", [{}, {"closed": True}, {"private": True}], ids=["gated", "closed", "private"])
def test_who_may_not_is_told_what_to_do(
    hub: Hub, repo: str, cache: Path, tmp_path: Path, token: str, gate: dict[str, bool]
) -> None:
    hub.synthetic(repo, shard_bytes=MIB)
    hub.gate(repo, TOKEN, **gate)
    env = hub.env() | {"HF_TOKEN": token, "HF_TOKEN_PATH": str(tmp_path / "none")}
    error = fetch_error(env, cache, repo)
    assert error.kind == "permission_denied"
    assert f"{hub.endpoint}/{repo}" in error.message
    assert "hf_wrong" not in str(error.to_wire())
    if not gate.get("private"):
        assert "accept its terms" in error.message
    if not token:
        assert "hf auth login" in error.message
    assert len(hub.requests(repo=repo, where="resolve")) <= 8, "a refusal is not tried again"


def test_a_token_that_is_none_is_not_repeated(hub: Hub, repo: str, cache: Path) -> None:
    hub.synthetic(repo, shard_bytes=4096)
    error = fetch_error(hub.env() | {"HF_TOKEN": "hf_bad\x01token"}, cache, repo)
    assert error.kind == "permission_denied"
    assert "hf_bad" not in str(error.to_wire())
    assert hub.requests(repo=repo) == []
