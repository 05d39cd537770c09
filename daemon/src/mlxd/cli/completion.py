"""`mlxd completion`: a script for a shell."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .common import Commands, add_command
from .exits import OK

if TYPE_CHECKING:
    from .output import Output

_WHERE = {
    "bash": "~/.local/share/bash-completion/completions/mlxd",
    "zsh": 'a folder of your $fpath, as "_mlxd"',
    "fish": "~/.config/fish/completions/mlxd.fish",
}


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    places = "; ".join(f"{shell}: {place}" for shell, place in _WHERE.items())
    parser = add_command(
        commands, "completion", completion, "print a completion script for a shell", daemon=False,
        epilog=f"Where the script goes: {places}.",
    )  # fmt: skip
    parser.add_argument("shell", choices=tuple(_WHERE), help="the shell that shall complete")


def completion(args: argparse.Namespace, output: Output) -> int:
    from . import shells
    from .main import build_parser

    write = {"bash": shells.bash, "zsh": shells.zsh, "fish": shells.fish}[args.shell]
    output.out.write(write(list(shells.describe(build_parser()))))
    return OK
