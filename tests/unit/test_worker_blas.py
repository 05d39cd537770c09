"""Which BLAS a worker multiplies with. What is loaded stays loaded, so that every case is a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxd.worker.blas import cores
from mlxd_client.errors import LoadFailed
from support import tiny_model
from support.daemon import Daemon

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings a fast one")

beside = pytest.mark.skipif(importlib.util.find_spec("scipy_openblas32") is None, reason="it is not installed")

# MLX's products of several shapes, as numbers that mean the same with every BLAS but for rounding.
MULTIPLY = """
import mlx.core as mx
def products():
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    made = []
    for shape in [(1, 64, 96), (8, 96, 200), (130, 70, 33)]:
        m, k, n = shape
        a, b, c = mx.random.normal((m, k)), mx.random.normal((k, n)), mx.random.normal((n, k))
        d, e = mx.random.normal((3, m, k)), mx.random.normal((3, k, n))
        for made_one in (a @ b, a @ c.T, b.T @ a.T, d @ e):
            made.append(made_one.sum(axis=-1).reshape(-1)[:7].tolist())
    return made
"""


def python(code: str, *arguments: object) -> Any:
    """What a new Python says, as JSON, on its last line."""
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # several would wait for each other where tests share the cores
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def chosen(wished: object, before: str = "", after: str = "None") -> Any:
    """(name, problem, what `after` is) of a process that wished for it."""
    code = "import json, sys\nfrom mlxd.worker.blas import use_blas\n"
    code += f"{before}\nblas = use_blas(sys.argv[1])\nprint(json.dumps([blas.name, blas.problem, {after}]))"
    return python(code, wished)


@beside
def test_the_one_beside_the_daemon_is_taken_and_says_its_name() -> None:
    name, problem, loaded = chosen("auto", after="'mlx' in sys.modules or 'numpy' in sys.modules")
    assert name.startswith("OpenBLAS ")
    assert problem == ""
    assert loaded is False  # both would be too early


@beside
@pytest.mark.model
def test_products_are_the_same_but_for_rounding() -> None:
    code = "import json, sys\nfrom mlxd.worker.blas import use_blas\nuse_blas(sys.argv[1])\n" + MULTIPLY
    fast, slow = (python(code + "print(json.dumps(products()))", wished) for wished in ("auto", "bundled"))
    assert fast != slow  # another order of summing: the same would mean that nothing was changed
    for one, other in zip(fast, slow, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-3)


@pytest.mark.model
def test_mlx_calls_what_the_names_are_made_to_mean() -> None:
    code = """
import ctypes, json
from mlxd.worker.alias import alias
kinds = [ctypes.c_int] * 6 + [ctypes.c_float, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
kinds += [ctypes.c_float, ctypes.c_void_p, ctypes.c_int]
calls = []
@ctypes.CFUNCTYPE(None, *kinds)
def multiply(*arguments):
    calls.append(arguments[3:6])
    ctypes.cast(arguments[12], ctypes.POINTER(ctypes.c_float))[0] = 7.0
alias({"cblas_sgemm": ctypes.cast(multiply, ctypes.c_void_p).value})
import mlx.core as mx
mx.set_default_device(mx.cpu)
first = (mx.ones((2, 3)) @ mx.ones((3, 5)))[0, 0].item()
print(json.dumps([calls, first]))
"""
    assert python(code) == [[[2, 5, 3]], 7.0]


def test_the_bundled_one_is_taken_where_that_is_wished() -> None:
    assert chosen("bundled") == ["bundled", "", None]


def test_what_cannot_be_used_is_told_and_the_bundled_one_is_taken(tmp_path: Path) -> None:
    (tmp_path / "garbage.so").write_bytes(b"\x7fELF" + bytes(range(256)))
    for path, reason in ((tmp_path / "none.so", "No such file"), (tmp_path / "garbage.so", "garbage.so")):
        name, problem, _ = chosen(path)
        assert name == "bundled"
        assert reason in problem
    name, problem, _ = chosen("libc.so.6")
    assert (name, problem) == ("bundled", "libc.so.6 has no cblas_sgemm")


def test_one_that_multiplies_wrongly_is_not_taken(tmp_path: Path) -> None:
    """The names are there; what they mean is `getpid`."""
    path = tmp_path / "wrong.so"
    before = f"""
import ctypes
from mlxd.worker import alias
pid = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value
like = open("/proc/self/exe", "rb").read(64)
names = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
open({str(path)!r}, "wb").write(alias.shared_object(like, dict.fromkeys(names, pid)))
"""
    name, problem, _ = chosen(path, before)
    assert name == "bundled"
    assert "wrong products" in problem


def test_a_machine_of_another_kind_has_no_aliases() -> None:
    code = """
import json
from mlxd.worker.alias import shared_object
try:
    shared_object(b"\\x7fELF\\x01\\x01" + bytes(58), {"one": 1})
except OSError as error:
    print(json.dumps(str(error)))
"""
    assert "64-bit" in python(code)


@beside
def test_threads_are_as_many_as_this_process_has_cores_or_as_the_user_says() -> None:
    count = "__import__('os').environ['OPENBLAS_NUM_THREADS']"
    name, _, left = chosen("auto", "import os\nos.environ.pop('OPENBLAS_NUM_THREADS', None)", count)
    assert name.endswith(f", {cores()} threads")
    assert left == "1"  # for numpy's own, which has nothing to do
    name, _, fixed = chosen("auto", "import os\nos.environ['OPENBLAS_NUM_THREADS'] = '01'", f"[{count}, blas.threads]")
    assert (name.endswith(", 1 threads"), fixed) == (True, ["01", None])


@beside
def test_their_number_can_be_changed_while_it_runs() -> None:
    before = "import os\nos.environ.pop('OPENBLAS_NUM_THREADS')"
    told = "[ctypes.CDLL(path).scipy_openblas_get_num_threads() for path in maps()]"
    after = f"[blas.threads._use(1), {told}, blas.threads._use(2), {told}]"
    before += """
import ctypes
def maps():
    return {line.split()[-1] for line in open("/proc/self/maps") if "libscipy_openblas.so" in line}
"""
    assert chosen("auto", before, after)[2] == [None, [1], None, [min(2, cores())]]


@pytest.mark.model
def test_a_model_does_not_load_on_a_library_that_cannot_be_used(tmp_path: Path) -> None:
    model = tiny_model.build(tmp_path / "tiny")
    with (
        Daemon(blas="/nowhere/libfast.so") as daemon,
        daemon.client() as client,
        pytest.raises(LoadFailed, match=r"`blas`.*/nowhere/libfast\.so"),
    ):
        client.load(str(model))


@pytest.mark.model
def test_the_log_says_which_one_is_in_use(tmp_path: Path) -> None:
    model = tiny_model.build(tmp_path / "tiny")
    with Daemon(blas="bundled") as daemon, daemon.client() as client:
        client.load(str(model))
        assert '"blas":"bundled"' in (daemon.home / "logs" / "mlxd.log").read_text().replace(" ", "").replace("'", '"')
