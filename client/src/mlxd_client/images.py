"""Images for a turn's content, from what a program has at hand."""

from __future__ import annotations

import os

from .types import ImagePart

__all__ = ["image"]


def image(source: str | os.PathLike[str] | bytes) -> ImagePart:
    """A file, which the daemon's worker reads when its turn comes, or the bytes of one, which travel with the request.

        client.chat([{"role": "user", "content": ["What is this?", image("cat.png")]}], model=…)

    Args:
        source: a path is taken from the working directory of this process.
    """
    if isinstance(source, bytes):
        return ImagePart(data=source)
    return ImagePart(path=os.path.abspath(os.fspath(source)))
