"""The environment that children get: the daemon's, without secrets and without what only the daemon may answer to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["child_environment"]

_SECRET = re.compile(
    r"(^|_)(TOKENS?|(API|ACCESS|SECRET|PRIVATE|AUTH)_?KEYS?|SECRETS?|PASSWORDS?|PASSWD|CREDENTIALS?|AUTH)(_|$)"
    r"|^(AWS|AZURE)_",
    re.IGNORECASE,
)
# Socket activation and service notification are between the service manager and the daemon.
_DAEMON_ONLY = re.compile(r"^(LISTEN_(FDS|PID|FDNAMES|PIDFDID)|NOTIFY_SOCKET|WATCHDOG_(USEC|PID)|MAINPID)$")
# These would make the interpreter wait at a prompt, or import something before our code runs.
_INTERPRETER = frozenset({"PYTHONINSPECT", "PYTHONSTARTUP", "PYTHONBREAKPOINT"})


def child_environment(
    base: Mapping[str, str], temp_dir: Path, changes: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """A child's environment.

    Args:
        base: the daemon's own.
        temp_dir: becomes TMPDIR. Private, because compiled kernels are cached there and then executed; kept between
            runs, because compiling them again costs seconds.
        changes: made last; None removes a variable. A fetcher is given its token this way.
    """
    env = {
        name: value
        for name, value in base.items()
        if name not in _INTERPRETER and not _SECRET.search(name) and not _DAEMON_ONLY.match(name)
    }
    env |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # `python -m` must not import from whatever folder the daemon was started in
        "PYTHONUNBUFFERED": "1",  # last words must not die in a buffer
        "TMPDIR": str(temp_dir),
    }
    for name, value in (changes or {}).items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    return env
