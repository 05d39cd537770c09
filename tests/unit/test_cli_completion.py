"""Completion scripts: they hold every command and option, and a real bash, zsh and fish complete with them."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxd.cli.main import build_parser, main
from mlxd.cli.shells import bash, describe, fish, zsh
from support.scripted_daemon import PATIENCE_S

COMMANDS = list(describe(build_parser()))
SCRIPTS = {"bash": bash(COMMANDS), "zsh": zsh(COMMANDS), "fish": fish(COMMANDS)}


def fake_mlxd(folder: Path, *ids: str) -> None:
    """A command that lists these ids, asked as the scripts may ask: quietly, and of a daemon that already runs."""
    fake = folder / "mlxd"
    fake.write_text(
        f"""\
#!/bin/sh
case "$*" in
    "list --quiet --no-start"|"catalog --quiet --no-start"|"jobs --quiet --no-start") printf "%s\\n" {" ".join(ids)};;
    "personas --kind persona --quiet --no-start") echo editor;;
    "personas --kind template --quiet --no-start") echo translate;;
    *) exit 2;;
esac
"""
    )
    fake.chmod(0o755)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_nothing_is_missing(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert script == SCRIPTS[shell]
    for command in COMMANDS:
        assert command.name in script
        for word in command.options:
            flag = word.flags[-1]
            assert (f"-l {flag[2:]}" if shell == "fish" else flag) in script


@pytest.mark.parametrize("shell", SCRIPTS)
def test_shells_accept_them(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    path = tmp_path / "script"
    path.write_text(SCRIPTS[shell])
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["l"], {"list", "load"}),
        (["serve", "--log-level", "w"], {"warning"}),
        (["run", "--top"], {"--top-p", "--top-k"}),
        (["run", "-m", "org/"], {"org/a", "org/b"}),
        (["load", "mlxd"], {"mlxd/cleanup"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["pull", "org/"], {"org/a", "org/b"}),
        (["rm", "org/a", "mlx"], {"mlxd/cleanup"}),
        (["jobs", "c"], {"cancel"}),
        (["jobs", "cancel", "org"], {"org/a", "org/b"}),
        (["catalog", "--use", "c"], {"coding"}),
        (["status", "x"], set()),
        (["batch", "submit", "script"], {"script.jsonl"}),
        (["batch", "results", "org"], {"org/a", "org/b"}),
        (["config", "keep_alive_"], {"keep_alive_s"}),
        (["config", "rel"], {"reload"}),
        (["events", "--topic", "sys"], {"system"}),
        (["load", "--draft-model", "org/b"], {"org/b"}),
        (["run", "--persona", ""], {"editor"}),
        (["chat", "--persona", "e"], {"editor"}),
        (["run", "--template", ""], {"translate"}),
    ],
)
def test_bash_completes(words: list[str], found: set[str], tmp_path: Path) -> None:
    fake_mlxd(tmp_path, "mlxd/cleanup", "org/a", "org/b")
    (tmp_path / "script.jsonl").touch()
    line = " ".join(f"'{word}'" for word in ["mlxd", *words])
    script = (
        f"{SCRIPTS['bash']}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _mlxd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )  # fmt: skip
    assert set(done.stdout.split()) == found


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish here")
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mlxd l", {"list", "load"}),
        ("mlxd serve --log-level w", {"warning"}),
        ("mlxd run --top", {"--top-p", "--top-k"}),
        ("mlxd completion ", {"bash", "zsh", "fish"}),
        ("mlxd run --seed ", set()),
        ("mlxd run -m org/", {"org/ant", "org/bee"}),
        ("mlxd rm m", {"mlxd/cleanup"}),
        ("mlxd run --persona ", {"editor"}),
        ("mlxd jobs c", {"cancel"}),
    ],
)
def test_fish_completes(line: str, found: set[str], tmp_path: Path) -> None:
    fake_mlxd(tmp_path, "mlxd/cleanup", "org/ant", "org/bee")
    path = tmp_path / "script"
    path.write_text(SCRIPTS["fish"])
    done = subprocess.run(
        ["fish", "-c", f'source {path}; complete -C "{line}"'], capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert {shown.split("\t")[0] for shown in done.stdout.splitlines()} == found


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("mlxd unl", "mlxd unload "),
        ("mlxd serve --log-level w", "mlxd serve --log-level warning "),
        ("mlxd run --determ", "mlxd run --deterministic "),
        ("mlxd run -m org/b", "mlxd run -m org/bee "),
        ("mlxd rm org/ant m", "mlxd rm org/ant mlxd/cleanup "),
        ("mlxd jobs can", "mlxd jobs cancel "),
        ("mlxd run --template tr", "mlxd run --template translate "),
        ("mlxd completion fi", "mlxd completion fish "),
        ("mlxd service uninst", "mlxd service uninstall "),
    ],
)
def test_zsh_completes(typed: str, completed: str, zsh_line: Callable[[str], str]) -> None:
    assert zsh_line(typed) == completed


@pytest.fixture
def zsh_line(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """What becomes of a line that is typed, and tab, in a real zsh on a terminal. Ctrl-X has it write the line down."""
    fake_mlxd(tmp_path, "mlxd/cleanup", "org/ant", "org/bee")
    (tmp_path / "_mlxd").write_text(SCRIPTS["zsh"])
    answer = tmp_path / "answer"
    os.mkfifo(answer)
    (tmp_path / ".zshrc").write_text(
        f"fpath=({tmp_path} $fpath)\nautoload -Uz compinit; compinit -u -D\n"
        f'dump() {{ print -r -- "$BUFFER|" > {answer} }}; zle -N dump; bindkey "^X" dump\n'
        f"print ready > {answer}\n"
    )
    master, slave = pty.openpty()
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb"}
    shell = subprocess.Popen(
        ["zsh", "-d", "-i"], stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
    )
    os.close(slave)
    pipe = os.open(answer, os.O_RDWR)  # for writing, too: it has no end when one of its writers closes it

    def told() -> str:
        assert select.select([pipe], [], [], PATIENCE_S)[0], "zsh says nothing"
        return os.read(pipe, 4096).decode()

    assert told() == "ready\n"

    def line(typed: str) -> str:
        os.write(master, f"{typed}\t\x18".encode())
        return told().removesuffix("|\n")

    yield line
    shell.kill()
    shell.wait()
    os.close(pipe)
    os.close(master)
