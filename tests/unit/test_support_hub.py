"""The hub of the tests is believed by the genuine huggingface_hub, and each of its faults does what it says."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import psutil
import pytest

from support import hub_faults
from support.hub import EVIL_NAMES, Hub, Sparse, model_files, sparse_safetensors
from support.hub_wire import PIECE_BYTES, OnDisk

REPO = "org/name"
SMALL = b'{"hidden_size": 64, "name": "small"}'
LARGE = Sparse(2 * PIECE_BYTES + 12_345, seed=3)
LARGE_PATH = "model.safetensors"


class Got(msgspec.Struct):
    """An answer as it came. `broken` says how its body ended before its time."""

    status: int
    headers: dict[str, str]
    body: bytes
    broken: str = ""


def get(hub: Hub, path: str, *, method: str = "GET", host: str = "127.0.0.1", **headers: str) -> Got:
    connection = http.client.HTTPConnection(host, hub.port, timeout=60)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        got = Got(response.status, {name.lower(): value for name, value in response.getheaders()}, b"")
        try:
            while data := response.read1(65536):
                got.body += data
            if response.length:
                got.broken = "ended"
        except http.client.IncompleteRead as error:
            got.body += error.partial
            got.broken = "ended"
        except ConnectionResetError:
            got.broken = "reset"
        return got
    finally:
        connection.close()


def resolve(name: str, revision: str = "main") -> str:
    return f"/{REPO}/resolve/{revision}/{quote(name)}"


def follow(hub: Hub, name: str = LARGE_PATH, **headers: str) -> Got:
    """The bytes of an LFS file, by way of the redirect."""
    location = urlsplit(get(hub, resolve(name)).headers["location"])
    return get(hub, f"{location.path}?{location.query}", host=location.hostname or "", **headers)


def info(hub: Hub, revision: str = "main") -> Any:
    return json.loads(get(hub, f"/api/models/{REPO}/revision/{revision}?blobs=True").body)


def ask(hub: Hub, path: str) -> socket.socket:
    """A connection on which a request was sent, and nothing read yet."""
    sock = socket.create_connection(("127.0.0.1", hub.port), timeout=60)
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return sock


def lfs_path(commit: str) -> str:
    return f"/lfs/{REPO}/{commit}/{LARGE_PATH}"


@pytest.fixture(scope="module")
def process() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(process: Hub) -> Iterator[Hub]:
    """A hub with one repository, of a small file and an LFS one, and with nothing wrong."""
    process.forget()
    process.commit(REPO, {"config.json": SMALL, LARGE_PATH: LARGE})
    yield process
    process.clear()
    process.throttle(None)
    process.resume()
    process.relative_redirects(False)
    process.remove(REPO)


def genuine(hub: Hub, cache: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, for which this hub is the hub."""
    command = [sys.executable, "-c", f"from huggingface_hub import *\n{code}"]
    base = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    base["HF_HOME"] = str(cache.parent / "home")
    return subprocess.run(command, env=base | hub.env(cache) | env, capture_output=True, text=True, timeout=120)


# --- as the true hub ---


@pytest.mark.parametrize("relative", [False, True])
def test_snapshot_download(hub: Hub, tmp_path: Path, relative: bool) -> None:
    on_disk = tmp_path / "on-disk"
    on_disk.write_bytes(os.urandom(300_000))
    files: dict[str, bytes | Path | Sparse]
    files = {"config.json": SMALL, "empty.txt": b"", "a b/ü.json": b"[]", LARGE_PATH: LARGE, "b.safetensors": on_disk}
    commit = hub.commit(REPO, files)
    hub.relative_redirects(relative)
    done = genuine(hub, tmp_path / "cache", f"print(snapshot_download('{REPO}'))", HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / commit
    assert Path(done.stdout.strip()) == snapshot
    contents = {str(p.relative_to(snapshot)): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()}
    assert contents == files | {LARGE_PATH: LARGE.read(), "b.safetensors": on_disk.read_bytes()}
    etags = hub.etags(REPO, commit)
    assert {name: (snapshot / name).resolve().name for name in files} == etags
    assert etags[LARGE_PATH] == hashlib.sha256(LARGE.read()).hexdigest()
    assert etags["config.json"] == hashlib.sha1(b"blob %d\0%b" % (len(SMALL), SMALL)).hexdigest()
    # the token goes to the hub, and not to where the redirects lead
    assert {r.host for r in hub.requests(where="lfs")} == {f"localhost:{hub.port}"}
    assert not any(r.had_authorization for r in hub.requests(where="lfs"))
    assert all(r.had_authorization for r in hub.requests(where="info") + hub.requests(where="resolve"))
    assert bool(hub.requests(where="cached")) == relative
    assert hub.sent(LARGE_PATH) == LARGE.size


def test_metadata(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit(REPO, {"config.json": SMALL, LARGE_PATH: LARGE}, tag="v1")
    second = hub.commit(REPO, {"config.json": b"{}"}, branch="dev")
    code = f"""
info = HfApi().model_info('{REPO}', revision='v1', files_metadata=True)
print(info.sha, [(s.rfilename, s.size, s.blob_id, s.lfs and s.lfs.sha256) for s in info.siblings])
print([(s.rfilename, s.size) for s in HfApi().model_info('{REPO}').siblings])
refs = HfApi().list_repo_refs('{REPO}')
print({{r.name: r.target_commit for r in refs.branches + refs.tags}})
print(hf_hub_download('{REPO}', 'config.json', revision='dev'))
"""
    done = genuine(hub, tmp_path / "cache", code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    etags = hub.etags(REPO, first)
    sha, _, siblings = lines[0].partition(" ")
    assert sha == first
    config, weights = eval(siblings)
    assert config == ("config.json", len(SMALL), etags["config.json"], None)
    assert weights[:2] == (LARGE_PATH, LARGE.size)
    assert weights[3] == etags[LARGE_PATH]
    assert weights[2] not in etags.values()
    assert eval(lines[1]) == [("config.json", None), (LARGE_PATH, None)]
    assert eval(lines[2]) == {"main": first, "v1": first, "dev": second}
    assert Path(lines[3]).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("how", "token", "error"),
    [
        ({}, None, "GatedRepoError 401"),
        ({}, "wrong", "GatedRepoError 403"),
        ({}, "right", "fine"),
        ({"private": True}, None, "RepositoryNotFoundError 401"),
        ({"private": True}, "wrong", "HfHubHTTPError 401"),
        ({"private": True}, "right", "fine"),
    ],
)
def test_gates(hub: Hub, tmp_path: Path, how: dict[str, bool], token: str | None, error: str) -> None:
    hub.gate(REPO, "right", **how)
    code = f"""
from huggingface_hub.errors import HfHubHTTPError
try:
    hf_hub_download('{REPO}', 'config.json', token={token!r} or False)
    print('fine')
except HfHubHTTPError as error:
    print(type(error).__name__, error.response.status_code)
"""
    assert genuine(hub, tmp_path / "cache", code).stdout.strip() == error


def test_what_a_gate_hides(hub: Hub) -> None:
    path = f"/api/models/{REPO}"
    hub.gate(REPO, "right")
    assert json.loads(get(hub, path).body)["gated"] == "manual"
    hub.gate(REPO, "right", closed=True)
    assert get(hub, path).headers["x-error-code"] == "GatedRepo"
    assert get(hub, path, Authorization="Bearer right").status == 200
    hub.ungate(REPO)
    assert get(hub, path).status == 200


def test_what_is_not_there(hub: Hub) -> None:
    commit = info(hub)["sha"]
    nothing = get(hub, "/api/models/org/nothing")
    assert (nothing.status, nothing.headers["x-error-code"]) == (401, "RepoNotFound")
    assert get(hub, "/api/models/org/nothing", Authorization="Bearer x").status == 404
    assert get(hub, f"/api/models/{REPO}/revision/none").headers["x-error-code"] == "RevisionNotFound"
    entry = get(hub, resolve("none.json"))
    assert (entry.status, entry.headers["x-error-code"], entry.headers["x-repo-commit"]) == (
        404,
        "EntryNotFound",
        commit,
    )
    assert get(hub, "/").status == 401
    assert get(hub, resolve("config.json"), method="DELETE").status == 405


def test_a_small_model(hub: Hub, tmp_path: Path) -> None:
    """One tensor a file, and the whole is what it was before it was split."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    whole = model_files(1)
    names = set(json.loads(whole["model.safetensors"][8:][: int.from_bytes(whole["model.safetensors"][:8], "little")]))
    count = len(names - {"__metadata__"})
    commit = hub.model("org/tiny", shards=count)
    done = genuine(hub, tmp_path / "cache", "print(snapshot_download('org/tiny'))")
    snapshot = Path(done.stdout.strip())
    assert snapshot.name == commit
    assert len(list(snapshot.glob("model-*.safetensors"))) == count
    (tmp_path / "whole.safetensors").write_bytes(whole["model.safetensors"])
    weights: Any = mx.load(str(tmp_path / "whole.safetensors"))
    model, _ = load_model(snapshot)
    from mlx.utils import tree_flatten

    loaded = dict(tree_flatten(model.parameters()))
    assert loaded.keys() == weights.keys()
    assert all(mx.array_equal(loaded[name], weights[name]) for name in weights)


def test_two_hundred_files(hub: Hub) -> None:
    assert len([name for name in model_files(200) if name.endswith(".safetensors")]) == 200


def test_synthetic_safetensors_are_valid() -> None:
    content = sparse_safetensors(3_000_000, name="w")
    data = content.read()
    assert len(data) == content.size == 3_000_000
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    assert header["w"]["data_offsets"] == [0, 3_000_000 - 8 - header_bytes]


def test_sparse_content_is_the_same_from_anywhere(tmp_path: Path) -> None:
    content = Sparse(3 * PIECE_BYTES + 17, seed=5, head=b"h" * (PIECE_BYTES + 100))
    whole = content.read()
    assert whole[: PIECE_BYTES + 100] == b"h" * (PIECE_BYTES + 100)
    (tmp_path / "file").write_bytes(whole)
    on_disk = OnDisk(str(tmp_path / "file"), len(whole))
    for start, stop in [(0, 1), (5, 3 * PIECE_BYTES), (PIECE_BYTES - 1, PIECE_BYTES + 9), (len(whole) - 3, len(whole))]:
        assert content.read(start, stop) == whole[start:stop]
        assert b"".join(bytes(piece) for piece in on_disk.pieces(start, stop)) == whole[start:stop]
    assert len({whole[at : at + 64] for at in range(2 * PIECE_BYTES, len(whole), PIECE_BYTES)}) == 2
    assert Sparse(100, seed=1).read() != Sparse(100, seed=2).read()


def test_sixty_gigabytes_cost_nothing(hub: Hub) -> None:
    size = 60 * 10**9
    commit = hub.synthetic(REPO, shard_bytes=size, hashed=False)
    assert {entry["size"] for entry in info(hub)["siblings"] if "lfs" in entry} == {size}
    last = follow(hub, Range=f"bytes={size - 10}-")
    assert last.body == sparse_safetensors(size, name="weight.0").read(size - 10)
    assert hub.etags(REPO, commit)[LARGE_PATH] == f"{1:064x}"
    assert psutil.Process(hub.pid).memory_info().rss < 200 << 20


# --- ranges ---


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=5-", slice(5, None)),
        ("bytes=-5", slice(-5, None)),
        ("bytes=1048570-1048590", slice(1048570, 1048591)),
        ("bytes=7-99999999", slice(7, None)),
    ],
)
def test_ranges(hub: Hub, asked: str, part: slice) -> None:
    got = follow(hub, Range=asked)
    start, stop, _ = part.indices(LARGE.size)
    assert (got.status, got.headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{LARGE.size}")
    assert got.body == LARGE.read(start, stop)
    assert hub.requests(where="body")[-1].range == asked


@pytest.mark.parametrize("asked", ["bytes=", "bytes=a-b", "lines=1-2", "bytes=0-1,4-5", "bytes=-"])
def test_ranges_without_sense_are_ignored(hub: Hub, asked: str) -> None:
    assert get(hub, resolve("config.json"), Range=asked).status == 200


@pytest.mark.parametrize("asked", [f"bytes={LARGE.size}-", "bytes=9-5", "bytes=-0"])
def test_ranges_that_cannot_be_had(hub: Hub, asked: str) -> None:
    got = follow(hub, Range=asked)
    assert (got.status, got.headers["content-range"]) == (416, f"bytes */{LARGE.size}")


def test_head_and_connections_that_stay(hub: Hub) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=60)
    for method, body in [("HEAD", b""), ("GET", SMALL), ("HEAD", b""), ("GET", SMALL)]:
        connection.request(method, resolve("config.json"))
        response = connection.getresponse()
        assert (response.headers["content-length"], response.read()) == (str(len(SMALL)), body)
    connection.close()


# --- faults ---

CHECKS: dict[str, Callable[[Hub], None]] = {}


def check(kind: str) -> Callable[[Callable[[Hub], None]], Callable[[Hub], None]]:
    def keep(function: Callable[[Hub], None]) -> Callable[[Hub], None]:
        CHECKS[kind] = function
        return function

    return keep


@check("drop")
def _drop(hub: Hub) -> None:
    fault = hub.fault(REPO, "drop", file="*.safetensors", after=1000, times=2)
    for _ in range(2):
        got = follow(hub, Range="bytes=100-")
        assert (got.body, got.broken) == (LARGE.read(100, 1100), "ended")
    assert follow(hub).body == LARGE.read()
    assert hub.fired(fault) == 2
    assert [(r.bytes_sent, r.ended) for r in hub.requests(where="body")][:2] == [(1000, "cut")] * 2
    hub.fault(REPO, "drop", at=5000)
    assert follow(hub, Range="bytes=4000-").body == LARGE.read(4000, 5000)
    assert follow(hub, Range="bytes=6000-6009").body == LARGE.read(6000, 6010)
    hub.clear()
    hub.fault(REPO, "drop", where=["info"])
    with pytest.raises(http.client.RemoteDisconnected):
        info(hub)


@check("reset")
def _reset(hub: Hub) -> None:
    hub.fault(REPO, "reset", after=1000)
    got = follow(hub)
    assert (got.body, got.broken) == (LARGE.read(0, 1000), "reset")


@check("short")
def _short(hub: Hub) -> None:
    hub.fault(REPO, "short", by=10)
    got = follow(hub)
    assert (got.headers["content-length"], got.broken) == (str(LARGE.size), "ended")
    assert got.body == LARGE.read(0, LARGE.size - 10)


@check("short_length")
def _short_length(hub: Hub) -> None:
    hub.fault(REPO, "short_length", by=10)
    got = follow(hub)
    assert (got.headers["content-length"], got.broken) == (str(LARGE.size - 10), "")
    assert got.body == LARGE.read(0, LARGE.size - 10)


@check("stall")
def _stall(hub: Hub) -> None:
    hub.fault(REPO, "stall", file="*.safetensors", after=1000)
    commit = info(hub)["sha"]
    with ask(hub, lfs_path(commit)) as sock:
        hub.wait_bytes(LARGE_PATH, 1000)
        data = b""
        while not data.endswith(LARGE.read(0, 1000)):
            data += sock.recv(4096)
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
    (record,) = hub.wait_requests(1, where="body", ended="client")
    assert record.bytes_sent == 1000


@check("hold")
def _hold(hub: Hub) -> None:
    hub.fault(REPO, "hold", file="*.safetensors", after=1000)
    got: list[Got] = []
    thread = threading.Thread(target=lambda: got.append(follow(hub)))
    thread.start()
    (record,) = hub.wait_held(file=LARGE_PATH)
    assert (record.bytes_sent, record.ended) == (1000, "")
    hub.release(keep=True)
    thread.join(60)
    assert got[0].body == LARGE.read()
    with ask(hub, lfs_path(info(hub)["sha"])):
        hub.wait_held(file=LARGE_PATH)
    hub.wait_requests(1, ended="client")
    hub.release(repo=REPO, file="*.safetensors")
    assert follow(hub).body == LARGE.read()


@check("trickle")
def _trickle(hub: Hub) -> None:
    hub.fault(REPO, "trickle", file="config.json", after=16, bytes_per_s=40)
    began = time.monotonic()
    assert get(hub, resolve("config.json")).body == SMALL
    assert 0.7 * (len(SMALL) - 16) / 40 - 0.1 < time.monotonic() - began < 30


@check("flip")
def _flip(hub: Hub) -> None:
    at = PIECE_BYTES + 77
    hub.fault(REPO, "flip", at=at, by=0x80, times=1)
    assert follow(hub, Range=f"bytes=0-{at - 1}").body == LARGE.read(0, at)
    bad, good = follow(hub, Range="bytes=5-").body, LARGE.read(5)
    assert [i for i in range(len(good)) if good[i] != bad[i]] == [at - 5]
    assert bad[at - 5] == good[at - 5] ^ 0x80
    assert follow(hub).body == LARGE.read()


@check("ignore_range")
def _ignore_range(hub: Hub) -> None:
    hub.fault(REPO, "ignore_range")
    got = follow(hub, Range="bytes=5-9")
    assert (got.status, got.body) == (200, LARGE.read())
    assert "content-range" not in got.headers


@check("wrong_range")
def _wrong_range(hub: Hub) -> None:
    fault = hub.fault(REPO, "wrong_range", by=3)
    got = follow(hub, Range="bytes=5-9")
    assert (got.status, got.headers["content-range"]) == (206, f"bytes 8-12/{LARGE.size}")
    assert got.body == LARGE.read(8, 13)
    assert follow(hub, Range="bytes=-4").body == LARGE.read(LARGE.size - 1)
    assert follow(hub).status == 200
    assert hub.fired(fault) == 2


@check("wrong_total")
def _wrong_total(hub: Hub) -> None:
    hub.fault(REPO, "wrong_total", value=7, times=1)
    hub.fault(REPO, "wrong_total", skip=1)
    assert follow(hub, Range="bytes=5-9").headers["content-range"] == "bytes 5-9/7"
    assert follow(hub, Range="bytes=5-9").headers["content-range"] == f"bytes 5-9/{LARGE.size + 1}"


@check("chunked")
def _chunked(hub: Hub) -> None:
    hub.fault(REPO, "chunked")
    got = follow(hub)
    assert (got.headers["transfer-encoding"], got.body) == ("chunked", LARGE.read())
    assert "content-length" not in got.headers


@check("gzip")
def _gzip(hub: Hub) -> None:
    import gzip

    hub.fault(REPO, "gzip")
    got = get(hub, resolve("config.json"), Accept_Encoding="gzip")
    assert (got.headers["content-encoding"], gzip.decompress(got.body)) == ("gzip", SMALL)
    assert get(hub, resolve("config.json"), Accept_Encoding="identity").body == SMALL


@check("status")
def _status(hub: Hub) -> None:
    hub.fault(REPO, "status", status=429, retry_after="1", where=["body"], file="config.json", times=1)
    assert follow(hub).status == 200
    got = get(hub, resolve("config.json"))
    assert (got.status, got.headers["retry-after"]) == (429, "1")
    assert get(hub, resolve("config.json")).status == 200
    for status in (404, 500, 503):
        fault = hub.fault(REPO, "status", status=status, code="RevisionNotFound")
        for path in (resolve("config.json"), resolve(LARGE_PATH), f"/api/models/{REPO}"):
            got = get(hub, path)
            assert (got.status, got.headers["x-error-code"]) == (status, "RevisionNotFound")
        hub.clear(fault)
    assert get(hub, f"/api/models/{REPO}").status == 200


@check("etag")
def _etag(hub: Hub) -> None:
    hub.fault(REPO, "etag", value="../../../x", file="config.json")
    hub.fault(REPO, "etag", file=LARGE_PATH)
    assert get(hub, resolve("config.json"), method="HEAD").headers["etag"] == '"../../../x"'
    assert get(hub, resolve(LARGE_PATH), method="HEAD").headers["x-linked-etag"] == f'"{"0" * 64}"'


@check("header")
def _header(hub: Hub) -> None:
    hub.fault(REPO, "header", value={"etag": None, "Content-Length": "5", "X-New": "new"})
    got = get(hub, resolve("config.json"), method="HEAD")
    assert "etag" not in got.headers
    assert (got.headers["content-length"], got.headers["x-new"]) == ("5", "new")


@check("commit")
def _commit(hub: Hub) -> None:
    hub.fault(REPO, "commit", value="../..")
    assert info(hub)["sha"] == "../.."
    assert get(hub, resolve("config.json"), method="HEAD").headers["x-repo-commit"] == "../.."
    hub.tag(REPO, "../..", hub.commit(REPO, {"config.json": SMALL}))
    assert get(hub, f"/{REPO}/resolve/..%2F../config.json").body == SMALL


@check("redirect")
def _redirect(hub: Hub) -> None:
    fault = hub.fault(REPO, "redirect")
    got = get(hub, resolve("config.json"))
    assert (got.status, got.headers["location"]) == (302, resolve("config.json"))
    hub.clear(fault)
    for target in ("file:///etc/passwd", "https://localhost:1/x", "http://127.0.0.1:1/x"):
        fault = hub.fault(REPO, "redirect", value=target, status=307)
        got = get(hub, resolve(LARGE_PATH), method="HEAD")
        assert (got.status, got.headers["location"]) == (307, target)
        assert got.headers["x-linked-size"] == str(LARGE.size)
        hub.clear(fault)


def entries(hub: Hub) -> tuple[Any, Any]:
    """What the metadata says of the LFS file, in both of its forms."""
    commit = info(hub)["sha"]
    tree = json.loads(get(hub, f"/api/models/{REPO}/tree/{commit}?recursive=True").body)
    return next(e for e in info(hub)["siblings"] if e["rfilename"] == LARGE_PATH), next(
        e for e in tree if e["path"] == LARGE_PATH
    )


@check("size")
def _size(hub: Hub) -> None:
    hub.fault(REPO, "size", value=3, file="*.safetensors")
    sibling, entry = entries(hub)
    assert sibling["size"] == sibling["lfs"]["size"] == entry["size"] == entry["lfs"]["size"] == 3
    assert info(hub)["siblings"][0]["size"] == len(SMALL)
    assert get(hub, resolve(LARGE_PATH)).headers["x-linked-size"] == "3"
    assert follow(hub).body == LARGE.read()


@check("oid")
def _oid(hub: Hub) -> None:
    hub.fault(REPO, "oid", value="../x", file="*.safetensors")
    sibling, entry = entries(hub)
    assert sibling["lfs"]["sha256"] == entry["lfs"]["oid"] == "../x"
    hub.fault(REPO, "oid", value="y", file="config.json")
    assert info(hub)["siblings"][0]["blobId"] == "y"


@check("strip")
def _strip(hub: Hub) -> None:
    hub.fault(REPO, "strip", value=["lfs.sha256", "blobId", "lfs.oid"], file="*.safetensors")
    sibling, entry = entries(hub)
    assert sibling.keys() == {"rfilename", "size", "lfs"}
    assert sibling["lfs"].keys() == entry["lfs"].keys() == {"size", "pointerSize"}


@check("sibling")
def _sibling(hub: Hub) -> None:
    hub.fault(REPO, "sibling", value={"rfilename": "../../x"}, file="*.safetensors")
    assert [entry["rfilename"] for entry in info(hub)["siblings"]] == ["config.json", "../../x"]


@check("patch")
def _patch(hub: Hub) -> None:
    hub.fault(REPO, "patch", value={"siblings": 5, "sha": None})
    assert (info(hub)["siblings"], info(hub)["sha"], info(hub)["id"]) == (5, None, REPO)


@check("json")
def _json(hub: Hub) -> None:
    hub.fault(REPO, "json", value=[1, "x"])
    assert info(hub) == [1, "x"]


@check("raw")
def _raw(hub: Hub) -> None:
    hub.fault(REPO, "raw", value=b"<html>\xff")
    assert get(hub, f"/api/models/{REPO}").body == b"<html>\xff"


@check("huge")
def _huge(hub: Hub) -> None:
    sha = info(hub)["sha"]
    hub.fault(REPO, "huge", value=10 << 20)
    got = get(hub, f"/api/models/{REPO}/revision/main")
    assert 10 << 20 <= len(got.body) + 200 < 11 << 20
    value = json.loads(got.body)
    assert (value["sha"], value["siblings"][-1]["rfilename"]) == (sha, "last.safetensors")


@check("moves")
def _moves(hub: Hub) -> None:
    old = info(hub)["sha"]
    new = hub.commit(REPO, {"config.json": b"new"}, branch="next")
    hub.fault(REPO, "moves", value=new, times=1)
    assert info(hub)["sha"] == old
    assert info(hub)["sha"] == new
    assert get(hub, resolve("config.json")).body == b"new"
    assert get(hub, resolve("config.json", old)).body == SMALL


@pytest.mark.parametrize("kind", sorted(hub_faults.KINDS))
def test_faults(hub: Hub, kind: str) -> None:
    CHECKS[kind](hub)


def test_faults_that_do_not_exist(hub: Hub) -> None:
    with pytest.raises(ValueError, match="no such fault"):
        hub.fault(REPO, "dorp")
    with pytest.raises(ValueError, match="no such place"):
        hub.fault(REPO, "drop", where=["bodies"])


def test_metadata_that_is_held_is_that_of_its_end(hub: Hub) -> None:
    hub.fault(REPO, "hold", where=["info"], times=1)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(info(hub)))
    thread.start()
    hub.wait_held(where="info")
    new = hub.commit(REPO, {"config.json": b"new"})
    hub.release()
    thread.join(60)
    assert got[0]["sha"] == new


def test_evil_names(hub: Hub) -> None:
    """The hub gives them all out, and their contents too."""
    commit = hub.commit(REPO, {name: repr(name).encode() for name in EVIL_NAMES}, lfs=("*.bin",))
    assert [entry["rfilename"] for entry in info(hub)["siblings"]] == sorted(EVIL_NAMES)
    for name in EVIL_NAMES:
        path = f"/{REPO}/resolve/{commit}/{quote(name, safe='')}"
        got = get(hub, path)
        if name.endswith(".bin"):
            location = urlsplit(got.headers["location"])
            got = get(hub, location.path, host="localhost")
        assert (name, got.body) == (name, repr(name).encode())


# --- speed, and waiting ---


def test_throttle_holds_for_all_together(hub: Hub) -> None:
    hub.throttle(200_000)
    commit = info(hub)["sha"]
    got: list[Got] = []
    began = time.monotonic()
    path = lfs_path(commit)
    threads = [threading.Thread(target=lambda: got.append(get(hub, path, Range="bytes=0-99999"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 0.8 < time.monotonic() - began < 30
    assert [answer.body for answer in got] == [LARGE.read(0, 100_000)] * 2


def test_pause(hub: Hub) -> None:
    hub.throttle(1_000_000)
    got: list[Got] = []
    thread = threading.Thread(target=lambda: got.append(follow(hub)))
    thread.start()
    hub.wait_bytes(LARGE_PATH, 100_000)
    hub.pause()
    hub.throttle(None)
    with pytest.raises(TimeoutError):
        hub.wait_requests(1, where="body", ended="*", timeout_s=0.3)
    assert hub.sent(LARGE_PATH) < LARGE.size
    hub.resume()
    thread.join(60)
    assert got[0].body == LARGE.read()


def test_waits_end(hub: Hub) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 bytes"):
        hub.wait_bytes(LARGE_PATH, 1, timeout_s=0.05)
    with pytest.raises(TimeoutError, match="0 of 2 requests"):
        hub.wait_requests(2, path="/api/*", timeout_s=0.05)
    get(hub, f"/api/models/{REPO}")
    get(hub, f"/api/models/{REPO}?blobs=True")
    assert [r.query for r in hub.wait_requests(2, path="/api/*")] == ["", "blobs=True"]
    hub.forget()
    assert hub.requests() == []


# --- the process ---


def test_nothing_is_left() -> None:
    threads = set(threading.enumerate())
    with Hub() as hub:
        process = psutil.Process(hub.pid)
        hub.commit(REPO, {LARGE_PATH: LARGE})
        hub.fault(REPO, "stall", after=10)
        with ask(hub, f"/{REPO}/resolve/main/{LARGE_PATH}"), ask(hub, "/nonsense"):
            hub.wait_requests(2)
    assert not process.is_running()
    assert set(threading.enumerate()) == threads
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", hub.port), timeout=60)


def test_it_dies_with_the_test_that_started_it() -> None:
    code = "import os; from support.hub import Hub; hub = Hub().__enter__(); print(hub.port, flush=True); os._exit(1)"
    # the hub has its parent's stderr: that this ends within the time says that both are gone
    parent = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, timeout=60
    )
    assert parent.returncode == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(parent.stdout)), timeout=60)


def test_what_is_not_http_is_let_go(hub: Hub) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\r\n", b"GET / HTTP/1.1\r\nno colon\r\n", b"\n"):
        with socket.create_connection(("127.0.0.1", hub.port), timeout=60) as sock:
            sock.sendall(junk)
            assert sock.recv(100) == b""
    assert get(hub, resolve("config.json")).body == SMALL
