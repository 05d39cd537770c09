"""Daemons that take over from each other, again and again, while clients stream and connect: nothing may be lost.

    python3 tools/dev.py handovers [--times N] [--streams N]

Prints the table that docs/upgrades.md quotes. The suite has a short form (tests/e2e/test_handovers.py). Exits with 1 at
the first answer that is lost or connection that is refused.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

QUIET_S = 2.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/dev.py handovers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=100, help="how often another daemon takes over (default: 100)")
    parser.add_argument("--streams", type=int, default=4, help="clients that stream all the time (default: 4)")
    options = parser.parse_args(arguments)
    from support.handovers import Load, follow, table
    from support.restarts import Relay

    try:
        with Relay(bad_child="worker") as daemon:
            load = Load(daemon, options.streams)
            with load.running():
                time.sleep(QUIET_S)  # how it is without
                quiet = list(load.waits_s)
                began = time.monotonic()
                worst = follow(daemon, load, options.times)
                took_s = time.monotonic() - began
    except AssertionError:
        traceback.print_exc()
        print("WRONG: see above", flush=True)
        return 1
    print(table(options.times, options.streams, worst, quiet, load.answers, took_s))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
