"""`mlxd config` where no daemon runs: it looks at the file, and changes it."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxd.cli import exits
from mlxd.cli.main import main

WRITTEN = "# mine\nkeep_alive_s = 300  # five minutes\n[aliases]\nold = 'x'\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("MLXD_HOME", str(home))
    monkeypatch.delenv("MLXD_SOCKET", raising=False)
    home.mkdir(mode=0o700)
    path = home / "config.toml"
    path.write_text(WRITTEN)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["config", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_values_and_origins_are_shown(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('# mine\nmax_batch = 3\n[aliases]\ndictation = "mlxd/cleanup"\n')
    monkeypatch.setenv("MLXD_KEEP_ALIVE_S", "60")
    status, out, _ = run(capsys, "--json", "--changed")
    assert status == exits.OK
    shown = json.loads(out)
    assert shown["max_batch"] == {"value": 3, "from": f"{file}:2", "applies": "load"}
    places = {name: (one["value"], one["from"]) for name, one in shown.items()}
    assert places["aliases"] == ({"dictation": "mlxd/cleanup"}, f"{file}:3")
    assert places["keep_alive_s"] == (60.0, "the environment's MLXD_KEEP_ALIVE_S")
    assert "queue_limit" not in shown
    status, out, _ = run(capsys, "queue_limit")
    assert (status, out.split()) == (exits.OK, ["setting", "value", "from", "queue_limit", "512", "the", "default"])
    status, _, err = run(capsys, "max_bacth")
    assert (status, "did you mean max_batch?" in err) == (exits.USAGE, True)


@pytest.mark.parametrize(
    ("words", "after"),
    [
        (["set", "keep_alive_s", "60"], "# mine\nkeep_alive_s = 60  # five minutes\n[aliases]\nold = 'x'\n"),
        (["set", "keep_alive_s=1.5", "aliases.new=a/b"], "keep_alive_s = 1.5  # five minutes\n[aliases]\n"),
        (["set", "default_model", "org/name=odd"], 'default_model = "org/name=odd"\n'),
        (["set", "worker_command", "python3 'a b'"], 'worker_command = ["python3", "a b"]\n'),
        (["set", "pinned", "a/b c/d"], 'pinned = ["a/b", "c/d"]\n'),
        (["set", 'personas.x={"system": "Be."}'], 'system = "Be."'),
        (["unset", "keep_alive_s", "aliases.old"], "# mine\n"),
    ],
)  # fmt: skip
def test_the_file_is_changed(file: Path, capsys: pytest.CaptureFixture[str], words: list[str], after: str) -> None:
    status, out, err = run(capsys, *words)
    assert (status, err) == (exits.OK, "")
    assert "the next daemon will have it" in out
    assert after in file.read_text()
    assert run(capsys)[0] == exits.OK, "what was written can be read"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["set", "keepalive_s", "60"], "did you mean keep_alive_s?"),
        (["set", "keep_alive_s", "soon"], "keep_alive_s cannot be 'soon'"),
        (["set", "keep_alive_s=1", "max_batch=none"], "max_batch cannot be 'none'"),
        (["set", "keep_alive_s"], "say `mlxd config set NAME VALUE`"),
        (["set"], "say `mlxd config set NAME VALUE`"),
        (["set", "a=1", "b"], "say `mlxd config set NAME VALUE`"),
        (["set", "home", "/x"], "home cannot be set in a file"),
        (["set", "personas.x={}", "templates.y={}"], "templates.y"),
        (["unset"], "say `mlxd config unset NAME...`"),
        (["unset", "no_such"], "there is no setting 'no_such'"),
        (["get"], "get takes one NAME"),
        (["get", "no_such"], "there is no setting 'no_such'"),
        (["no_such"], "there is no setting 'no_such'"),
    ],
)
def test_what_is_wrong_changes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    status, _, err = run(capsys, *words)
    assert status == exits.USAGE
    assert said in err
    assert file.read_text() == WRITTEN


def test_one_value_for_scripts(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, out in (
        (["get", "keep_alive_s"], "300.0\n"), (["get", "default_model"], "mlxd/cleanup\n"),
        (["get", "aliases"], '{"old":"x"}\n'), (["get", "aliases.old"], "x\n"), (["get", "blas", "--json"], '"auto"\n'),
    ):  # fmt: skip
        assert run(capsys, *words)[:2] == (exits.OK, out)
    assert run(capsys, "get", "aliases.none")[0] == exits.FAILED
    assert run(capsys, "path")[1] == f"{file}\n"


def test_what_wins_over_the_file_is_said(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXD_KEEP_ALIVE_S", "5")
    assert "MLXD_KEEP_ALIVE_S wins" in run(capsys, "set", "keep_alive_s", "60")[2]
    change = json.loads(run(capsys, "set", "keep_alive_s", "61", "--json")[1])
    assert change["overridden"] == {"keep_alive_s": "MLXD_KEEP_ALIVE_S"}
    assert "keep_alive_s = 61" in file.read_text()


def test_a_file_that_is_wrong_can_be_put_right_but_not_by_accident(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("max_batch = 'x'\n")
    status, _, err = run(capsys, "set", "keep_alive_s", "60")
    assert (status, file.read_text()) == (exits.USAGE, "max_batch = 'x'\n")
    assert "max_batch cannot be 'x'" in err
    assert run(capsys, "set", "max_batch", "4")[0] == exits.OK
    assert file.read_text() == "max_batch = 4\n"


def test_there_need_not_be_a_home_yet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "new"
    monkeypatch.setenv("MLXD_HOME", str(home))
    assert run(capsys, "set", "max_batch", "4")[0] == exits.OK
    assert (home / "config.toml").read_text() == "max_batch = 4\n"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_an_editor_opens_the_file_and_mistakes_are_told(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor.py"
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"{sys.executable} '{editor}' -x")

    def edit(script: str) -> Any:
        editor.write_text(f"import sys, pathlib; path = pathlib.Path(sys.argv[2]); {script}")
        return run(capsys, "edit")

    assert edit("path.write_text('max_batch = 4')")[0] == exits.OK
    status, _, err = edit("path.write_text('max_bach = 4')")
    assert (status, "did you mean max_batch?" in err) == (exits.USAGE, True)
    assert edit("sys.exit(3)")[0] == exits.FAILED
    monkeypatch.setenv("EDITOR", "/no/such/editor")
    assert "cannot be started" in run(capsys, "edit")[2]
    monkeypatch.setenv("EDITOR", "vi '")
    status, _, err = run(capsys, "edit")
    assert (status, "vi ' cannot be started: No closing quotation" in err) == (exits.FAILED, True)


def test_without_a_daemon_nothing_can_be_reloaded(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "reload")
    assert (status, "no daemon is running" in err) == (exits.NO_DAEMON, True)
