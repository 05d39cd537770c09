"""Settings: precedence, origins, and a sentence for everything that is wrong."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from mlxd.settings import APPLIES, NOT_BY_CLIENTS, Settings, SettingsError, load

SOURCE = Path(__file__).parents[2] / "daemon" / "src" / "mlxd"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "MLXD_HOME": str(tmp_path / "home")}


def write(env: dict[str, str], text: str) -> Path:
    path = Path(env["MLXD_HOME"]) / "config.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_defaults(env: dict[str, str]) -> None:
    loaded = load(env)
    assert loaded.settings.home == env["MLXD_HOME"]
    assert loaded.settings.socket == env["MLXD_HOME"] + "/mlxd.sock"
    assert loaded.settings.default_model == "mlxd/cleanup"
    assert loaded.settings.worker_command == [sys.executable, "-m", "mlxd.worker"]
    assert loaded.settings.memory_budget_bytes > 2**28
    assert loaded.origins["max_batch"].kind == "default"
    assert loaded.origins["home"].kind == "env"
    assert loaded.warnings == []


def test_later_sources_win_and_are_named(env: dict[str, str]) -> None:
    path = write(env, "# comment\nmax_batch = 3\nkeep_alive_s = 4\ndrain_s = 1\n")
    env |= {"MLXD_KEEP_ALIVE_S": "5", "MLXD_DRAIN_S": "2"}
    loaded = load(env, {"drain_s": 3.5, "log_level": None})
    settings = loaded.settings
    assert (settings.max_batch, settings.keep_alive_s, settings.drain_s) == (3, 5.0, 3.5)
    assert str(loaded.origins["max_batch"]) == f"{path}:2"
    assert str(loaded.origins["keep_alive_s"]) == "the environment's MLXD_KEEP_ALIVE_S"
    assert str(loaded.origins["drain_s"]) == "--set drain_s"
    assert str(loaded.origins["log_level"]) == "the default"


def test_flags_move_home_and_socket(env: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    loaded = load(env, {"home": str(other)})
    assert loaded.settings.socket == str(other / "mlxd.sock")
    assert loaded.origins["home"].kind == "flag"
    assert load(env, {"socket": str(tmp_path / "s")}).settings.socket == str(tmp_path / "s")


def test_a_socket_where_it_would_be_anyway_is_the_default(env: dict[str, str]) -> None:
    """Clients tell the daemon that they start where to listen: no variable of the user's is to be named for it."""
    socket = env["MLXD_HOME"] + "/mlxd.sock"
    assert load({**env, "MLXD_SOCKET": socket}).origins["socket"].kind == "default"
    assert str(load({**env, "MLXD_SOCKET": socket + "x"}).origins["socket"]) == "the environment's MLXD_SOCKET"


def test_a_home_that_no_message_can_name_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="no UTF-8"):
        load({**env, "MLXD_HOME": env["MLXD_HOME"] + os.fsdecode(b"\xff")})


def test_tables(env: dict[str, str]) -> None:
    write(env, '[aliases]\ndictation = "mlxd/cleanup"\n[keep_alive]\n"mlxd/cleanup" = -1\n')
    settings = load(env).settings
    assert settings.aliases == {"dictation": "mlxd/cleanup"}
    assert settings.keep_alive == {"mlxd/cleanup": -1}


def test_commands_from_the_environment(env: dict[str, str]) -> None:
    assert load({**env, "MLXD_WORKER_COMMAND": "python3 'a b.py'"}).settings.worker_command == ["python3", "a b.py"]
    assert load({**env, "MLXD_WORKER_COMMAND": '["x", "y z"]'}).settings.worker_command == ["x", "y z"]
    assert load({**env, "MLXD_ALIASES": '{"a": "b"}'}).settings.aliases == {"a": "b"}
    assert load(env, {"worker_command": "a b", "max_batch": "3"}).settings.worker_command == ["a", "b"]
    assert load({**env, "MLXD_LOG_PROMPTS": "true"}).settings.log_prompts is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keepalive_s = 3", ["no setting 'keepalive_s'", "config.toml:1", "did you mean keep_alive_s?"]),
        ("\n\nmax_batch = 'many'", ["max_batch", "'many'", "config.toml:3", "expected `int`"]),
        ("max_batch = 0", ["max_batch", "0", ">= 1"]),
        ("log_level = 'loud'", ["log_level", "'loud'", "one of debug, info, warning, error"]),
        ("\n[keep_alive]\na = 'x'", ["keep_alive.a", "config.toml:3", "expected `float`"]),
        ("[keep_alive]\n\"b/c\" = 1\n'org/x.y' = 'x'", ["keep_alive.org/x.y", "config.toml:3"]),
        ("aliases = { a = 'b' }\n[keep_alive]\na = 1\n[kv_bits]\na = 3", ["kv_bits.a", "config.toml:5"]),
        ("\nkeep_alive = { a = 'x' }", ["keep_alive.a", "config.toml:2"]),
        ("keep_alive.a = 1\nkeep_alive.b = 'x'", ["keep_alive.b", "config.toml:2"]),
        (
            '[personas.a]\nsystem = """\n[personas.b]\ntemperatur = 1\n"""\n\n[personas.b]\ntop_k = 1\ntemperatur = 1',
            ["personas.b", "config.toml:9", "did you mean temperature?"],
        ),
        ("[personas.a]\ntop_k = 1\ntemperature = 'x'", ["personas.a", "config.toml:3", "expected `float`"]),
        ("home = '/x'", ["home", "MLXD_HOME"]),
        ("socket = '/x'", ["socket", "MLXD_SOCKET"]),
        ("x = 1\ny = = 2", ["config.toml is no TOML", "line 2"]),
        ("zzz = 1", ["no setting 'zzz'"]),
    ],
)
def test_mistakes_in_the_file(env: dict[str, str], text: str, words: list[str]) -> None:
    write(env, text)
    with pytest.raises(SettingsError) as caught:
        load(env)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message.removesuffix("\n")


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MLXD_MAX_BATCH", "many"),
        ("MLXD_ALIASES", "{"),
        ("MLXD_ALIASES", "[]"),
        ("MLXD_WORKER_COMMAND", "'"),
        ("MLXD_WORKER_COMMAND", "[]"),
        ("MLXD_LOG_PROMPTS", "perhaps"),
    ],
)
def test_mistakes_in_the_environment(env: dict[str, str], variable: str, text: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        load({**env, variable: text})


def test_unknown_variables_are_no_error(env: dict[str, str]) -> None:
    loaded = load({**env, "MLXD_MAX_BACH": "3", "MLXD_OF_SOMEBODY_ELSE_ENTIRELY": "x", "MLXD_QUEUE_LIMIT": ""})
    assert loaded.warnings == ["MLXD_MAX_BACH in the environment is no setting; did you mean max_batch?"]
    assert loaded.settings.queue_limit == 512


def test_unreadable_file(env: dict[str, str]) -> None:
    write(env, "").unlink()
    (Path(env["MLXD_HOME"]) / "config.toml").mkdir()
    with pytest.raises(SettingsError, match="cannot read"):
        load(env)


def test_every_setting_is_described() -> None:
    assert Settings.__doc__ is not None
    undescribed = [name for name in Settings.__struct_fields__ if name not in Settings.__doc__]
    assert undescribed == []


# What runs once, when a daemon starts, or describes one that does not run.
AT_THE_START = {"__init__", "run", "serve", "begin", "_equip", "describe"}


def readers(names: Collection[str]) -> dict[str, set[str]]:
    """The functions of the daemon that read each setting of its Settings."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for path in SOURCE.rglob("*.py"):
        if {"cli", "worker", "fetch"} & set(path.parts) or path.parent.name == "settings":
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                match node:
                    case ast.Attribute(attr=name, value=ast.Name(id="settings")) if name in found:
                        found[name].add(function.name)
                    case ast.Attribute(attr=name, value=ast.Attribute(attr="settings" | "_settings")) if name in found:
                        found[name].add(function.name)
    return found


def test_what_can_change_while_a_daemon_runs_is_not_only_read_when_it_starts() -> None:
    found = readers(APPLIES)
    stale = {name for name, where in found.items() if where and APPLIES[name] != "restart" and where <= AT_THE_START}
    assert not stale, f"read where they are needed, or say `restart` in APPLIES: {stale}"


def test_the_rest_waits_for_the_next_daemon() -> None:
    assert {name for name, when in APPLIES.items() if when == "restart"} >= {"home", "socket"}
    assert set(APPLIES) == set(Settings.__struct_fields__)
    assert set(APPLIES) >= NOT_BY_CLIENTS
