"""Fuzzers: broken frames for the codec, broken conversations for a live daemon, mixed requests for the engine.

    python3 tools/dev.py fuzz [EXECUTIONS]          streams for the codec, guided by its coverage
    python3 tools/dev.py fuzz --session [FRAMES]    conversations for a daemon, guided by its coverage
    python3 tools/dev.py fuzz --engine [RUNS]       requests of every kind mixed; see tests/support/mix.py

What is looked for stands in tools/fuzzing/codec_fuzzer.py and session_fuzzer.py. Exits 1 where anything was found.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

EXECUTIONS, FRAMES, RUNS = 1_000_000, 100_000, 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/dev.py fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, help=f"default: {EXECUTIONS:,}, {FRAMES:,} or {RUNS}")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--session", action="store_true", help="conversations with a live daemon")
    target.add_argument("--engine", action="store_true", help="mix requests of every kind on a tiny model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so long, if the count is not reached before")
    parser.add_argument("--corpus", type=Path, help="a folder where inputs that showed something new lie between runs")
    options = parser.parse_args()
    usual = RUNS if options.engine else FRAMES if options.session else EXECUTIONS
    count = options.count or (None if options.seconds else usual)
    if options.engine:
        return engine(count, options.seed, options.seconds)
    fuzz = session if options.session else codec
    return report(fuzz(count, options.seed, options.seconds, options.corpus))


def codec(count: int | None, seed: int, seconds: float | None, corpus: Path | None) -> list[str]:
    from fuzzing.codec_fuzzer import fuzz

    told = fuzz(count, seed, seconds=seconds, folder=corpus)
    rate = told.executions / max(told.seconds, 1e-9)
    print(f"{told.executions:,} executions in {told.seconds:.1f} s ({rate:,.0f}/s), seed {seed}")
    print(f"{told.messages:,} messages, {told.invalid:,} invalid, {told.errors:,} protocol errors")
    print(f"{told.blocks} of {told.all_blocks} blocks of the codec ran; {told.kept} streams showed something new")
    return told.findings


def session(count: int | None, seed: int, seconds: float | None, corpus: Path | None) -> list[str]:
    from fuzzing.session_fuzzer import fuzz

    told = fuzz(count, seed, seconds=seconds, folder=corpus)
    rate = told.frames / max(told.seconds, 1e-9)
    print(f"{told.frames:,} frames in {told.seconds:.1f} s ({rate:,.0f}/s), seed {seed}")
    print(f"{told.connections:,} connections in {told.talks:,} conversations; {told.kept} showed something new")
    print(f"{told.blocks:,} blocks of the daemon ran")
    print("refused: " + ", ".join(f"{number:,} {kind}" for kind, number in told.refusals.most_common()))
    before, after = told.rss_bytes
    print(f"memory {before / 1e6:.1f} MB after a tenth, {after / 1e6:.1f} MB at the end; descriptors ", end="")
    print(*told.files, sep=", ")
    return told.findings


def report(findings: list[str]) -> int:
    for finding in findings[:20]:
        print("FINDING", finding)
    print(f"{len(findings)} findings")
    return 1 if findings else 0


def engine(runs: int | None, seed: int, seconds: float | None) -> int:
    """Run mixes of 60 requests each, by seeds from `seed` on. Returns the exit status."""
    from support.mix import Mix, Models

    findings = []
    with tempfile.TemporaryDirectory(prefix="mlxd-mix-") as folder:
        models = Models(Path(folder))
        deadline = time.perf_counter() + seconds if seconds else math.inf
        for number in itertools.count(seed) if runs is None else range(seed, seed + runs):
            began = time.perf_counter()
            if began >= deadline:
                break
            try:
                told = dict(Mix(models, number).run(60))
                print(f"seed {number}: {time.perf_counter() - began:.1f} s, {told}", flush=True)
            except AssertionError as error:
                findings.append(str(error))
    return report(findings)


if __name__ == "__main__":
    sys.exit(main())
