"""Every setting of the daemon: the struct (table.py), what each may be (values.py), where values come from
(sources.py)."""

from __future__ import annotations

from .sources import MAX_FILE_BYTES, Loaded, config_file, load, read_file
from .table import APPLIES, LIVE, LOG_LEVELS, NOT_BY_CLIENTS, LogLevel, Settings, SettingsError
from .values import Origin, check, from_text, name_and_key, unknown

__all__ = [
    "APPLIES", "LIVE", "LOG_LEVELS", "MAX_FILE_BYTES", "NOT_BY_CLIENTS", "Loaded", "LogLevel", "Origin", "Settings",
    "SettingsError", "check", "config_file", "from_text", "load", "name_and_key", "read_file", "unknown",
]  # fmt: skip
