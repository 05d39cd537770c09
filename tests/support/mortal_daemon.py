"""`python mortal_daemon.py STEP serve`: a daemon that is killed (SIGKILL) before it changes its folder the STEPth time.

Counted are the deeds of hubcache.DEEDS and files opened for writing below MLXD_HOME, in whichever thread; the log's own
are left out. How many there were is written to the file named by MORTAL_DAEMON where it ends otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlxd.cli.main import main
from support.hubcache import DEEDS


def count(step: int) -> list[int]:
    """Returns the count, which goes on."""
    home, logs = os.environ["MLXD_HOME"] + "/", os.environ["MLXD_HOME"] + "/logs"
    done = [0]

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            if not int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in DEEDS and event != "sqlite3.connect":
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if path.startswith(home) and not path.startswith(logs):
            done[0] += 1
            if done[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return done


if __name__ == "__main__":
    done = count(int(sys.argv.pop(1)))
    status = main()
    Path(os.environ["MORTAL_DAEMON"]).write_text(str(done[0]))
    sys.exit(status)
