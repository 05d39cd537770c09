"""Gives functions of one library the names under which another one calls them.

Writes a shared object that holds nothing but symbols: each a name and an absolute address of this process. Loaded for
everybody, before whoever calls those names is, the dynamic linker takes these first, as it does with LD_PRELOAD; no
code is written or patched. ELF, 64 bits, little-endian; glibc since 2.28 takes absolute symbols as they are.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping

__all__ = ["alias", "shared_object"]

_FORMS = ("<16sHHIQQQIHHHHHH", "<IIQQQQQQ", "<IBBHQQ", "<qQ")
_HEADER, _PROGRAM, _SYMBOL, _TAG = (struct.Struct(form) for form in _FORMS)
_SHARED, _LOAD, _DYNAMIC, _STACK, _READ_WRITE = 3, 1, 2, 0x6474E551, 6
_GLOBAL_FUNCTION, _ABSOLUTE = 0x12, 0xFFF1
_END, _HASH, _STRINGS, _SYMBOLS, _STRINGS_SIZE, _SYMBOL_SIZE, _NAME = 0, 4, 5, 6, 10, 11, 14
_OWN_NAME = "mlxd-alias"


def alias(addresses: Mapping[str, int]) -> None:
    """Make each name mean the function at its address, for all that is loaded from here on.

    Raises:
        OSError: this system's dynamic linker does not take it.
    """
    with open("/proc/self/exe", "rb") as file:
        image = shared_object(file.read(_HEADER.size), addresses)
    fd = os.memfd_create(_OWN_NAME)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(image)
        ctypes.CDLL(f"/proc/self/fd/{fd}", ctypes.RTLD_GLOBAL)
    finally:
        os.close(fd)
    everything = ctypes.CDLL(None)
    for name, address in addresses.items():
        found = ctypes.cast(getattr(everything, name), ctypes.c_void_p).value
        if found != address:
            raise OSError(f"{name} is at {found:#x}, not at {address:#x}")


def shared_object(like: bytes, addresses: Mapping[str, int]) -> bytes:
    """The bytes of the library. `like` is the ELF header of a program for the same machine.

    Raises:
        OSError: that is no 64-bit little-endian ELF.
    """
    if like[:6] != b"\x7fELF\x02\x01":
        raise OSError("programs here are no 64-bit little-endian ELF files")
    ident, _, machine, _, _, _, _, flags, *_ = _HEADER.unpack_from(like)

    strings, offsets = b"\0", []
    for name in (_OWN_NAME, *addresses):
        offsets.append(len(strings))
        strings += name.encode() + b"\0"
    strings += bytes(-len(strings) % 8)
    symbols = bytes(_SYMBOL.size) + b"".join(
        _SYMBOL.pack(offset, _GLOBAL_FUNCTION, 0, _ABSOLUTE, address, 0)
        for offset, address in zip(offsets[1:], addresses.values(), strict=True)
    )
    # One bucket, which chains all symbols: 1, 2, … and the end.
    count = len(addresses) + 1
    table = struct.pack(f"<{3 + count}I", 1, count, 1, 0, *range(2, count), 0)
    table += bytes(-len(table) % 8)

    programs = 3
    at_strings = _HEADER.size + programs * _PROGRAM.size
    at_symbols = at_strings + len(strings)
    at_table = at_symbols + len(symbols)
    at_tags = at_table + len(table)
    tags = [
        (_HASH, at_table), (_STRINGS, at_strings), (_SYMBOLS, at_symbols), (_STRINGS_SIZE, len(strings)),
        (_SYMBOL_SIZE, _SYMBOL.size), (_NAME, offsets[0]), (_END, 0),
    ]  # fmt: skip
    dynamic = b"".join(_TAG.pack(*tag) for tag in tags)
    size = at_tags + len(dynamic)
    header = _HEADER.pack(
        ident, _SHARED, machine, 1, 0, _HEADER.size, 0, flags, _HEADER.size, _PROGRAM.size, programs, 0, 0, 0
    )
    segments = (
        _PROGRAM.pack(_LOAD, _READ_WRITE, 0, 0, 0, size, size, 0x10000),
        _PROGRAM.pack(_DYNAMIC, _READ_WRITE, at_tags, at_tags, at_tags, len(dynamic), len(dynamic), 8),
        _PROGRAM.pack(_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16),
    )
    return b"".join((header, *segments, strings, symbols, table, dynamic))
