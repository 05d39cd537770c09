"""`python -m mlxd.worker --fd N`: settle as a child, import what is heavy, say `ready`, serve until told to stop.

Exit codes: 0 after `stop`, SIGTERM or the daemon's end; 1 where the engine was lost, with the reason as stderr's last
line.
"""

from __future__ import annotations

import argparse
import os
import sys

from ..childside import Pipe, PipeClosed, Stopped, settle
from .blas import VARIABLE, use_blas


def main() -> int:
    parser = argparse.ArgumentParser(prog="mlxd.worker")
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the socketpair to the daemon")
    arguments = parser.parse_args()
    try:
        pipe = Pipe(settle(arguments.fd))
        # Models are folders here: nothing in this process may ask the hub.
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        return serve(pipe)
    except (Stopped, PipeClosed):
        return 0


def serve(pipe: Pipe) -> int:
    import importlib.metadata

    wished = os.environ.get(VARIABLE) or "auto"
    blas = use_blas(wished)  # comes before whatever imports MLX

    from ..childwire import Ready
    from .faults import EngineLost
    from .loop import Worker
    from .powers import use_powers

    use_powers()
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "transformers")}
    versions["blas"] = f"{blas.name} ({blas.problem})" if blas.problem else blas.name
    pipe.notify("ready", Ready(pid=os.getpid(), kind="worker", versions=versions))
    pipe.flush()
    try:
        Worker(pipe, blas, chosen=wished != "auto").run()
    except EngineLost as error:
        print(f"the engine is lost: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    # No teardown: a step may still be computing, and the system takes everything back at once.
    sys.stderr.flush()
    os._exit(code)
