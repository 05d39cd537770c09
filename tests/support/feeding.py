"""`python feeding.py FILE serve`: a daemon that notes in FILE how many bytes its codec is fed with, each time."""

from __future__ import annotations

import os
import sys
from typing import Any


def main(arguments: list[str]) -> int:
    from mlxd.cli.main import main as command
    from mlxd_client import codec

    file = os.open(arguments[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    class Decoder(codec.Decoder):
        def feed(self, data: Any) -> None:
            os.write(file, b"%d\n" % len(data))
            super().feed(data)

    codec.Decoder = Decoder  # type: ignore[misc]
    return command(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
