"""Man pages: one for the command, one for each of its commands, as man(1) reads them, where pip puts such things."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd.cli.main import build_parser
from mlxd.cli.shells import describe

DAEMON = Path(__file__).parents[2] / "daemon"
PAGES = sorted((DAEMON / "man").glob("*.1"))


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers(sub)


def test_each_command_has_a_page() -> None:
    commands = [f"mlxd-{command.name}.1" for command in describe(build_parser())]
    assert sorted([*commands, "mlxd.1"]) == [page.name for page in PAGES]


def test_each_option_says_what_it_does() -> None:
    silent = [
        f"{parser.prog} {action.option_strings or action.dest}"
        for parser in parsers(build_parser())
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert silent == []


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff here")
def test_groff_has_nothing_to_say_about_them() -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", *PAGES], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    shown = re.sub("\x1b\\[[0-9;]*m|.\x08", "", done.stdout)
    for command in describe(build_parser()):
        for word in command.options:
            assert all(flag in shown for flag in word.flags), (command.name, word.flags)


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="there is no mandoc here")
def test_mandoc_has_nothing_to_say_about_them() -> None:
    """But that they have no date: they are as old as the version that they name."""
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", *PAGES], capture_output=True, text=True, timeout=60, check=False
    )
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []


def test_the_wheel_has_them_where_man_looks(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=DAEMON, capture_output=True, text=True, timeout=60, check=True
    )
    names = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()
    found = [name.rpartition("/")[2] for name in names if ".data/data/share/man/man1/" in name]
    assert sorted(found) == [page.name for page in PAGES]
