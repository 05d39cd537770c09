"""The daemon's log: structlog over the standard library's handlers; JSON lines in a file, human lines on a terminal.

No failure of a log may stop or slow the daemon: what cannot be written is dropped and counted, and said once on stderr.
What people dictate and what models answer is nobody's business: such values are left out unless asked for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Protocol, TextIO

import msgspec

from .redact import TEXT_FIELDS, TOKEN

# structlog imports rich and better_exceptions where it finds them, for tracebacks that nobody here prints. Rich alone
# would cost the daemon 5 MB and a tenth of a second, so they are hidden while structlog is imported.
_hidden = [name for name in ("rich", "better_exceptions") if name not in sys.modules]
for _name in _hidden:
    sys.modules[_name] = None  # type: ignore[assignment]  # makes `import` raise ImportError
try:
    import structlog
finally:
    for _name in _hidden:
        del sys.modules[_name]

__all__ = ["TEXT_FIELDS", "Log", "LogFile", "Logs", "configure", "get"]

FILE_BYTES = 10_000_000
FILES_KEPT = 5

EventDict = MutableMapping[str, Any]


class Log(Protocol):
    """The part of structlog's bound logger that the daemon uses: an event's name, then its fields."""

    def bind(self, **fields: Any) -> Log: ...
    def debug(self, event: str, /, **fields: Any) -> Any: ...
    def info(self, event: str, /, **fields: Any) -> Any: ...
    def warning(self, event: str, /, **fields: Any) -> Any: ...
    def error(self, event: str, /, **fields: Any) -> Any: ...
    def exception(self, event: str, /, **fields: Any) -> Any: ...


def get(name: str, **bound: Any) -> Any:
    """A logger whose lines carry `bound`, e.g. `get("mlxd.server", client=3)`; `.bind(request=...)` adds more."""
    return structlog.stdlib.get_logger(name, **bound)


class LogFile(RotatingFileHandler):
    """A rotating file that gives up on a line, never on the daemon.

    Args:
        path: its folder is made when the first line comes.
        stderr: where the first failure is announced.

    Attributes:
        dropped: how many lines could not be written.
    """

    def __init__(self, path: Path, stderr: TextIO, file_bytes: int = FILE_BYTES, files_kept: int = FILES_KEPT) -> None:
        super().__init__(
            path, maxBytes=file_bytes, backupCount=files_kept, encoding="utf-8", delay=True, errors="backslashreplace"
        )
        self.dropped = 0
        self._stderr = stderr
        self._torn = False

    def _open(self) -> Any:
        os.makedirs(os.path.dirname(self.baseFilename), mode=0o700, exist_ok=True)
        made = open(  # noqa: SIM115  # closed by the base class
            self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=_private
        )
        if self._torn:
            made.write("\n")
            self._torn = False
        return made

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Whether the file is full. Unlike the base's, without formatting the record a second time."""
        if self.stream is None:
            self.stream = self._open()
        return self.maxBytes > 0 and self.stream.tell() >= self.maxBytes

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line. The file is opened anew for the next one, since room and permissions may come back."""
        error = sys.exc_info()[1]
        self.dropped += 1
        stream, self.stream = self.stream, None
        self._torn = True
        try:
            if stream is not None:
                stream.close()
        except OSError:
            pass  # the rest of the line that is lost anyway
        if self.dropped == 1:
            _say(self._stderr, f"mlxd: cannot write the log {self.baseFilename}: {error}; lines are dropped")

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            self.dropped += 1


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _say(stream: TextIO, sentence: str) -> None:
    try:
        print(sentence, file=stream, flush=True)
    except (OSError, ValueError):  # a closed stderr: there is nobody left to tell
        pass


class Logs:
    """The handlers that are installed, until `close`."""

    def __init__(self, handlers: list[logging.Handler], texts: _Texts) -> None:
        self._handlers = handlers
        self._texts = texts

    @property
    def dropped(self) -> int:
        """Lines that could not be written to the file."""
        return sum(handler.dropped for handler in self._handlers if isinstance(handler, LogFile))

    def set_level(self, level: str) -> None:
        """One of settings.LOG_LEVELS; takes effect at once."""
        logging.getLogger("mlxd").setLevel(level.upper())

    def set_prompts(self, shown: bool) -> None:
        """Whether prompts and answers may appear; takes effect at once."""
        self._texts.shown = shown

    def close(self) -> None:
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def configure(
    file: Path | None,
    *,
    level: str = "info",
    prompts: bool = False,
    console: bool | None = None,
    stderr: TextIO | None = None,
) -> Logs:
    """Install the handlers of this process.

    Args:
        file: the JSON lines; None writes none.
        level: one of settings.LOG_LEVELS, for our own lines; other libraries' start at warning.
        prompts: whether prompts and answers may appear.
        console: human lines on stderr; None asks whether that is a terminal.
        stderr: the terminal, sys.stderr where not given.
    """
    stderr = sys.stderr if stderr is None else stderr
    texts = _Texts(prompts)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        texts,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handlers: list[logging.Handler] = []
    if file is not None:
        handlers.append(_with(LogFile(file, stderr), shared, [structlog.processors.format_exc_info, _as_json]))
    if stderr.isatty() if console is None else console:
        colours = stderr.isatty() and not os.environ.get("NO_COLOR")
        human = structlog.dev.ConsoleRenderer(colors=colours, timestamp_key="at", pad_event_to=0)
        handlers.append(_with(_Console(stderr), shared, [human]))
    root = logging.getLogger()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logs = Logs(handlers, texts)
    logs.set_level(level)
    return logs


class _Console(logging.StreamHandler[TextIO]):
    """Human lines; a terminal that went away is no reason for tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _with(handler: logging.Handler, shared: list[Any], last: list[Any]) -> logging.Handler:
    """`handler`, rendering by `last`; lines of other libraries first go through what ours went through."""
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    return handler


class _Texts:
    """What was said becomes how much was said, unless it may be shown."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def __call__(self, _logger: Any, _method: str, event: EventDict) -> EventDict:
        if self.shown:
            return event
        for name in TEXT_FIELDS & event.keys():
            value = event.pop(name)
            if isinstance(value, (str, bytes, list, tuple, dict)):
                event[f"{name}_length"] = len(value)
        return event


def _as_json(_logger: Any, _method: str, event: Mapping[str, Any]) -> str:
    """One JSON object, `at`, `level` and `event` first."""
    ordered = {name: event[name] for name in ("at", "level", "event") if name in event} | dict(event)
    try:
        line = msgspec.json.encode(ordered, enc_hook=str).decode()
    except (TypeError, ValueError, RecursionError):  # keys that are no text, lone surrogates, values inside themselves
        line = json.dumps({str(name): str(value) for name, value in ordered.items()})
    return TOKEN.sub("hf_***", line)
