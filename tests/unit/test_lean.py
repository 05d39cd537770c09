"""The daemon without OpenSSL, and with it where something wants more of it than its names."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from mlxd import lean
{before}
lean.without_openssl()
import asyncio, hashlib, uvloop

async def main():
    return type(asyncio.get_running_loop()).__module__

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    loop = runner.run(main())
print(loop, hashlib.sha256(b"x").hexdigest()[:8], "_ssl" in sys.modules)
import ssl
print(ssl.create_default_context().check_hostname)
"""
PICKY = """
real = lean._name
def picky(name):
    if name == "SSL_ERROR_WANT_READ":
        raise AttributeError(name)
    return real(name)
lean._name = picky
"""


@pytest.mark.parametrize(("before", "loaded"), [("", "False"), (PICKY, "True"), ("import ssl", "True")])
def test_what_is_imported_works(before: str, loaded: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["uvloop", "2d711642", loaded, "True"], done.stderr
