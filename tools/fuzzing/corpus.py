"""Inputs that showed something new, what they showed, and which of them to change next."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

__all__ = ["Corpus"]

Input = TypeVar("Input")
# Younger inputs are picked more often: this share of all picks is of the newest tenth.
_NEWEST = 0.5


class Corpus(Generic[Input]):
    """Inputs in the order in which they were found.

    Args:
        folder: where they are kept between runs, a file each; None keeps them in memory only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.inputs: list[Input] = []
        self.features: set[Hashable] = set()
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def kept(self, kind: type[Input]) -> list[Input]:
        """What earlier runs found, to be tried anew: what it shows depends on the code."""
        if self._folder is None:
            return []
        return [msgspec.msgpack.decode(file.read_bytes(), type=kind) for file in sorted(self._folder.iterdir())]

    def learn(self, given: Input, features: Iterable[Hashable]) -> bool:
        """Keep an input that shows a feature which none showed before. Returns whether it did."""
        new = set(features) - self.features
        if not new:
            return False
        self.features |= new
        self.inputs.append(given)
        if self._folder is not None:
            data = msgspec.msgpack.encode(given)
            (self._folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        return True

    def pick(self, draw: random.Random) -> Input:
        count = len(self.inputs)
        if draw.random() < _NEWEST:
            return self.inputs[draw.randrange(count * 9 // 10, count)]
        return self.inputs[draw.randrange(count)]
