"""What leaves the cache: exactly what was meant, what nothing else links, and never anything behind a link."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from mlxd.store import Store, remove
from mlxd.store.files import UnsafeFolder
from mlxd.store.layout import RepoCache
from mlxd_client.errors import ModelBusy, ModelNotFound
from support.hubcache import commit, download, model_files, oids, publish, sha256, tensors

A, B, C = commit("a"), commit("b"), commit("c")
OLD, NEW = model_files("o"), model_files("n")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def at(cache: Path) -> RepoCache:
    return RepoCache(cache, "org/m")


def models(cache: Path) -> list[str]:
    return [found.model for found in Store(env={"HF_HUB_CACHE": str(cache)}, builtin=cache / "none").scan()]


def size(files: dict[str, bytes]) -> int:
    return sum({oid: len(files[name]) for name, oid in oids(files).items()}.values())


def alone(files: dict[str, bytes], other: dict[str, bytes]) -> int:
    """Bytes of the files that the other model does not share."""
    shared = set(oids(other).values())
    return sum({oid: len(files[name]) for name, oid in oids(files).items() if oid not in shared}.values())


# --- models ---------------------------------------------------------------------------------------------------------


def test_the_only_model_leaves_nothing(cache: Path, at: RepoCache) -> None:
    publish(cache, "org/m", OLD, A, "main")
    publish(cache, "org/other", OLD, A, "main")
    for path in (at.folder / ".no_exist" / A / "x.json", at.folder / "trees" / f"{A}.json",
                 cache / ".locks" / at.folder.name / "x.lock", at.folder / ".DS_Store",
                 at.blobs / "x.incomplete"):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert remove.delete(cache, "org/m") == size(OLD)
    assert sorted(os.listdir(cache)) == [".locks", "models--org--other"]
    assert os.listdir(cache / ".locks") == []
    assert models(cache) == ["org/other"]
    assert not scan_cache_dir(cache).warnings
    assert remove.delete(cache, "org/m") == 0
    assert remove.delete(cache / "nowhere", "org/m") == 0


def test_what_another_revision_shares_stays(cache: Path, at: RepoCache) -> None:
    publish(cache, "org/m", OLD, A, "v1", "refs/pr/1")
    publish(cache, "org/m", NEW, B, "main")
    assert models(cache) == ["org/m", "org/m@refs/pr/1", "org/m@v1"]
    assert remove.delete(cache, "org/m") == alone(NEW, OLD) > 0
    assert models(cache) == ["org/m@refs/pr/1", "org/m@v1"]
    assert not scan_cache_dir(cache).warnings
    assert remove.delete(cache, "org/m", "refs/pr/1") == 0  # v1 is the same
    assert not (at.refs / "refs").exists()
    assert models(cache) == ["org/m@v1"]
    assert remove.delete(cache, "org/m", "v1") == size(OLD)
    assert os.listdir(cache) == []


def test_main_goes_and_a_pin_of_the_same_commit_stays(cache: Path) -> None:
    publish(cache, "org/m", OLD, A, "main", "v1")
    assert remove.delete(cache, "org/m") == 0
    assert models(cache) == ["org/m@v1"]


def test_main_is_also_what_no_ref_names(cache: Path) -> None:
    publish(cache, "org/m", OLD, A)
    publish(cache, "org/m", NEW, B, "main")
    publish(cache, "org/m", model_files("p"), C, "v1")
    remove.delete(cache, "org/m")
    assert models(cache) == ["org/m@v1"]
    assert not scan_cache_dir(cache).warnings


def test_a_model_without_any_ref(cache: Path) -> None:
    publish(cache, "org/m", OLD, A)
    assert models(cache) == ["org/m"]
    assert remove.delete(cache, "org/m") == size(OLD)
    assert models(cache) == []


def test_a_commit_is_deleted_unless_it_is_another_model_too(cache: Path) -> None:
    publish(cache, "org/m", OLD, A, "main")
    publish(cache, "org/m", NEW, B, B)
    with pytest.raises(ModelBusy, match=r"is what org/m is"):
        remove.delete(cache, "org/m", A)
    assert remove.delete(cache, "org/m", B) == alone(NEW, OLD)
    assert remove.delete(cache, "org/m", C) == 0
    assert models(cache) == ["org/m"]


def test_refs_that_no_model_can_be_named_by_hold_their_snapshots(cache: Path, at: RepoCache) -> None:
    publish(cache, "org/m", OLD, A, "main")
    publish(cache, "org/m", NEW, B, "main")
    (at.refs / "feature@x y").write_text(A)
    remove.delete(cache, "org/m")
    assert os.listdir(at.snapshots) == [A]
    assert models(cache) == []
    assert not scan_cache_dir(cache).warnings


def test_what_cannot_be_known_is_not_deleted(cache: Path, at: RepoCache, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(cache, "org/m", OLD, A, "main", "v1")
    (at.refs / "v2").symlink_to("v2")  # cannot be opened: it could name anything
    with pytest.raises(OSError):
        remove.delete(cache, "org/m")
    assert models(cache) == ["org/m", "org/m@v1"]


@pytest.mark.parametrize(("repo", "revision"), [("..", "main"), ("a/b/c", "main"), ("org/m", "../x"), ("org/m", "")])
def test_names_that_lead_elsewhere(cache: Path, repo: str, revision: str) -> None:
    publish(cache, "org/m", OLD, A, "main")
    with pytest.raises(ModelNotFound):
        remove.delete(cache, repo, revision)
    assert models(cache) == ["org/m"]


def test_replaced_revisions_are_pruned(cache: Path, at: RepoCache) -> None:
    publish(cache, "org/m", OLD, A, "main")
    publish(cache, "org/m", NEW, B, "main")
    publish(cache, "org/m", model_files("p"), C, "v1")
    assert remove.prune(cache, "org/m", [A, B, C, "../x", "", commit("d")]) == alone(OLD, NEW)
    assert sorted(os.listdir(at.snapshots)) == [B, C]
    assert models(cache) == ["org/m", "org/m@v1"]
    assert remove.prune(cache, "org/none", [A]) == 0


def test_a_copied_cache_without_links(cache: Path, at: RepoCache) -> None:
    at.prepare()
    (at.snapshots / A).mkdir()
    for name, data in OLD.items():
        (at.snapshots / A / name).write_bytes(data)
    assert models(cache) == ["org/m"]
    assert remove.delete(cache, "org/m") == sum(map(len, OLD.values()))
    assert os.listdir(cache) == []


def test_a_folder_with_something_of_the_users_stays(cache: Path, at: RepoCache) -> None:
    publish(cache, "org/m", OLD, A, "main")
    (at.folder / "notes.txt").write_text("mine")
    remove.delete(cache, "org/m")
    assert (at.folder / "notes.txt").read_text() == "mine"
    assert models(cache) == []
    assert not scan_cache_dir(cache).warnings


# --- hostile links --------------------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "main", "sub/x", oids(OLD)["config.json"]):
        (folder / name).write_text(A)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("linked", ["snapshot", "blob", "ref", "file", "part", "trash", "trashed", "trees", "nested"])
def test_links_are_unlinked_and_not_followed(cache: Path, at: RepoCache, outside: Path, linked: str) -> None:
    snapshot = publish(cache, "org/m", OLD, A, "main")
    trash = at.folder / remove.TRASH
    if linked == "trashed":
        trash.mkdir()
    place, target = {
        "snapshot": (at.snapshots / B, outside), "trash": (trash, outside), "trashed": (trash / B, outside),
        "blob": (at.blob(oids(OLD)["config.json"]), outside / "config.json"),
        "ref": (at.refs / "main", outside / "main"),
        "file": (snapshot / "config.json", outside / "config.json"), "nested": (snapshot / "sub", outside / "sub"),
        "part": (at.part("1" * 40), outside / "main"), "trees": (at.folder / "trees", outside),
    }[linked]  # fmt: skip
    place.unlink(missing_ok=True)
    place.symlink_to(target)
    before = contents(outside)
    remove.delete(cache, "org/m")
    remove.finish(cache)
    assert contents(outside) == before
    assert models(cache) == []
    assert not at.folder.exists()


@pytest.mark.parametrize("linked", ["", "blobs", "snapshots", "refs", "refs/x"])
def test_linked_folders_are_refused(cache: Path, at: RepoCache, tmp_path: Path, linked: str) -> None:
    publish(cache, "org/m", OLD, A, "main", "x/y")
    place = at.folder / linked
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    for revision in ("main", "x/y"):
        with pytest.raises(UnsafeFolder):
            remove.delete(cache, "org/m", revision)
    remove.finish(cache)
    assert contents(tmp_path / "elsewhere") == before


def test_links_that_name_a_blob_by_a_way_around(cache: Path, at: RepoCache, outside: Path) -> None:
    snapshot = publish(cache, "org/m", OLD, A, "main")
    (outside / "blobs").mkdir()
    (outside / "blobs" / "x").write_text("kept")
    for number, target in enumerate((f"{outside}/blobs/x", "../../blobs/..", "blobs/", "../../../../outside/blobs/x")):
        (snapshot / f"link{number}").symlink_to(target)
    before = contents(outside)
    remove.delete(cache, "org/m")
    assert contents(outside) == before
    assert not at.folder.exists()


# --- what others work on --------------------------------------------------------------------------------------------


def hold(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_while_another_program_downloads_nothing_is_deleted(cache: Path, at: RepoCache) -> None:
    from huggingface_hub.utils import WeakFileLock

    publish(cache, "org/m", OLD, A, "main")
    lock = cache / ".locks" / at.folder.name / f"{oids(NEW)['config.json']}.lock"
    lock.parent.mkdir(parents=True)
    with WeakFileLock(lock):
        with pytest.raises(ModelBusy, match="another program"):
            remove.delete(cache, "org/m")
        with pytest.raises(ModelBusy, match="another program"):
            remove.prune(cache, "org/m", [A])
        (at.folder / remove.TRASH).mkdir()
        (at.snapshots / A).rename(at.folder / remove.TRASH / A)
        assert remove.finish(cache) == 0
        assert (at.refs / "main").exists()
    assert remove.finish(cache) == size(OLD)
    assert not at.folder.exists()


def test_finishing_leaves_other_downloads_alone(cache: Path, at: RepoCache) -> None:
    publish(cache, "org/m", OLD, A, "main")
    named = download(at, NEW)  # a download of another revision, that has not got to its snapshot yet
    fd = at.open_part("1" * 64)
    assert fd is not None
    (at.blobs / "orphan").write_bytes(b"x")
    (at.folder / remove.TRASH).mkdir()
    (at.snapshots / A).rename(at.folder / remove.TRASH / A)
    shared = set(oids(OLD).values()) & set(named.values())
    assert remove.finish(cache) == size(OLD)
    kept = {path.name for path in at.blobs.iterdir() if not path.name.endswith(".mlxd-new")}
    assert kept == (set(named.values()) - shared) | {"orphan", at.part("1" * 64).name}
    os.close(fd)


def test_parts_are_discarded_unless_somebody_holds_them(cache: Path, at: RepoCache) -> None:
    for oid in ("1" * 64, "2" * 64, "3" * 64):
        fd = at.open_part(oid)
        assert fd is not None
        os.write(fd, b"x" * 8192)
        at.part_map(oid).write_bytes(b"\1")
        os.close(fd)
    at.part_map("4" * 64).write_bytes(b"\1")
    named = download(at, {"model.safetensors": tensors(b"x")})
    fd = at.open_part("2" * 64)
    assert fd is not None
    assert remove.discard(cache, "org/m", ["1" * 64, "2" * 64]) == 8192
    assert not at.part("1" * 64).exists()
    assert at.part("3" * 64).exists()
    assert remove.discard(cache, "org/m") == 8192
    assert sorted(path.name[0] for path in at.blobs.glob("*.mlxd-part")) == ["2"]
    assert at.part_map("2" * 64).exists()
    assert not at.part_map("4" * 64).exists()
    assert at.blob(named["model.safetensors"]).exists()  # whoever holds the part may count on it
    os.close(fd)
    assert remove.discard(cache, "org/m") == 8192 + len(tensors(b"x"))
    assert os.listdir(cache) == []


def test_discarding_leaves_what_a_snapshot_links_and_what_others_put_there(cache: Path, at: RepoCache) -> None:
    snapshot = publish(cache, "org/m", OLD, A, "main")
    at.new(oids(OLD)["config.json"]).touch()  # as after a kill just before the end of publishing
    (at.blobs / ("5" * 64)).write_bytes(b"by another program")
    assert remove.discard(cache, "org/m") == 0
    assert models(cache) == ["org/m"]
    assert (snapshot / "config.json").exists()
    assert (at.blobs / ("5" * 64)).exists()
    assert not at.has_partial()


def test_a_part_with_holes_counts_with_what_it_takes(cache: Path, at: RepoCache) -> None:
    fd = at.open_part("1" * 64)
    assert fd is not None
    os.truncate(fd, 60 * 2**30)
    os.close(fd)
    assert remove.discard(cache, "org/m") < 2**20


def test_deleting_discards_what_downloads_have_left(cache: Path, at: RepoCache) -> None:
    publish(cache, "org/m", OLD, A, "v1")
    fd = at.open_part("1" * 64)
    assert fd is not None
    os.write(fd, b"x" * 8192)
    os.close(fd)
    assert remove.delete(cache, "org/m") == 8192
    assert models(cache) == ["org/m@v1"]


# --- the store that repositories share ------------------------------------------------------------------------------


def test_the_shared_store_is_swept_by_its_own_rules(cache: Path) -> None:
    from huggingface_hub.utils import _shared_blobs as theirs

    name = "model-00002-of-00002.safetensors"  # the same bytes in both
    data, xet = OLD[name], "d" * 64
    for repo in ("org/m", "org/n"):
        publish(cache, repo, OLD, A, "main")
        assert theirs.publish_blob_to_shared_store(
            blob_path=str(RepoCache(cache, repo).blob(sha256(data))), xet_hash=xet, cache_dir=cache,
            expected_size=len(data),
        )  # fmt: skip
    stored = theirs.shared_blob_path(cache, xet)
    assert models(cache) == ["org/m", "org/n"]
    assert remove.delete(cache, "org/m") == size(OLD) - len(data)
    assert stored.exists()
    assert models(cache) == ["org/n"]
    assert remove.delete(cache, "org/n") == size(OLD)
    assert not stored.exists()
    assert not theirs.shared_blob_manifest_path(cache, xet).exists()
    assert not scan_cache_dir(cache).warnings


def test_without_a_list_a_shared_file_stays(cache: Path) -> None:
    from huggingface_hub.utils import _shared_blobs as theirs

    name = "model-00001-of-00002.safetensors"
    publish(cache, "org/m", OLD, A, "main")
    assert theirs.publish_blob_to_shared_store(
        blob_path=str(RepoCache(cache, "org/m").blob(sha256(OLD[name]))), xet_hash="d" * 64, cache_dir=cache,
        expected_size=len(OLD[name]),
    )  # fmt: skip
    theirs.shared_blob_manifest_path(cache, "d" * 64).unlink()
    assert remove.delete(cache, "org/m") == size(OLD) - len(OLD[name])
    assert theirs.shared_blob_path(cache, "d" * 64).exists()
