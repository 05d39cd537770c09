"""`python -m benchmarks.lm_server …`: mlx_lm.server with the BLAS that a worker would take; all else is its own."""

from __future__ import annotations

import runpy

from mlxd.worker.blas import use_blas

if __name__ == "__main__":
    use_blas("auto")
    runpy.run_module("mlx_lm.server", run_name="__main__", alter_sys=True)
