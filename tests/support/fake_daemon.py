"""A daemon that does nothing but keep children, so that a test can kill it. A process of its own.

    python fake_daemon.py RUN_DIR MODE…

Sweeps, starts one programmable child per mode, and when all are ready prints one line of JSON: {"swept": [pid, …],
"pids": [pid, …]}. The mode `tied` is a child that hangs with SIGTERM ignored, but has asked to die with its parent.
Then it waits to be killed; at the end of its stdin it closes its children and exits 0.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlxd.children import ChildSpec, Supervisor
from support.children import PATIENT, QuietLog, Recorder, bad

TIED = """
import signal, sys, time
from mlxd.childside import Pipe, settle
signal.alarm(120)
pipe = Pipe(settle(int(sys.argv[-1])))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pipe.notify("ready", {"pid": 0, "kind": "worker"})
pipe.flush()
time.sleep(3600)
"""


def spec(mode: str) -> ChildSpec:
    if mode == "tied":
        return ChildSpec(kind="worker", name="test/tied", argv=[sys.executable, "-c", TIED])
    return bad(mode)


async def main(run_dir: Path, modes: list[str]) -> None:
    supervisor = Supervisor(run_dir, log=QuietLog(), settings=PATIENT)
    swept = await supervisor.sweep()
    recorders = [Recorder() for _ in modes]
    children = [supervisor.spawn(spec(mode), recorder) for mode, recorder in zip(modes, recorders, strict=True)]
    for recorder in recorders:
        await recorder.until_ready()
    print(json.dumps({"swept": swept, "pids": [child.pid for child in children]}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await supervisor.close(grace_s=1)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), sys.argv[2:]))
