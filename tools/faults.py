"""Faults, injected into real daemons for as long as one likes, and what docs/guarantees.md promises checked meanwhile.

    python3 tools/dev.py faults starts [--starts N] [--seed N]      daemons that start against each other and are killed
                                                                    at every step of it
    python3 tools/dev.py faults crowd [--clients N] [--rounds N]    what 1,000 clients, most of them followers of
                                                                    events, cost the others
    python3 tools/dev.py faults answers [--seconds S] [--seed N]    requests, while workers and daemons are killed
    python3 tools/dev.py faults mirrors [--steps N] [--seed N]      followers of events, while all is restarted
    python3 tools/dev.py faults deaths [--rounds N]                 real workers that die of each cause, and how soon it
                                                                    is told
    python3 tools/dev.py faults orphans [--rounds N]                daemons killed that have a child in every state, and
                                                                    how long each lives on
    python3 tools/dev.py faults stop [--rounds N]                   daemons told to end under full load, and how long
                                                                    they take
    python3 tools/dev.py faults failpoints                          daemons killed before each of their steps on disk
    python3 tools/dev.py faults handovers [--place PLACE]           the old or the new daemon killed, failing, hanging
                                                                    or told to end at each step of a handover

The suite has the short forms (tests/faults). Each run has a folder of its own; the first thing that is wrong ends it,
and it exits with 1 then. The same seed draws the same faults; their moments are the machine's.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/dev.py faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--seconds", type=_positive, default=60.0, help="how long; 60 where it is not given")
    parser.add_argument("--steps", type=int, default=10_000, help="how many; 10000 where it is not given")
    parser.add_argument("--rounds", type=int, default=5, help="how often each; 5 where it is not given")
    parser.add_argument("--starts", type=int, default=500, help="how many; 500 where it is not given")
    parser.add_argument("--clients", type=int, default=1000, help="how many; 1000 where it is not given")
    parser.add_argument(
        "--place", choices=("alone", "systemd", "launchd", "joined"), help="one only; all where it is not given"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="drawn where it is not given")
    options = parser.parse_args(arguments)
    print(f"{options.what}, seed {options.seed}", flush=True)
    began = time.monotonic()
    try:
        lines = COMMANDS[options.what](options)
    except AssertionError:
        sys.stdout.flush()
        traceback.print_exc()
        print("WRONG: see above", flush=True)
        return 1
    print(*lines, f"all as promised, in {time.monotonic() - began:.0f} s", sep="\n", flush=True)
    return 0


def _positive(text: str) -> float:
    if float(text) <= 0:
        raise argparse.ArgumentTypeError("more than 0")
    return float(text)


def _table(tally: Counter[str]) -> list[str]:
    return [f"{count:9,}  {what}" for what, count in sorted(tally.items())]


def starts(options: argparse.Namespace) -> list[str]:
    from support.starts import StartLoop

    with StartLoop(options.seed, lambda line: None) as loop:
        try:
            loop.run(options.starts)
        finally:
            print(f"{loop.starts:9,}  starts", *_table(loop.tally), sep="\n", flush=True)
    return []


def crowd(options: argparse.Namespace) -> list[str]:
    from support.crowd import Shape
    from support.crowded import measure
    from support.daemon import Daemon

    with Daemon() as daemon:
        figures = measure(daemon, options.clients, options.rounds, 10.0)
    shape, (before, after) = Shape.of(options.clients), figures.rss_bytes
    lines = [", ".join(f"{count} {name}" for name, count in shape._asdict().items())]
    for (alone, beside), seen in zip(figures.speeds, figures.seen, strict=True):
        late = ", ".join(f"{late * 1e3:.1f}" for late in seen.late)
        lines.append(f"{alone:8,.0f} tokens/s alone, {beside:8,.0f} beside the crowd ({beside / alone:.3f})")
        lines.append(f"{seen.events:8,} events, late by {late} ms (median, 90 %, 99 %, worst); {seen.lost} lost")
    lines.append(
        f"{figures.ratio:8.3f} of its speed; {before / 1e6:.1f} MB with all connected, {after / 1e6:.1f} at most"
    )
    print(*lines, sep="\n", flush=True)
    assert not any(seen.lost for seen in figures.seen), "a follower was cut off, or told that it lags"
    assert figures.late_s <= 0.1, f"events are {figures.late_s * 1e3:.0f} ms late"
    assert figures.ratio >= 0.95, f"generation has {figures.ratio:.3f} of its speed"
    return []


def answers(options: argparse.Namespace) -> list[str]:
    from support.daemon import Daemon
    from support.ledger import SETTINGS, Ledger

    with Daemon(bad_child="worker", **SETTINGS) as daemon:
        return _table(Ledger(daemon, options.seed).run(options.seconds))


def mirrors(options: argparse.Namespace) -> list[str]:
    from support.daemon import Daemon
    from support.hub import Hub
    from support.mirrors import SETTINGS, Followed

    with Hub() as hub, Daemon(bad_child="worker", env=hub.env(), **SETTINGS) as daemon:
        return _table(Followed(daemon, hub, options.seed).run(options.steps))


def deaths(options: argparse.Namespace) -> list[str]:
    from support import tiny_model
    from support.deaths import CAUSES, Dying, possible

    lines = [
        f"{'cause':22} {'median':>8} {'worst':>8}   until two answers in the middle of decoding have ended with it"
    ]
    with tempfile.TemporaryDirectory(prefix="mlxd-") as folder, Dying.daemon_of() as daemon:
        dying = Dying(daemon, str(tiny_model.build(Path(folder).resolve() / "model", context=500_000)))
        for name, cause in CAUSES.items():
            if not possible(name):
                lines.append(f"{name:22} not possible here")
                continue
            times = [dying.die(name) for _ in range(options.rounds)]
            assert max(times) <= cause.within_s, f"{name}: {max(times):.3f} s"
            lines.append(f"{name:22} {statistics.median(times):6.3f} s {max(times):6.3f} s")
    return lines


def orphans(options: argparse.Namespace) -> list[str]:
    from support.household import LIMIT_S, Household
    from support.hub import Hub

    lived: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        with (
            tempfile.TemporaryDirectory(prefix="mlxd-") as folder,
            Hub() as hub,
            Household.daemon_of(hub) as daemon,
        ):
            house = Household(daemon, hub, Path(folder).resolve())
            for name, seconds in house.bury(house.fill()).items():
                lived.setdefault(name if not name.isdigit() else "the grandchild's parent", []).append(seconds)
    for name, times in lived.items():
        assert max(times) < LIMIT_S, f"a child {name} lived on for {max(times):.1f} s"
    lines = [f"{'a child that is':30} {'median':>8} {'worst':>8}   until it is gone"]
    return lines + [
        f"{name:30} {statistics.median(times):6.2f} s {max(times):6.2f} s" for name, times in sorted(lived.items())
    ]


def stop(options: argparse.Namespace) -> list[str]:
    from support.fullload import EXTRA_S, SIGNALS, FullLoad
    from support.hub import Hub

    lines = [f"{'by':10} {'drain':>8} {'median':>8} {'worst':>8}   until it has ended, with status 0"]
    for how, signals in SIGNALS.items():
        drain_s, times = 3600.0 if how == "twice" else 2.0, []
        for _ in range(options.rounds):
            with Hub() as hub, FullLoad.daemon_of(hub, drain_s=drain_s) as daemon:
                load = FullLoad(daemon, hub)
                load.begin()
                times.append(load.end(*signals))
                load.close()
        assert max(times) < EXTRA_S + (0 if how == "twice" else drain_s), f"{how}: {max(times):.2f} s"
        lines.append(f"{how:10} {drain_s:6.0f} s {statistics.median(times):6.2f} s {max(times):6.2f} s")
    return lines


def failpoints(options: argparse.Namespace) -> list[str]:
    from support.failpoints import Failpoints
    from support.hub import Hub

    step, kills = 0, 0
    with Hub() as hub:
        points = Failpoints(hub)
        while not points.steps or step < points.steps:
            step += 1
            kills += points.kill_at(step)
    return [f"{kills} kills, one before each step; each time the next daemon found old or new files, and went on"]


def handovers(options: argparse.Namespace) -> list[str]:
    from support.handover_faults import PLACES, Handovers, faults

    tally: Counter[str] = Counter()
    for place in PLACES if options.place is None else (options.place,):
        with Handovers(place, options.seed) as loop:
            try:
                for fault in faults(place):
                    loop.run(fault)
            finally:
                tally += loop.tally
                print(*_table(loop.tally), sep="\n", flush=True)
    return [f"{sum(tally[name] for name in tally if ': the ' in name)} handovers with a fault"]


COMMANDS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "starts": starts, "crowd": crowd, "answers": answers, "mirrors": mirrors, "deaths": deaths, "orphans": orphans,
    "stop": stop, "failpoints": failpoints, "handovers": handovers,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
