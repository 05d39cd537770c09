"""`python -m mlxd.fetch --fd N`: settle as a child, import the hub's library, say `ready`, serve until told to stop.

Exit code 0 after `stop`, SIGTERM or the daemon's end.
"""

from __future__ import annotations

import argparse
import os
import sys

from ..childside import SECRETS, Pipe, PipeClosed, Stopped, settle


def main() -> int:
    parser = argparse.ArgumentParser(prog="mlxd.fetch")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the socketpair to the daemon")
    arguments = parser.parse_args()
    # `settle` takes secrets out of the environment. This child is the one that may have the hub's.
    secrets = {name: os.environ[name] for name in SECRETS if name in os.environ}
    try:
        sock = settle(arguments.fd)
        serve(Pipe(sock), sock.fileno(), secrets)
    except (Stopped, PipeClosed):
        pass
    return 0


def serve(pipe: Pipe, fd: int, secrets: dict[str, str]) -> None:
    import huggingface_hub

    from ..childwire import Ready
    from .hub import Hub
    from .loop import Fetcher

    hub = Hub(secrets)
    versions = {"huggingface_hub": huggingface_hub.__version__}
    pipe.notify("ready", Ready(pid=os.getpid(), kind="fetcher", versions=versions))
    pipe.flush()
    Fetcher(pipe, fd, hub).run()


if __name__ == "__main__":
    code = main()
    # No teardown: connections may still be open, and what has come lies in the parts. The system takes the rest back.
    sys.stderr.flush()
    os._exit(code)
