"""Which BLAS multiplies MLX's matrices on a Linux CPU: the wheel's own is the reference one, tens of times slower than
OpenBLAS. Chosen before MLX is imported, by the names that MLX calls; on other systems nothing is done.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .alias import alias
from .threads import Threads

__all__ = ["BUNDLED", "VARIABLE", "Blas", "BlasUnusable", "cores", "use_blas"]

# How the daemon tells its workers what its setting says: `auto`, `bundled`, or a library's absolute path.
VARIABLE = "MLXD_BLAS"
BUNDLED = "bundled"
# All that MLX calls of a BLAS itself. Its LAPACK, which no language model needs, keeps the bundled one.
_CALLED = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
# Names that builds of OpenBLAS give their functions: as everybody does, and as the wheels for Python do.
_PREFIXES = ("", "scipy_")
# Where a system has it, threads first: Debian has one of the first name, Fedora one of each.
_SYSTEM = ("libopenblasp.so.0", "libopenblas.so.0")
_THREADS = "OPENBLAS_NUM_THREADS"
_ROWS, _NO, _TRANSPOSED = 101, 111, 112


class BlasUnusable(Exception):
    """A library that is no BLAS MLX could call; the message says why."""


@dataclass(frozen=True, slots=True)
class Blas:
    """`name` for logs and reports; `problem` why the wished one is not in use, where it is not; `threads` of one whose
    number can be changed while it runs, unless the user has set it."""

    name: str
    problem: str = ""
    threads: Threads | None = None


def use_blas(wished: str) -> Blas:
    """Have MLX, which must not be imported yet, call the wished BLAS.

    Args:
        wished: `auto` takes the first that works: the one installed beside the daemon, the system's, the bundled one;
            `bundled` and a path take that one.
    """
    if sys.platform != "linux":
        return Blas("system")
    if wished == BUNDLED:
        return Blas(BUNDLED)
    problems = []
    for path in _candidates() if wished == "auto" else [wished]:
        try:
            return _take(path)
        except BlasUnusable as error:
            problems.append(str(error))
    return Blas(BUNDLED, "; ".join(problems))


def _candidates() -> list[str]:
    beside = importlib.util.find_spec("scipy_openblas32")
    folders = (beside.submodule_search_locations or ()) if beside is not None else ()
    return [*(str(file) for folder in folders for file in Path(folder, "lib").glob("lib*.so")), *_SYSTEM]


def _take(path: str) -> Blas:
    """Load the library, try it, and give its functions the names that MLX calls."""
    limited = _THREADS not in os.environ and "OMP_NUM_THREADS" not in os.environ
    if limited:
        os.environ[_THREADS] = str(cores())
    try:
        library = ctypes.CDLL(path)
        prefix = next((prefix for prefix in _PREFIXES if hasattr(library, prefix + _CALLED[0])), None)
        if prefix is None:
            raise BlasUnusable(f"{path} has no {_CALLED[0]}")
        name = _describe(library, prefix)
        _try(getattr(library, f"{prefix}cblas_sgemm"), ctypes.c_float, path)
        _try(getattr(library, f"{prefix}cblas_dgemm"), ctypes.c_double, path)
        alias({name: _address(getattr(library, prefix + name)) for name in _CALLED})
    except (OSError, AttributeError) as error:
        raise BlasUnusable(f"{path}: {error}") from None
    finally:
        if limited:
            # numpy brings an OpenBLAS too, which reads the same variable and has nothing to do here.
            os.environ[_THREADS] = "1"
    use = getattr(library, f"{prefix}openblas_set_num_threads", None)
    if use is None or not limited:
        return Blas(name or path)
    use.argtypes, use.restype = [ctypes.c_int], None
    return Blas(name or path, threads=Threads(cores(), use))


def _describe(library: Any, prefix: str) -> str:
    """What an OpenBLAS says of itself; "" for others. Raises BlasUnusable where its integers are not MLX's."""
    told = getattr(library, f"{prefix}openblas_get_config", None)
    if told is None:
        return ""
    told.restype = ctypes.c_char_p
    words = told().decode(errors="replace").split()
    if "USE64BITINT" in words:
        raise BlasUnusable("that OpenBLAS counts in 64 bits, MLX in 32")
    return f"{' '.join(words[:2])}, {getattr(library, f'{prefix}openblas_get_num_threads')()} threads"


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _try(multiply: Any, number: Any, path: str) -> None:
    """Products of whole numbers, which are exact in any order, as MLX asks for them: either side may be transposed."""
    m, n, k = 5, 9, 17
    a = [[(3 * row + 5 * column) % 11 - 4 for column in range(k)] for row in range(m)]
    b = [[(7 * row + 2 * column) % 13 - 6 for column in range(n)] for row in range(k)]
    right = [sum(a[row][i] * b[i][column] for i in range(k)) for row in range(m) for column in range(n)]
    for turn_a in (_NO, _TRANSPOSED):
        for turn_b in (_NO, _TRANSPOSED):
            made = (number * (m * n))()
            flat_a = [value for line in (a if turn_a == _NO else zip(*a, strict=True)) for value in line]
            flat_b = [value for line in (b if turn_b == _NO else zip(*b, strict=True)) for value in line]
            sizes = (ctypes.c_int(m), ctypes.c_int(n), ctypes.c_int(k))
            wide_a, wide_b = (k if turn_a == _NO else m), (n if turn_b == _NO else k)
            multiply(
                _ROWS, turn_a, turn_b, *sizes, number(1.0), (number * (m * k))(*flat_a), ctypes.c_int(wide_a),
                (number * (k * n))(*flat_b), ctypes.c_int(wide_b), number(0.0), made, ctypes.c_int(n),
            )  # fmt: skip
            if list(made) != right:
                raise BlasUnusable(f"{path} gives wrong products")


def cores() -> int:
    """How many cores this process may keep busy: the ones it may run on, within its control group's share."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        share = math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no control groups, or "max": no limit
        return allowed
    return max(1, min(allowed, share))
