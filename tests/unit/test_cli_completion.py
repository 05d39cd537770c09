"""Completion scripts: they hold every command and option, and a real bash completes with them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mlxd.cli.main import build_parser, main
from mlxd.cli.shells import bash, describe, fish, zsh

COMMANDS = list(describe(build_parser()))
SCRIPTS = {"bash": bash(COMMANDS), "zsh": zsh(COMMANDS), "fish": fish(COMMANDS)}


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
    ],
)
def test_bash_completes(words: list[str], found: set[str], tmp_path: Path) -> None:
    fake = tmp_path / "mlxd"
    fake.write_text(
        "#!/bin/sh\ncase $1 in list|catalog|jobs) ;; *) exit 2;; esac\n"
        '[ "$2" = --quiet ] && [ "$3" = --no-start ] || exit 2\necho mlxd/cleanup; echo org/a; echo org/b\n'
    )
    fake.chmod(0o755)
    line = " ".join(f"'{word}'" for word in ["mlxd", *words])
    script = (
        f"{SCRIPTS['bash']}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _mlxd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
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
    ],
)
def test_fish_completes(line: str, found: set[str], tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(SCRIPTS["fish"])
    done = subprocess.run(
        ["fish", "-c", f'source {path}; complete -C "{line}"'], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert {shown.split("\t")[0] for shown in done.stdout.splitlines()} == found
