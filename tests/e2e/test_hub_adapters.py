"""Adapters from a hub: a real HTTP server on loopback, real daemons and fetchers, and real workers that use them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxd_client import Client, errors
from support import fake_model, tiny_adapter, tiny_model
from support.daemon import PATIENCE_S, Daemon
from support.hub import EVIL_NAMES, Hub

MIB = 1024 * 1024
SIZE = 24 * MIB
GREEDY: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.0, "max_tokens": 8}
CONFIG = json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}}).encode()
PEFT = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}).encode()
# What repositories of adapters hold besides, and nobody needs here.
LEFT_OUT = dict.fromkeys(
    ("README.md", "tokenizer.json", "training_args.bin", "optimizer.pt", "modeling_x.py", "trainer_state.json",
     "0000100_adapters.safetensors", *EVIL_NAMES), b"evil",
)  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def weights(size: int = MIB, seed: int = 0) -> bytes:
    """A safetensors file of about this size that fits no model."""
    return fake_model.files(size, seed)["model.safetensors"]


def snapshots(daemon: Daemon, repo: str) -> Path:
    return daemon.home / "hub" / ("models--" + repo.replace("/", "--")) / "snapshots"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- with real workers --------------------------------------------------------------------------------------------


class World:
    """A base model, and adapters of it that lie in folders: what those of the hub have to compute the same as."""

    def __init__(self, folder: Path) -> None:
        self.base = str(tiny_model.build(folder / "base").resolve())
        self.adapters = [tiny_adapter.build(folder / f"a{n}", folder / "base", seed=n).resolve() for n in range(2)]

    def say(self, client: Client, adapter: str | None) -> Any:
        return client.process("hello", model=self.base, adapter=adapter, **GREEDY)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("models"))


@pytest.mark.model
def test_from_the_hub_to_an_answer_to_an_update_to_nothing(hub: Hub, world: World) -> None:
    old = hub.commit("org/lora", contents(world.adapters[0]) | LEFT_OUT)
    hub.commit("org/model", fake_model.files(MIB))
    with Daemon(env=hub.env()) as daemon:
        with daemon.client() as client:
            _named_before_it_is_here(client, world)
            _fetched(daemon, client, world, old)
            _no_model(client, world)
            new = hub.commit("org/lora", contents(world.adapters[1]))
            _updated(daemon, client, world, old, new)
            _rotten(daemon, client)
        daemon.restart()
        assert [path.name for path in snapshots(daemon, "org/lora").iterdir()] == [new]
        with daemon.client() as client:
            assert client.model("org/lora").kind == "adapter"
            assert client.delete("org/lora") > 0
            assert not snapshots(daemon, "org/lora").parent.exists()
            with pytest.raises(errors.ModelNotDownloaded):
                world.say(client, "org/lora")


def _named_before_it_is_here(client: Client, world: World) -> None:
    with pytest.raises(errors.ModelNotDownloaded) as refused:
        world.say(client, "org/lora")
    assert refused.value.details["field"] == "adapter"
    plan = refused.value.details["plan"]
    sizes = [path.stat().st_size for path in world.adapters[0].iterdir()]
    assert (plan["model"], plan["kind"], plan["download_bytes"]) == ("org/lora", "adapter", sum(sizes))
    with pytest.raises(errors.ModelNotDownloaded):
        client.load(world.base, adapter="org/lora")
    with pytest.raises(errors.ModelNotFound):
        world.say(client, "org/model")  # there is one, but no adapter
    with pytest.raises(errors.ModelInvalid, match="is an adapter"):
        client.load("org/lora")


def _fetched(daemon: Daemon, client: Client, world: World, commit: str) -> None:
    ended = client.wait_job(client.download("org/lora"))
    assert (ended.state, ended.progress, ended.revision) == ("done", 1.0, commit)
    (found,) = [model for model in client.models() if model.id == "org/lora"]
    assert (found.kind, found.state, found.source, found.context_length) == ("adapter", "Downloaded", "hub", None)
    assert {path.name for path in (snapshots(daemon, "org/lora") / commit).iterdir()} == {
        "adapter_config.json", "adapters.safetensors",
    }  # fmt: skip
    plan = client.plan("org/lora")
    assert (plan.kind, plan.download_bytes, plan.kv_bytes) == ("adapter", 0, 0)
    assert 0 < plan.memory_bytes == plan.weights_bytes
    done = world.say(client, "org/lora")
    assert done.adapter == "org/lora"
    assert done.text == world.say(client, str(world.adapters[0])).text != world.say(client, None).text
    assert client.verify("org/lora").ok


def _no_model(client: Client, world: World) -> None:
    asked = (
        client.load, client.acquire, lambda name: client.process("hello", model=name),
        lambda name: client.count_tokens("hello", model=name),
    )  # fmt: skip
    for ask in asked:
        with pytest.raises(errors.ModelInvalid, match="is an adapter") as refused:
            ask("org/lora")
        assert refused.value.details["model"] == "org/lora"
    with pytest.raises(errors.InvalidParams) as wrong:
        client.load(world.base, draft_model="org/lora")
    assert wrong.value.details["field"] == "draft_model"
    assert client.unload("org/lora").state == "Downloaded"


def _updated(daemon: Daemon, client: Client, world: World, old: str, new: str) -> None:
    """While the model is loaded with it: what was loaded stays, whoever names it gets the new one."""
    client.load(world.base, adapter="org/lora")
    with pytest.raises(errors.ModelBusy) as busy:
        client.delete("org/lora")
    assert busy.value.details["adapting"] == 1
    (found,) = [model for model in client.models(updates=True) if model.id == "org/lora"]
    assert (found.revision, found.latest_revision) == (old, new)
    assert client.wait_job(client.download("org/lora")).revision == new
    assert client.model("org/lora").revision == new
    before, after = (world.say(client, str(path)).text for path in world.adapters)
    assert world.say(client, None).text == before != after
    assert world.say(client, "org/lora").text == after
    assert {path.name for path in snapshots(daemon, "org/lora").iterdir()} == {old, new}


def _rotten(daemon: Daemon, client: Client) -> None:
    (new,) = (
        path for path in snapshots(daemon, "org/lora").iterdir() if path.name == client.model("org/lora").revision
    )
    os.truncate((new / "adapters.safetensors").resolve(), 100)
    assert {bad.file for bad in client.verify("org/lora").bad_files} == {"adapters.safetensors"}
    (new / "adapter_config.json").unlink()
    found = {bad.file: bad.reason for bad in client.verify("org/lora").bad_files}
    assert found["adapter_config.json"] == "missing"
    assert client.wait_job(client.download("org/lora", repair=True)).state == "done"
    assert client.verify("org/lora").ok


@pytest.mark.model
def test_where_the_settings_allow_it_a_request_fetches_its_adapter_first(
    hub: Hub, world: World, tmp_path: Path
) -> None:
    hub.commit("org/peft", contents(tiny_adapter.to_peft(world.adapters[0], tmp_path / "peft")) | LEFT_OUT)
    hub.commit("org/whole", fake_model.files(MIB))
    with Daemon(env=hub.env(), download="auto") as daemon, daemon.client() as client:
        with client.stream_process("hello", model=world.base, adapter="org/peft", **GREEDY) as stream:
            phases = [piece.phase for piece in stream.pieces() if piece.phase is not None]
        assert phases[0] == "downloading"
        assert (stream.result.adapter, stream.result.text) == (
            "org/peft", world.say(client, str(world.adapters[0])).text,
        )  # fmt: skip
        with pytest.raises(errors.ModelNotFound) as refused:
            world.say(client, "org/whole")
        assert refused.value.details["field"] == "adapter"
        assert not snapshots(daemon, "org/whole").parent.exists()
        # What is broken on disk is fetched anew.
        (weights,) = snapshots(daemon, "org/peft").glob("*/adapter_model.safetensors")
        weights.unlink()
        assert world.say(client, "org/peft").text == stream.result.text


# --- kills and lies -----------------------------------------------------------------------------------------------


def test_a_killed_fetcher_and_a_killed_daemon_are_followed_by_such_as_go_on(hub: Hub) -> None:
    hub.commit("org/large", {"adapters.safetensors": weights(SIZE), "adapter_config.json": CONFIG})
    fault = hub.fault("org/large", "hold", file="adapters.safetensors", after=12 * MIB, times=1)
    daemon = Daemon(bad_child="worker", env=hub.env(), download_connections=1)
    with daemon:
        with daemon.client() as client, client.events() as events:
            job = client.download("org/large")
            while True:
                event = events.get(PATIENCE_S)
                assert event is not None
                if event.job is not None and (event.job.done_bytes or 0) >= 11 * MIB:
                    break
            assert hub.fired(fault) == 1
            (fetcher,) = [child for child in daemon.children() if "mlxd.fetch" in " ".join(child.cmdline())]
            fetcher.kill()
        daemon.restart(crash=True)
        with daemon.client() as client:
            assert client.wait_job(job).state == "done"
            assert client.model("org/large").kind == "adapter"
            assert client.verify("org/large").ok
        assert hub.sent("adapters.safetensors", repo="org/large") <= SIZE + 8 * MIB + MIB


LIES: dict[str, tuple[dict[str, bytes], str, str]] = {
    "pickle": ({"adapter_config.json": PEFT, "adapter_model.bin": b"x"}, "model_invalid", "pickle"),
    "no-weights": ({"adapter_config.json": CONFIG}, "model_invalid", "no adapters.safetensors"),
    "no-config": ({"adapters.safetensors": weights()}, "model_invalid", "no adapter_config.json"),
    "config-is-code": (
        {"adapters.safetensors": weights(), "adapter_config.py": b"x"}, "model_invalid", "no adapter_config.json",
    ),
    "no-json": ({"adapters.safetensors": weights(), "adapter_config.json": b"["}, "model_invalid", "no JSON"),
    "deep": ({"adapters.safetensors": weights(), "adapter_config.json": b"[" * 200_000}, "model_invalid", "no JSON"),
    "huge-config": (
        {"adapters.safetensors": weights(), "adapter_config.json": b" " * (MIB + 1)}, "model_invalid", "larger than",
    ),
    "not-computed": (
        {"adapter_model.safetensors": weights(), "adapter_config.json": b'{"peft_type": "IA3"}'}, "model_invalid",
        "there are no adapters of type",
    ),
    "full": (
        {"adapters.safetensors": weights(), "adapter_config.json": b'{"fine_tune_type": "full"}'}, "model_invalid",
        "type full",
    ),
    "absurd-rank": (
        {"adapter_model.safetensors": weights(), "adapter_config.json": b'{"r": 1000000, "lora_alpha": 1}'},
        "model_invalid", "not 1 to",
    ),
    "no-safetensors": (
        {"adapters.safetensors": b"\x80\x04evil", "adapter_config.json": CONFIG}, "verification_failed",
        "no sound file",
    ),
}  # fmt: skip


def test_repositories_that_hold_no_usable_adapter(hub: Hub) -> None:
    """Each says why; but for the last, which only its weights can give away, no weights are fetched."""
    with Daemon(bad_child="worker", env=hub.env()) as daemon, daemon.client() as client:
        for name, (files, kind, said) in LIES.items():
            repo = f"org/{name}"
            hub.commit(repo, files | {"README.md": b"# fine", "evil.py": b"evil"})
            ended = client.wait_job(client.download(repo))
            assert ended.error is not None, name
            assert (ended.state, ended.error.kind) == ("failed", kind), name
            assert said in ended.error.message, name
            assert kind != "model_invalid" or hub.sent("*.safetensors", repo=repo) == 0, name
            assert client.model(repo).state == "NotDownloaded"
            assert not list(snapshots(daemon, repo).rglob("*")), name
