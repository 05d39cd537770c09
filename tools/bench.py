"""Speed and size of the daemon against mlx_lm and a bare socket, as ratios within one run: one table.

`python3 tools/dev.py bench --help` has the options. What is measured, and how, stands in docs/benchmarks.md.
"""

from __future__ import annotations

import sys

from benchmarks.program import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
