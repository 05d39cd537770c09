"""Spares the daemon OpenSSL, which takes nearly five of its megabytes: asyncio and uvloop import it for connections
with TLS, of which the daemon has none, and hashlib for hashes that the interpreter has, too."""

from __future__ import annotations

import sys
import types
from typing import Any

__all__ = ["without_openssl"]

_IMPORTERS = frozenset({"asyncio", "hashlib", "hmac", "uvloop"})


def without_openssl() -> None:
    """Import what would load OpenSSL with stand-ins for it, as far as none of that is there yet.

    Of `ssl`, asyncio and uvloop only keep names, to compare with later; whoever asked them for TLS would be refused.
    What imports `ssl` afterwards gets the real one. Hashes are slower by far than OpenSSL's: whole models are hashed by
    fetchers, and the daemon only small things. Where a version of any of these wants more, it gets all of it.
    """
    if not ({"ssl", "_hashlib"} | _IMPORTERS).isdisjoint(sys.modules):
        return
    stand_in = types.ModuleType("ssl", without_openssl.__doc__)
    stand_in.__getattr__ = _name  # type: ignore[method-assign]
    sys.modules["ssl"] = stand_in
    sys.modules["_hashlib"] = None  # type: ignore[assignment]  # its import fails, which hashlib is prepared for
    try:
        _import_all()
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] in _IMPORTERS]:
            del sys.modules[name]
    finally:
        del sys.modules["ssl"], sys.modules["_hashlib"]


def _import_all() -> None:
    import asyncio  # noqa: F401
    import hashlib
    import hmac  # noqa: F401

    import uvloop  # noqa: F401

    hashlib.sha256(b"")  # an interpreter may have been built without any of its own


def _name(name: str) -> Any:
    """An error that nothing ever raises, a class that nothing is of, or a number."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name.isupper():
        return 0
    return type(name, (OSError if name.endswith("Error") else object,), {})
