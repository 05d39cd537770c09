"""The models that lie on this disk, and only what the disk says about them. Standard library and msgspec only."""

from __future__ import annotations

from .store import Found, FoundAdapter, Store

__all__ = ["Found", "FoundAdapter", "Store"]
