"""`python -m mlxd.worker.trial PARENT`: compile the rule on standard input, and exit 0 if that ended; it may be lost.

llguidance counts most of what compiling costs, but not how long it looks for a text that several regular expressions
match at once, which may be for ever, nor how deep its stack gets. A thread cannot be stopped, or overflow alone; a
process can.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ..childside import PipeClosed, die_with_parent

# What one trial may take: seconds of one core, of the clock, and bytes.
CPU_S, WALL_S, MEMORY_BYTES = 3, 20.0, 1024**3
# Where the kernel does not tell of the parent's end, a trial that lost it goes on for so long at most, in seconds.
ALONE_S = 9

LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=500_000,
    max_items_in_row=2_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,  # one or two KB each
    verbose_errors=False,
)


def ends(source: str) -> bool:
    """Whether compiling `source`, a rule as llguidance takes it, comes to an end, be it by an error."""
    command = [sys.executable, "-m", "mlxd.worker.trial", str(os.getpid())]
    try:
        done = subprocess.run(
            command,
            input=source.encode("utf-8", "replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=WALL_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> None:
    try:
        die_with_parent(int(sys.argv[1]))
    except PipeClosed:
        return
    if sys.platform != "linux":
        signal.alarm(ALONE_S)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.buffer.read().decode(), log_level=0, limits=LIMITS)
    matcher.compute_bitmask()


if __name__ == "__main__":
    main()
