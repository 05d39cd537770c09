"""Write requirements.lock: `python3 tools/dev.py exec python tools/lock.py [--upgrade]`. Needs uv on PATH.

The lock is universal (one file for Linux and macOS, Python 3.11 to 3.13), pinned and hashed, and names no index: where
packages come from is the business of whoever installs. That is why it is not uv.lock, which records the index of the
machine that wrote it. Pins that still fit are kept, unless `--upgrade` is given.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python3 tools/dev.py exec python tools/lock.py"


def main(arguments: list[str]) -> int:
    upgrade = ["--upgrade"] if "--upgrade" in arguments else []
    return subprocess.call(
        [
            "uv",
            "pip",
            "compile",
            *upgrade,
            *("--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"),
            *("--no-emit-index-url", "--no-emit-find-links", "--custom-compile-command", COMMAND),
            *("--no-emit-package", "mlxd", "--no-emit-package", "mlxd-client"),
            *("--group", "pyproject.toml:dev", "--output-file", "requirements.lock"),
            *("client/pyproject.toml", "daemon/pyproject.toml"),
        ],
        cwd=ROOT,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
