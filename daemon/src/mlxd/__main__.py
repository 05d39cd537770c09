"""`python -m mlxd` is the `mlxd` command."""

from __future__ import annotations

import sys

from mlxd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
