"""Names of models of the hub: a repository, or one of its revisions as a model of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.store import Store, hub
from mlxd.store.folder import estimate, examine
from mlxd.store.layout import RepoCache
from mlxd_client.errors import ModelInvalid, ModelNotFound
from support.hubcache import CONFIG, commit, model_files, publish

A, B, C = commit("a"), commit("b"), commit("c")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def store(cache: Path) -> Store:
    aliases = {"old": "org/m@v1", "new": "org/m", "here": "/tmp", "own": "mlxd/cleanup", "odd": "a b"}
    return Store(aliases, env={"HF_HUB_CACHE": str(cache)}, builtin=cache / "none")


def names(store: Store) -> list[str]:
    return [found.model for found in store.scan()]


def test_each_pinned_revision_is_a_model(store: Store, cache: Path) -> None:
    publish(cache, "org/m", model_files("o"), A, "v1", "feature/x")
    newest = publish(cache, "org/m", model_files("n"), B, "main", "v2")
    assert names(store) == ["org/m", "org/m@feature/x", "org/m@v1", "org/m@v2"]
    found = store.resolve("org/m")
    assert (found.model, found.source, found.revision, found.path) == ("org/m", "hub", B, str(newest))
    assert store.resolve("org/m@main") == found
    assert store.resolve("new") == found
    assert store.resolve("old").model == "org/m@v1"
    assert store.resolve("org/m@feature/x").revision == store.resolve("org/m@v1").revision == A
    for full in (A, B):
        assert (store.resolve(f"org/m@{full}").model, store.resolve(f"org/m@{full}").revision) == (
            f"org/m@{full}",
            full,
        )
    for unknown in ("org/m@v3", f"org/m@{C}", "org/m@aaaaaaa", "org/m@feature", "org/n@v1"):
        with pytest.raises(ModelNotFound):
            store.resolve(unknown)


def test_without_main_the_newest_that_no_other_ref_names(store: Store, cache: Path) -> None:
    publish(cache, "org/m", model_files("o"), A, "v1")
    with pytest.raises(ModelNotFound, match=r"did you mean org/m@v1"):
        store.resolve("org/m")
    second = publish(cache, "org/m", model_files("n"), B)
    third = publish(cache, "org/m", model_files("p"), C)
    os.utime(second, (2**30, 2**30))
    os.utime(third, (2**29, 2**29))
    os.utime(cache / "models--org--m" / "snapshots" / A, (2**31, 2**31))
    assert store.resolve("org/m").revision == B
    assert names(store) == ["org/m", "org/m@v1"]


def test_what_is_not_whole_is_not_listed(store: Store, cache: Path) -> None:
    publish(cache, "org/m", model_files("o"), A, "main")
    snapshot = publish(cache, "org/m", model_files("n"), B, "v1")
    (snapshot / "tokenizer_config.json").resolve().unlink()  # shared, and the link is all that is left of it
    for model in ("org/m", "org/m@v1"):
        with pytest.raises(ModelNotFound, match=r"not complete: tokenizer_config.json is missing"):
            store.resolve(model)
    assert names(store) == []
    (cache / "models--org--m" / "refs" / "gone").write_text(C)
    assert names(store) == []


def test_refs_that_are_none(store: Store, cache: Path, tmp_path: Path) -> None:
    publish(cache, "org/m", model_files("o"), A, "main")
    refs = cache / "models--org--m" / "refs"
    os.mkfifo(refs / "pipe")
    (refs / "empty").touch()
    (refs / "text").write_text("../../../etc")
    (refs / "binary").write_bytes(b"\xff" * 40)
    (refs / "long").write_text("a" * 4000)
    (refs / "loop").symlink_to("loop")
    (refs / "away").symlink_to(tmp_path)
    (refs / "x y").write_text(A)
    (refs / "MAIN").write_text(A)
    (refs / ".hidden").write_text(A)
    assert names(store) == ["org/m"]
    for ref in ("pipe", "empty", "text", "binary", "long", "loop", "away", "x y", "MAIN", ".hidden"):
        with pytest.raises((ModelNotFound, ModelInvalid)):
            store.resolve(f"org/m@{ref}")


def test_what_can_be_a_model_of_the_hub(store: Store) -> None:
    assert store.hub_repo("org/m") == ("org/m", None)
    assert store.hub_repo("org/m@main") == ("org/m", "main")
    assert store.hub_repo("org/m@feature/x-1.0_y") == ("org/m", "feature/x-1.0_y")
    assert store.hub_repo("gpt2") == ("gpt2", None)
    assert store.hub_repo("old") == ("org/m", "v1")
    assert store.hub_repo("new") == ("org/m", None)
    nonsense = ("", "here", "own", "odd", "/org/m", "mlxd/cleanup", "a/b/c", "org/m@", "@v1", "org/m@v@w", "org/m@../x",
                "org/m@x..y", "org/m@/x", "org/m@x/", "org/m@x//y", "org/m@.x", "org/m@x/.y", "org/m@MAIN", "org/m@\n",
                "org/m@" + "x" * 201, "org/m@ü", "\ud800", "org/m\0")  # fmt: skip
    assert [store.hub_repo(ref) for ref in nonsense] == [None] * len(nonsense)


@given(st.text(max_size=30) | st.text(alphabet="aM./-_~\\@", max_size=12).map("org/m@".__add__))
def test_hub_repo_raises_nothing_and_names_nothing_outside(ref: str) -> None:
    store = Store(env={"HF_HUB_CACHE": "/nowhere/hub"}, builtin=Path("/nowhere/builtin"))
    named = store.hub_repo(ref)
    assert not store.partial(ref)
    if named is None:
        return
    repo, revision = named
    assert hub.join_ref(repo, revision) in (ref, ref.removesuffix("@main"))
    path = os.path.normpath(hub.repo_folder(store.cache, repo) / "refs" / (revision or "main"))
    assert path == f"/nowhere/hub/models--{repo.replace('/', '--')}/refs/{revision or 'main'}"


def test_partial_until_it_is_published(store: Store, cache: Path) -> None:
    assert not store.partial("org/m")
    at = RepoCache(cache, "org/m")
    fd = at.open_part("1" * 40)
    assert fd is not None
    assert store.partial("org/m")
    assert store.partial("old")
    at.complete("1" * 40)
    os.close(fd)
    assert store.partial("org/m")
    at.publish(A, {"config.json": "1" * 40}, refs=["main"])
    assert not store.partial("org/m")
    assert not store.partial("/tmp")


def test_an_estimate_needs_no_files(cache: Path) -> None:
    snapshot = publish(cache, "org/m", model_files(), A, "main")
    found = examine(snapshot)
    config = json.loads((snapshot / "config.json").read_bytes())
    assert estimate(config, found.size_bytes, found.weights_bytes) == found
    assert found.kv_token_bytes > 0
    assert estimate({}, 10, 5).weights_bytes == 5
    assert estimate(CONFIG | {"num_hidden_layers": 2**80, "architectures": 3}, 10, 5).kv_token_bytes == 0
