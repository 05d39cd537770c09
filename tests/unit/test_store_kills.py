"""Killed before any of its steps, publishing or deleting leaves no model that claims to be whole and is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir
from huggingface_hub.utils import _shared_blobs

from mlxd.store import Store, remove
from mlxd.store.layout import BlobsMissing, RepoCache
from mlxd.store.verify import verify_snapshot
from mlxd_client.errors import ModelInvalid, ModelNotFound
from support.hubcache import commit, dies_at, download, in_a_process, model_files, oids, publish, sha256

A, B, C = commit("a"), commit("b"), commit("c")
FILES = {A: model_files("o"), B: model_files("n") | {"sub/x.json": b"{}"}, C: model_files("p")}
MODELS = ("org/m", "org/m@v1", "org/m@team/v2", f"org/m@{A}", f"org/m@{B}")
MOST_STEPS = 200
UNDER_WAY = (".mlxd-new", ".mlxd-trash")


def claims(cache: Path) -> dict[str, str]:
    """Which models the store finds, with their commits. All of them have to be whole."""
    store = Store(env={"HF_HUB_CACHE": str(cache)}, builtin=cache / "none")
    found = {}
    for model in MODELS:
        try:
            one = store.resolve(model)
        except ModelNotFound:
            continue
        except ModelInvalid as error:
            raise AssertionError(f"{model} is neither whole nor gone: {error}") from error
        assert one.revision is not None
        for name, data in FILES[one.revision].items():
            assert Path(one.path, name).read_bytes() == data, f"{model} claims to be whole without {name}"
        assert verify_snapshot(Path(one.path)) == []
        found[model] = one.revision
    return found


def each_step(
    tmp_path: Path, prepare: Callable[[Path], object], work: Callable[[Path], object], check: Callable[[Path], None]
) -> int:
    """Kill `work` before its first step, its second and so on until it gets through; `check` what is left each time."""
    prepare(tmp_path / "start")
    for step in range(1, MOST_STEPS):
        cache = tmp_path / f"kill{step}"
        shutil.copytree(tmp_path / "start", cache, symlinks=True)
        killed = dies_at(step, lambda cache=cache: work(cache))  # type: ignore[misc]
        check(cache)
        shutil.rmtree(cache)
        if not killed:
            return step
    raise AssertionError("it does not end")


def no_warnings(cache: Path) -> None:
    assert not scan_cache_dir(cache).warnings


# --- publishing -----------------------------------------------------------------------------------------------------


def begin(cache: Path) -> None:
    """What another program has left of the snapshot: config.json and a tokenizer, and one of the two shards."""
    at = RepoCache(cache, "org/m")
    named = download(at, FILES[B])
    (at.snapshots / B).mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"):
        (at.snapshots / B / name).symlink_to(f"../../blobs/{named[name]}")


def stale(cache: Path) -> None:
    """A whole snapshot but for one link, which leads to other bytes than it should."""
    publish(cache, "org/m", FILES[B] | {"tokenizer_config.json": b"[1]"}, B)
    download(RepoCache(cache, "org/m"), FILES[B])


@pytest.mark.parametrize(
    "state", [lambda cache: None, begin, lambda cache: publish(cache, "org/m", FILES[A], A, "main")]
)
def test_publishing(tmp_path: Path, state: Callable[[Path], object]) -> None:
    at = RepoCache(tmp_path / "start", "org/m")

    def prepare(cache: Path) -> None:
        download(RepoCache(cache, "org/m"), FILES[B])
        state(cache)

    def work(cache: Path) -> None:
        RepoCache(cache, "org/m").publish(B, oids(FILES[B]), refs=["main", "team/v2"])

    def check(cache: Path) -> None:
        found = claims(cache)
        assert found.get("org/m") in (None, A, B)
        assert found.get("org/m@team/v2") in (None, B)
        remove.finish(cache)
        assert claims(cache) == found
        no_warnings(cache)
        work(cache)
        assert claims(cache)["org/m"] == claims(cache)["org/m@team/v2"] == B
        no_warnings(cache)
        assert [path.name for path in (cache / at.folder.name).iterdir() if path.name.startswith(UNDER_WAY)] == []

    assert each_step(tmp_path, prepare, work, check) > 5


def test_publishing_over_what_is_wrong(tmp_path: Path) -> None:
    """Until the wrong link is replaced, nothing can tell; from the first step on, the snapshot is incomplete."""

    def work(cache: Path) -> None:
        RepoCache(cache, "org/m").publish(B, oids(FILES[B]), refs=["main"])

    def check(cache: Path) -> None:
        at = RepoCache(cache, "org/m")
        if (at.snapshots / B / "tokenizer_config.json").read_bytes() == FILES[B]["tokenizer_config.json"]:
            claims(cache)
        else:
            assert not (at.refs / "main").exists()
        work(cache)
        assert claims(cache)["org/m"] == B

    assert each_step(tmp_path, stale, work, check) > 5


def test_downloading(tmp_path: Path) -> None:
    def work(cache: Path) -> None:
        publish(cache, "org/m", FILES[B], B, "main")

    def check(cache: Path) -> None:
        found = claims(cache)
        if not found and cache.is_dir():
            discarded = shutil.copytree(cache, cache.with_name("discarded"), symlinks=True)
            remove.discard(discarded, "org/m")
            remove.finish(discarded)
            assert os.listdir(discarded) == []
            shutil.rmtree(discarded)
        work(cache)
        assert claims(cache) == {"org/m": B, f"org/m@{B}": B}
        assert not RepoCache(cache, "org/m").has_partial()
        no_warnings(cache)

    assert each_step(tmp_path, Path.mkdir, work, check) > 30


# --- deleting -------------------------------------------------------------------------------------------------------


def three(cache: Path) -> None:
    """main is B; A was main before; v1 and team/v2 are C. All share a shard. A part of a download lies there, too."""
    publish(cache, "org/m", FILES[A], A, "main")
    publish(cache, "org/m", FILES[B], B, "main")
    publish(cache, "org/m", FILES[C], C, "v1", "team/v2")
    at = RepoCache(cache, "org/m")
    fd = at.open_part("1" * 64)
    assert fd is not None
    os.close(fd)
    (at.folder / "trees").mkdir()
    (at.folder / "trees" / f"{B}.json").touch()


def shared(cache: Path) -> None:
    """One model, one of whose files is in the store that huggingface_hub shares between repositories."""
    publish(cache, "org/m", FILES[B], B, "main")
    data = FILES[B]["model-00001-of-00002.safetensors"]
    blob = RepoCache(cache, "org/m").blob(sha256(data))
    assert _shared_blobs.publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash="d" * 64, cache_dir=cache, expected_size=len(data)
    )


@pytest.mark.parametrize(
    ("state", "revision", "left"),
    [
        (three, "main", {"org/m@v1": C, "org/m@team/v2": C}),
        (three, "team/v2", {"org/m": B, "org/m@v1": C, f"org/m@{A}": A, f"org/m@{B}": B}),
        (lambda cache: publish(cache, "org/m", FILES[A], A, "main", "team/v2"), "team/v2",
         {"org/m": A, f"org/m@{A}": A}),
        (lambda cache: publish(cache, "org/m", FILES[B], B, "team/v2"), "team/v2", {}),
        (lambda cache: publish(cache, "org/m", FILES[B], B, "main"), "main", {}),
        (shared, "main", {}),
    ],
)  # fmt: skip
def test_deleting(tmp_path: Path, state: Callable[[Path], object], revision: str, left: dict[str, str]) -> None:
    model = "org/m" if revision == "main" else f"org/m@{revision}"

    def work(cache: Path) -> None:
        remove.delete(cache, "org/m", revision)

    def check(cache: Path) -> None:
        found = claims(cache)
        assert left.items() <= found.items()
        assert found.get(model) in (None, claims(tmp_path / "start")[model])
        remove.finish(cache)
        found = claims(cache)
        assert left.items() <= found.items()
        no_warnings(cache)
        work(cache)
        assert claims(cache) == left
        assert model not in left
        no_warnings(cache)
        names = set(os.listdir(cache)) - {"blobs", ".locks"}
        assert names == ({"models--org--m"} if left else set())
        assert not [path for path in cache.glob("blobs/*/*") if path.suffix != ".lock"]
        assert not [path for path in cache.glob("*/.mlxd*") if path.name.startswith(UNDER_WAY)]
        if left:
            linked = {
                os.path.basename(os.readlink(path)) for path in cache.glob("*/snapshots/*/**/*") if path.is_symlink()
            }
            assert set(os.listdir(cache / "models--org--m" / "blobs")) == linked

    assert each_step(tmp_path, state, work, check) > 1


def test_deleting_then_downloading_again(tmp_path: Path) -> None:
    """A download of the same revision does not mind what a killed delete has left, nor does finishing that harm it."""

    def check(cache: Path) -> None:
        publish(cache, "org/m", FILES[B], B, "main")
        assert claims(cache)["org/m"] == B
        remove.finish(cache)
        assert claims(cache)["org/m"] == B
        no_warnings(cache)

    each_step(tmp_path, three, lambda cache: remove.delete(cache, "org/m"), check)


def test_pruning(tmp_path: Path) -> None:
    def work(cache: Path) -> None:
        remove.prune(cache, "org/m", [A])

    def check(cache: Path) -> None:
        found = claims(cache)
        assert (found["org/m"], found["org/m@v1"]) == (B, C)
        remove.finish(cache)
        work(cache)
        found = claims(cache)
        assert (found["org/m"], found["org/m@v1"], found.get(f"org/m@{A}")) == (B, C, None)
        no_warnings(cache)

    assert each_step(tmp_path, three, work, check) > 5


def test_finishing_can_be_killed_as_well(tmp_path: Path) -> None:
    def state(cache: Path) -> None:
        three(cache)
        at = RepoCache(cache, "org/m")
        (at.folder / remove.TRASH).mkdir()
        (at.snapshots / B).rename(at.folder / remove.TRASH / B)

    def check(cache: Path) -> None:
        assert claims(cache)["org/m@v1"] == C
        remove.finish(cache)
        assert claims(cache)["org/m@v1"] == C
        no_warnings(cache)
        assert not [path for path in cache.glob("*/.mlxd*") if path.name.startswith(UNDER_WAY)]

    assert each_step(tmp_path, state, remove.finish, check) > 5


# --- both at once ---------------------------------------------------------------------------------------------------


def test_publishing_and_deleting_at_once(tmp_path: Path) -> None:
    """Two processes, one that downloads and one that deletes: whoever comes last is right, and nobody fails."""
    rounds = 60

    def downloads() -> None:
        for number in range(rounds):
            files = FILES[(A, B)[number % 2]]
            while True:
                try:
                    publish(tmp_path, "org/m", files, (A, B)[number % 2], "main", "v1")
                    break
                except BlobsMissing:
                    continue

    def deletes() -> None:
        for number in range(rounds):
            remove.delete(tmp_path, "org/m", ("main", "v1")[number % 2])
            remove.finish(tmp_path)

    children = [in_a_process(work) for work in (downloads, deletes)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    claims(tmp_path)
    downloads()
    assert claims(tmp_path)["org/m"] == claims(tmp_path)["org/m@v1"] == B
    no_warnings(tmp_path)
