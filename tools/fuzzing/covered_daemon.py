"""`python -m fuzzing.covered_daemon MAP ARG…`: the `mlxd` command, with each block of it that ran marked in a file.

Whoever maps the same file sees what a daemon did while it serves.
"""

from __future__ import annotations

import mmap
import sys

from fuzzing.covering import install

COVERED = ("mlxd.", "mlxd_client.codec", "mlxd_client.errors")


def main(arguments: list[str]) -> int:
    with open(arguments[0], "r+b") as file:
        hits = mmap.mmap(file.fileno(), 0)
    install(COVERED, hits)
    from mlxd.cli.main import main as mlxd

    return mlxd(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
