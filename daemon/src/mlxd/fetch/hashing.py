"""Whether what has come is right: each file's front is read back and hashed while the rest is still on its way."""

from __future__ import annotations

import errno

from mlxd_client.errors import ModelInvalid, VerificationFailed

from ..store.layout import RepoCache
from ..store.safetensors import SafetensorsError, check_safetensors
from .listing import CONFIG, MAX_JSON_BYTES, parse_object
from .targets import Target


def read_front(target: Target, buffer: memoryview) -> None:
    """Hash what is there without a gap and has not been hashed. Raises OSError, Closed."""
    part, hasher = target.opened
    while (end := target.front) > target.hashed:
        while target.hashed < end:
            count = part.read(buffer[: end - target.hashed], target.hashed)
            if not count:
                raise OSError(errno.EIO, "the part became shorter")
            hasher.update(buffer[:count])
            target.hashed += count


def judge(target: Target, cache: RepoCache) -> bool:
    """The file is whole: put it in its place if its bytes are right. Returns whether they were.

    Raises:
        VerificationFailed, ModelInvalid: they are what the hub has, and that is no sound file; another attempt would
            bring the same.
        OSError: the disk failed.
    """
    file, (part, hasher) = target.file, target.opened
    if not hasher.matches():
        return False
    if file.name.endswith(".safetensors"):
        try:
            check_safetensors(cache.part(file.oid))
        except SafetensorsError as error:
            raise VerificationFailed(
                f"{file.name} is no sound file on the hub itself: {error}", file=file.name, attempts=1,
                reason="safetensors",
            ) from None  # fmt: skip
    if file.name == CONFIG:
        if file.size > MAX_JSON_BYTES:
            raise ModelInvalid(f"{CONFIG} is larger than {MAX_JSON_BYTES} bytes", file=CONFIG)
        parse_object(cache.part(file.oid).read_bytes(), CONFIG)
    part.finish()
    return True
