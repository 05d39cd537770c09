"""The cache's writing side: what is published is an ordinary Hugging Face cache, and nothing leads out of it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache
from hypothesis import given
from hypothesis import strategies as st

from mlxd.store import Store, hub, layout
from mlxd.store.files import remove_tree, try_lock
from mlxd.store.layout import BlobsMissing, RepoCache, UnsafeFolder, UnsafeName, disk_free
from mlxd_client.errors import ModelBusy, ModelNotFound
from support.hubcache import commit, download, git_oid, model_files, oids, publish, sha256, tensors

A, B = commit("a"), commit("b")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def at(cache: Path) -> RepoCache:
    return RepoCache(cache, "org/m")


def store(cache: Path) -> Store:
    return Store(env={"HF_HUB_CACHE": str(cache)}, builtin=cache / "none")


# --- what other programs make of it ---------------------------------------------------------------------------------


def test_what_was_published_is_what_huggingface_hub_finds(cache: Path) -> None:
    files = model_files() | {"sub/deep/x.json": b"{}"}
    snapshot = publish(cache, "org/m", files, A, "main", "refs/pr/1")
    assert snapshot_download("org/m", cache_dir=cache, local_files_only=True) == str(snapshot)
    assert snapshot_download("org/m", revision="refs/pr/1", cache_dir=cache, local_files_only=True) == str(snapshot)
    for name, data in files.items():
        found = try_to_load_from_cache("org/m", name, cache_dir=cache)
        assert isinstance(found, str)
        assert Path(found).read_bytes() == data
        assert os.readlink(found) == os.path.relpath(cache / "models--org--m" / "blobs" / oids(files)[name],
                                                     os.path.dirname(found))  # fmt: skip
    scan = scan_cache_dir(cache)
    assert not scan.warnings
    [repo] = scan.repos
    [revision] = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == ("org/m", A, {"main", "refs/pr/1"})
    assert revision.size_on_disk == sum({oids(files)[name]: len(data) for name, data in files.items()}.values())
    scan.delete_revisions(A).execute()
    with pytest.raises(ModelNotFound):
        store(cache).resolve("org/m")


def test_parts_disturb_no_scan(cache: Path, at: RepoCache) -> None:
    fd = at.open_part("c" * 64)
    assert fd is not None
    at.part_map("c" * 64).write_bytes(b"\0")
    assert not scan_cache_dir(cache).warnings
    assert store(cache).partial("org/m")
    assert not store(cache).partial("org/other")
    with pytest.raises(ModelNotFound):
        store(cache).resolve("org/m")
    os.close(fd)


def test_a_snapshot_that_another_program_has_begun_is_completed(cache: Path, at: RepoCache) -> None:
    files = model_files()
    named = download(at, files)
    snapshot = at.snapshots / A
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/" + "0" * 40)  # leads nowhere
    (snapshot / "README.md").write_text("kept")
    at.publish(A, named, refs=["main"])
    assert store(cache).resolve("org/m").path == str(snapshot)
    assert (snapshot / "README.md").read_text() == "kept"
    assert (snapshot / "config.json").read_bytes() == files["config.json"]
    before = {path.name: path.lstat().st_ino for path in snapshot.iterdir()}
    at.publish(A, named, refs=["main"])  # nothing to do: running readers see nothing of it
    assert {path.name: path.lstat().st_ino for path in snapshot.iterdir()} == before


def test_blobs_of_the_shared_store_count(cache: Path, at: RepoCache) -> None:
    from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

    files = model_files()
    snapshot = publish(cache, "org/m", files, A, "main")
    data = files["model-00001-of-00002.safetensors"]
    blob = at.blob(sha256(data))
    assert publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash="d" * 64, cache_dir=cache, expected_size=len(data)
    )
    assert blob.is_symlink()
    assert at.has_blob(blob.name, len(data))
    assert not at.has_blob(blob.name, len(data) + 1)
    assert store(cache).resolve("org/m").path == str(snapshot)
    at.publish(B, oids(files), refs=["other"])
    assert store(cache).resolve("org/m@other").revision == B


# --- refusals -------------------------------------------------------------------------------------------------------

HOSTILE = ["", ".", "..", "../x", "a/../../x", "/etc/x", "a//b", "a/", "/a", ".git", "a\\b", "a\0b", "a\nb", "x" * 500,
           "a b", "~", "config.json/../../x", "ü", "..config", "a/.b", "C:x"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_from_a_server_becomes_a_path(cache: Path, at: RepoCache, name: str) -> None:
    good = model_files()
    named = download(at, good)
    before = sorted(str(path) for path in cache.rglob("*"))
    with pytest.raises(UnsafeName):
        at.publish(A, named | {name: named["config.json"]}, refs=["main"])
    with pytest.raises(UnsafeName):
        at.publish(A, named | {"x.json": name}, refs=["main"])
    with pytest.raises(UnsafeName):
        at.publish(name, named, refs=["main"])
    with pytest.raises(UnsafeName):
        at.open_part(name)
    if name != "x" * 500:
        assert not hub.is_revision(name)
    with pytest.raises(UnsafeName):
        at.publish(A, named, refs=["main", name])
    assert sorted(str(path) for path in cache.rglob("*")) == before


@pytest.mark.parametrize("names", [("a.json", "A.json"), ("a.json", "a.json/b"), ("x/y", "X/Y/z")])
def test_names_that_cannot_be_beside_each_other(at: RepoCache, names: tuple[str, str]) -> None:
    oid = download(at, {"a": b"1"})["a"]
    with pytest.raises(UnsafeName):
        at.publish(A, dict.fromkeys(names, oid), refs=[])
    assert not (at.snapshots / A).exists()


@given(st.text(max_size=30) | st.text(alphabet="ab./-_~\\@MAINmain", max_size=12))
def test_what_passes_as_a_name_stays_below(text: str) -> None:
    for passes in (hub.is_revision, hub.is_file_name):
        if passes(text):
            path = os.path.normpath(f"/r/{text}")
            assert path == f"/r/{text}"
            assert text.isascii()
            assert text.isprintable()
    assert not hub.is_revision(text) or text == "main" or text.lower() != "main"


@pytest.mark.parametrize("linked", ["", "blobs", "snapshots", "refs", f"snapshots/{A}", "refs/x", f"snapshots/{A}/sub"])
def test_no_link_leads_writes_out(cache: Path, at: RepoCache, tmp_path: Path, linked: str) -> None:
    named = download(at, {"config.json": b"{}", "sub/x.json": b"{}"})
    outside = tmp_path / "outside"
    place = at.folder / linked
    if place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
        place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside)
    before = sorted(str(path) for path in outside.rglob("*"))
    with pytest.raises(UnsafeFolder):
        at.publish(A, named, refs=["x/y"])
    if linked in ("", "blobs"):
        with pytest.raises(UnsafeFolder):
            at.open_part("1" * 40)
    assert sorted(str(path) for path in outside.rglob("*")) == before


def test_a_ref_that_is_a_link_is_replaced_not_written_through(cache: Path, at: RepoCache, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    at.prepare()
    at.refs.mkdir()
    (at.refs / "main").symlink_to(tmp_path / "precious")
    publish(cache, "org/m", model_files(), A, "main")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (at.refs / "main").read_text() == A
    assert not (at.refs / "main").is_symlink()


def test_a_part_that_is_a_link_is_replaced_not_written_through(at: RepoCache, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    at.prepare()
    at.part("1" * 40).symlink_to(tmp_path / "precious")
    os.mkfifo(at.part("2" * 40))
    for oid in ("1" * 40, "2" * 40):
        fd = at.open_part(oid)
        assert fd is not None
        os.write(fd, b"new")
        os.close(fd)
        assert at.part(oid).read_bytes() == b"new"
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_snapshot_of_files_that_are_not_there_is_refused(cache: Path, at: RepoCache, tmp_path: Path) -> None:
    files = model_files()
    named = download(at, files)
    at.blob(named["tokenizer.json"]).unlink()
    with pytest.raises(BlobsMissing) as caught:
        at.publish(A, named, refs=["main"])
    assert caught.value.details["files"] == ["tokenizer.json"]
    (tmp_path / "elsewhere").write_bytes(b"{}")
    at.blob(named["tokenizer.json"]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BlobsMissing):
        at.publish(A, named, refs=["main"])
    assert not at.has_blob(named["tokenizer.json"], 2)
    assert not at.refs.exists()
    assert os.listdir(at.snapshots) == []


# --- several at a time ----------------------------------------------------------------------------------------------


def test_a_part_has_one_writer(at: RepoCache) -> None:
    first = at.open_part("1" * 40)
    assert first is not None
    assert at.open_part("1" * 40) is None
    os.write(first, b"half")
    os.close(first)
    second = at.open_part("1" * 40)
    assert second is not None
    assert os.read(second, 10) == b"half"
    os.close(second)


def test_a_lock_on_what_was_just_removed_counts_for_nothing(at: RepoCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who held the lock removes the file, or the folder, between our opening it and the lock being ours."""

    def removing(path: Path) -> None:
        remove_tree(path)
        monkeypatch.setattr(layout, "try_lock", try_lock)

    at.prepare()
    monkeypatch.setattr(layout, "try_lock", lambda fd: (removing(at.part("1" * 40)), try_lock(fd))[1])
    fd = at.open_part("1" * 40)
    assert fd is not None
    assert os.path.samestat(os.fstat(fd), at.part("1" * 40).stat())
    os.close(fd)
    monkeypatch.setattr(layout, "try_lock", lambda fd: (removing(at.folder), try_lock(fd))[1])
    with pytest.raises(FileNotFoundError), at.locked():
        pass


def test_publishing_waits_for_the_lock_and_not_for_ever(at: RepoCache) -> None:
    named = download(at, model_files())
    fd = os.open(at.folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ModelBusy), at.locked(0):
        pass
    publishing = threading.Thread(target=at.publish, args=(A, named), kwargs={"refs": ["main"]})
    publishing.start()
    assert not (at.snapshots / A).exists()
    os.close(fd)
    publishing.join(10)
    assert (at.snapshots / A).is_dir()


def test_what_was_downloaded_is_told_from_what_was_there(at: RepoCache) -> None:
    data = tensors(b"x")
    named = download(at, {"model.safetensors": data})
    assert at.new(sha256(data)).exists()
    assert at.has_partial()
    at.publish(A, named, refs=[])
    assert not at.has_partial()
    assert sorted(path.name for path in at.blobs.iterdir()) == [sha256(data)]


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = disk_free(tmp_path / "a" / "b" / "hub")
    assert abs(free - status.f_bavail * status.f_frsize) < 2**32
    assert free > 0


def test_the_oids_of_the_helpers_are_those_of_git() -> None:
    assert (
        git_oid(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    )  # printf 'hello\n' | git hash-object --stdin
    assert json.loads(model_files()["config.json"])["salt"] == ""
