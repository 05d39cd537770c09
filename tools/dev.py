#!/usr/bin/env python3
"""Two commands on a fresh machine: `python3 tools/dev.py demo` and `python3 tools/dev.py test`.

    demo [ARG...]    start a throw-away daemon, clean dictated transcripts with the built-in model, stop it again
    test [ARG...]    the whole suite: style, types and tests; arguments go to pytest
    exec CMD [ARG...]  run any command inside the environment, e.g. `exec mlxd status`
    bench [ARG...]   speed and size against mlx_lm, as ratios in one run
    soak [ARG...]    everything at once for hours; downloads and batch jobs that are killed again and again
    handovers [ARG...]  daemons that take over from each other while clients stream and connect
    faults WHAT      what docs/guarantees.md promises, while workers and daemons are killed
    fuzz [ARG...]    broken frames for the codec; --session, a daemon's conversations; --engine, requests mixed
    lint [--fix]     style and types alone
    draw [--check]   everything that is made from the code: references, man pages, types, service files
    setup            only see to the environment

Each sees to the environment first: `.venv` in this repository, holding what `requirements.lock` pins and both packages
in editable form; by uv where it is on PATH, else by venv and pip. A stamp skips all of it while nothing changed.

Standard library only, and only syntax that Python 3.6 knows, so that an old Python gets a sentence and no syntax error.
"""

import os
import sys

LOWEST, BEYOND = (3, 11), (3, 14)
PYTHON_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"

if not LOWEST <= sys.version_info[:2] < BEYOND:
    sys.exit(
        f"mlxd needs Python 3.11, 3.12 or 3.13, and this is {PYTHON_VERSION}: start tools/dev.py with one of those."
    )

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
BIN = os.path.join(VENV, "bin")
PYTHON = os.path.join(BIN, "python")
STAMP = os.path.join(VENV, ".mlxd-stamp")
# Lies in a .venv whose set-up was cut short: nothing in it can be trusted, so it is built anew.
UNFINISHED = os.path.join(VENV, ".mlxd-unfinished")
LOCK = os.path.join(ROOT, "requirements.lock")
PACKAGES = ("client", "daemon")
INPUTS = (
    "requirements.lock",
    "client/pyproject.toml",
    "daemon/pyproject.toml",
)


def main(arguments: "list[str]") -> int:
    """Run one command; returns the exit status, unless the process became the command."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return fail(f"there is no command {command!r}, but {', '.join(COMMANDS)}.", 2)
    try:
        ensure_environment()
    except SetupError as error:
        return fail(str(error), 1)
    except KeyboardInterrupt:
        return fail("interrupted; the next start sets up afresh.", 130)
    return COMMANDS[command](rest)


def fail(sentence: str, status: int) -> int:
    print("dev.py: " + sentence, file=sys.stderr)
    return status


# --- the environment ----------------------------------------------------------------------------------------------


class SetupError(Exception):
    """Set-up cannot go on; the message says why, and what would help."""


def ensure_environment() -> None:
    """Make `.venv` hold what the lock pins. Quick when it already does; one process at a time when not."""
    wanted = wanted_stamp()
    if is_current(wanted):
        return
    import fcntl

    # Locking this very file leaves no lock file behind that could be stale, committed or deleted.
    with open(os.path.abspath(__file__), "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("waiting for another dev.py that is setting up")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_current(wanted):
            set_up(wanted)


def wanted_stamp() -> str:
    """All that the environment depends on. Which tool installs it is left out: uv and pip install the same pins."""
    import hashlib

    digest = hashlib.sha256()
    for name in INPUTS:
        try:
            with open(os.path.join(ROOT, name), "rb") as file:
                digest.update(name.encode() + b"\0" + file.read() + b"\0")
        except OSError as error:
            raise SetupError(f"cannot read {name}: {error.strerror}.") from None
    # The folder counts, since scripts and editable installs hold absolute paths.
    return "\n".join((ROOT, PYTHON_VERSION, "-".join(os.uname()[::4]), digest.hexdigest()))


def is_current(wanted: str) -> bool:
    try:
        with open(STAMP, encoding="utf-8") as file:
            return file.read() == wanted and os.access(PYTHON, os.X_OK)
    except (OSError, UnicodeDecodeError):
        return False


def set_up(wanted: str) -> None:
    """Build or mend `.venv`. The stamp is written last: a set-up that was cut short is never taken for a whole one."""
    import shutil
    import time

    if sys.platform == "darwin" and os.uname().machine != "arm64":
        raise SetupError("MLX needs Apple silicon and a native arm64 Python; this one runs as x86-64.")
    uv = shutil.which("uv")
    began = time.monotonic()
    old = read_stamp()
    if os.path.exists(STAMP):
        os.remove(STAMP)
    if not is_usable(old, wanted, uv):
        say(f"making .venv with {'uv' if uv else 'venv'} for Python {PYTHON_VERSION}")
        make_venv(uv)
    write(UNFINISHED, "")
    say(f"installing what requirements.lock pins with {'uv' if uv else 'pip'}; the first time takes a minute or two")
    try:
        install(uv)
    except SetupError:
        os.remove(UNFINISHED)  # the installer ended by itself and undid what it had begun
        raise
    write(STAMP + ".new", wanted)
    os.remove(UNFINISHED)
    os.replace(STAMP + ".new", STAMP)
    say(f"ready after {time.monotonic() - began:.0f} s")


def read_stamp() -> str:
    try:
        with open(STAMP, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def is_usable(old: str, wanted: str, uv: "str | None") -> bool:
    """Whether the `.venv` that is there can be brought up to date, rather than built anew.

    1. cut short: no. 2. made for another folder, Python or machine: no. 3. else its Python must run, and have pip
    unless uv does the work. A `.venv` that somebody made by hand has no stamp, and is taken over.
    """
    if os.path.lexists(UNFINISHED) or (old and old.split("\n")[:3] != wanted.split("\n")[:3]):
        return False
    probe = f"import sys{'' if uv else ', pip'}; print(sys.version_info[0], sys.version_info[1], sep='.')"
    return run([PYTHON, "-c", probe], quiet=True) == (0, PYTHON_VERSION + "\n")


def make_venv(uv: "str | None") -> None:
    import shutil

    base = getattr(sys, "_base_executable", sys.executable)  # not a Python inside the .venv that is about to go
    if os.path.islink(VENV) or os.path.isfile(VENV):
        os.remove(VENV)
    else:
        shutil.rmtree(VENV, ignore_errors=True)
    os.makedirs(VENV)
    write(UNFINISHED, "")
    if uv:
        command = [uv, "venv", "--quiet", "--no-config", "--allow-existing", "--python", base, VENV]
    else:
        command = [base, "-m", "venv", VENV]
    status, output = run(command)
    if status:
        hint = "" if uv else " (on Debian and Ubuntu, the package python3-venv has to be there)"
        raise SetupError(f"cannot make .venv{hint}:\n{output.strip()}")


def install(uv: "str | None") -> None:
    """Install the pins by hash, those and no others, then both packages as they lie here, built by the pinned
    hatchling."""
    if uv:
        pip = [uv, "pip", "install", "--quiet", "--python", PYTHON]
    else:
        pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    editable = [flag for name in PACKAGES for flag in ("--editable", os.path.join(ROOT, name))]
    for step in (
        [*pip, "--no-deps", "--require-hashes", "--requirement", LOCK],
        [*pip, "--no-deps", "--no-build-isolation", *editable],
    ):
        status, output = run(step)
        if status:
            raise SetupError(f"installing failed; is there a connection?\n{output.strip()}")


def run(command: "list[str]", quiet: bool = False) -> "tuple[int, str]":
    """The exit status and the output of a command; both streams together, unless only stdout is of interest."""
    import subprocess

    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else subprocess.STDOUT,
            env=environment(),
            text=True,
            errors="replace",
        )
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def say(text: str) -> None:
    print("dev.py: " + text, file=sys.stderr, flush=True)


# --- the commands -------------------------------------------------------------------------------------------------


def environment() -> "dict[str, str]":
    """The caller's environment, as `activate` would change it."""
    env = dict(os.environ, VIRTUAL_ENV=VENV, PATH=BIN + os.pathsep + os.environ.get("PATH", os.defpath))
    env.pop("PYTHONHOME", None)
    return env


def become(command: "list[str]") -> int:
    """Replace this process with the command, so that signals and the exit status are the command's own."""
    env = environment()
    sys.stdout.flush()
    try:
        os.environ["PATH"] = env["PATH"]  # execvpe looks the program up in the PATH of this process on some Pythons
        os.execvpe(command[0], command, env)
    except OSError as error:
        status = 127 if isinstance(error, FileNotFoundError) else 126
        return fail(f"cannot run {command[0]}: {error.strerror}.", status)


def run_exec(arguments: "list[str]") -> int:
    if arguments and arguments[0] == "--":
        arguments = arguments[1:]
    if not arguments:
        return fail("exec needs a command, e.g. `exec mlxd status`.", 2)
    return become(arguments)


def run_test(arguments: "list[str]") -> int:
    """Everything is a test, style and types too (tests/unit/test_static.py), so pytest's last line speaks for all."""
    os.chdir(ROOT)
    workers = min(4, os.cpu_count() or 1)
    spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    return become([PYTHON, "-m", "pytest", *spread, *arguments])


def run_lint(arguments: "list[str]") -> int:
    os.chdir(ROOT)
    fix = "--fix" in arguments
    import subprocess

    worst = 0
    for command in lint_commands(fix):
        worst = max(worst, subprocess.call(command, env=environment()))
    return worst


def lint_commands(fix: bool = False) -> "list[list[str]]":
    return [
        [os.path.join(BIN, "ruff"), "check", *(["--fix"] if fix else []), "."],
        [os.path.join(BIN, "ruff"), "format", *([] if fix else ["--check"]), "."],
        [PYTHON, "-m", "mypy"],
    ]


def run_demo(arguments: "list[str]") -> int:
    return become([PYTHON, os.path.join(ROOT, "tools", "demo.py"), *arguments])


def run_bench(arguments: "list[str]") -> int:
    return become([PYTHON, os.path.join(ROOT, "tools", "bench.py"), *arguments])


def run_fuzz(arguments: "list[str]") -> int:
    return become([PYTHON, os.path.join(ROOT, "tools", "fuzz.py"), *arguments])


def run_handovers(arguments: "list[str]") -> int:
    return become([PYTHON, os.path.join(ROOT, "tools", "handovers.py"), *arguments])


def run_soak(arguments: "list[str]") -> int:
    return become([PYTHON, os.path.join(ROOT, "tools", "soak.py"), *arguments])


def run_faults(arguments: "list[str]") -> int:
    return become([PYTHON, os.path.join(ROOT, "tools", "faults.py"), *arguments])


def run_draw(arguments: "list[str]") -> int:
    return become([PYTHON, os.path.join(ROOT, "tools", "draw.py"), *arguments])


def run_setup(arguments: "list[str]") -> int:
    return fail("setup takes no arguments.", 2) if arguments else 0


COMMANDS = {
    "demo": run_demo,
    "test": run_test,
    "exec": run_exec,
    "bench": run_bench,
    "soak": run_soak,
    "handovers": run_handovers,
    "faults": run_faults,
    "fuzz": run_fuzz,
    "lint": run_lint,
    "draw": run_draw,
    "setup": run_setup,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
