"""Fetchers and daemons killed at any byte of downloads, updates and deletes; tools/soak.py does it for hours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxd.store import hub, remove
from mlxd.store.layout import RepoCache
from support import fake_model, hubcache
from support.daemon import Daemon
from support.download_kills import LOST_BYTES, KillLoop
from support.hub import Hub
from support.wholeness import Eye, digests

SOAK = Path(__file__).resolve().parents[2] / "tools" / "soak.py"


@pytest.mark.slow
def test_killed_again_and_again_it_ends_whole_and_never_claims_to_be_before() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"python3 tools/dev.py soak --kills 12 --seed {seed}")  # shown where it fails
    with Hub() as server, Daemon(bad_child="worker", env=server.env()) as daemon:
        tally = KillLoop(server, daemon, seed).run(12)
    assert tally.count == 12
    assert tally.deletes >= 1
    assert 0 < len(tally.lost) <= 12
    assert max(tally.lost) <= LOST_BYTES


@pytest.mark.parametrize("crash", [False, True])
def test_a_revision_that_was_in_use_when_the_daemon_ended_is_removed_by_the_next(crash: bool) -> None:
    with Hub() as server, Daemon(bad_child="worker", env=server.env()) as daemon:
        snapshots = daemon.home / "hub" / "models--org--model" / "snapshots"
        old = server.commit("org/model", fake_model.files(1000))
        with daemon.client() as client:
            client.wait_job(client.download("org/model"))
            client.load("org/model", keep_alive=-1)
            new = server.commit("org/model", fake_model.files(1000, seed=1))
            assert client.wait_job(client.download("org/model")).revision == new
            assert {path.name for path in snapshots.iterdir()} == {old, new}
        daemon.restart(crash=crash)
        with daemon.client() as client:
            assert client.model("org/model").revision == new
            assert client.verify("org/model").ok
            assert [path.name for path in snapshots.iterdir()] == [new]
            assert Eye(daemon.home / "hub", "org/model", {}).litter() == []


def test_the_long_form_runs_and_tells_what_it_did() -> None:
    command = [sys.executable, str(SOAK), "--kills", "2", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 3" in done.stdout
    assert "2 kills" in done.stdout
    refused = subprocess.run([*command, "--kills", "-1"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2


def test_a_file_that_is_put_in_its_place_by_who_dies_meanwhile_leaves_nothing_beside_it(tmp_path: Path) -> None:
    files, steps = hubcache.model_files(), 0
    name = next(iter(files))
    oid, commit = hubcache.oids(files)[name], hubcache.commit("a")
    while True:
        steps += 1
        cache = tmp_path / str(steps)
        at = RepoCache(cache, "org/model")
        fd = at.open_part(oid)
        assert fd is not None
        os.write(fd, files[name])
        at.part_map(oid).write_bytes(b"whatever")
        died = hubcache.dies_at(steps, lambda at=at: at.complete(oid))  # type: ignore[misc]
        os.close(fd)
        hubcache.publish(cache, "org/model", files, commit, "main")
        eye = Eye(cache, "org/model", {commit: digests(files)})
        assert eye.look() == commit
        assert eye.litter() == []
        if not died:
            break
    assert steps > 3


def test_replaced_revisions_go_and_named_ones_stay_whoever_dies_meanwhile(tmp_path: Path) -> None:
    a, b = hubcache.commit("a"), hubcache.commit("b")
    versions = {a: hubcache.model_files("a"), b: hubcache.model_files("b")}
    steps, died = 0, True
    while died:
        steps += 1
        cache = tmp_path / str(steps)
        for repo, refs in (("org/model", ["main"]), ("org/pinned", ["main", "v1"])):
            hubcache.publish(cache, repo, versions[a], a, *refs)
            hubcache.publish(cache, repo, versions[b], b, "main")
        died = hubcache.dies_at(steps, lambda cache=cache: remove.prune_replaced(cache))  # type: ignore[misc]
        remove.finish(cache)
        remove.prune_replaced(cache)
        for repo, left in (("org/model", {b}), ("org/pinned", {a, b})):
            eye = Eye(cache, repo, {commit: digests(files) for commit, files in versions.items()})
            assert eye.look() == b
            assert set(hub.snapshots(RepoCache(cache, repo).folder)) == left
            assert eye.litter() == []
            assert eye.warnings() == []
    assert steps > 5
