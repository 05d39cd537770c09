"""`mlxd doctor`: looks at everything that mlxd needs, and says what to do about what is missing.

Each check is one function that returns a Finding; nothing is changed, and no daemon is started.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from .common import Commands, add_command
from .exits import FAILED, OK

if TYPE_CHECKING:
    from mlxd.settings import Settings

    from .output import Output

# Importing MLX and asking the hub each get this long, in seconds.
ENGINE_S, HUB_S = 60.0, 10.0
LEAST_FREE_BYTES = 5_000_000_000
LEAST_OWN_BYTES = 100_000_000
_ENGINE = """
import mlx.core as mx
one = mx.ones((2, 2)) @ mx.ones((2, 2))
assert one.tolist() == [[2, 2], [2, 2]]
try:
    facts = mx.device_info()
except Exception:  # a device that has nothing to say of itself
    facts = {}
name, most = facts.get("device_name", ""), int(facts.get("max_recommended_working_set_size", 0))
print(mx.default_device(), name, most, sep="\\t")
"""
_HUB = """
import http.client, sys, urllib.error, urllib.request
from huggingface_hub import constants
if constants.HF_HUB_OFFLINE:
    print("offline")
    sys.exit()
try:
    urllib.request.urlopen(constants.ENDPOINT + "/api/models?limit=1", timeout=float(sys.argv[1])).read(1)
except urllib.error.HTTPError as error:
    sys.exit(f"{constants.ENDPOINT} answers {error.code} {error.reason}")
except (OSError, ValueError, http.client.HTTPException) as error:
    reason = getattr(error, "reason", error)
    sys.exit(f"{constants.ENDPOINT} cannot be reached: {getattr(reason, 'strerror', None) or reason}")
import huggingface_hub
print(constants.ENDPOINT, "answers;", "with" if huggingface_hub.get_token() else "without", "a token")
"""


class Finding(NamedTuple):
    """`advice` says what to do, where there is something."""

    check: str
    state: Literal["ok", "warning", "failed"]
    told: str
    advice: str = ""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = add_command(
        commands, "doctor", doctor, "check everything that mlxd needs, and say what to do", daemon=False,
        epilog="Exit code 0 where nothing failed, 1 otherwise.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def doctor(args: argparse.Namespace, output: Output) -> int:
    findings = examine()
    if output.json:
        output.document([finding._asdict() for finding in findings])
    else:
        output.table((), [(finding.check, finding.state, finding.told) for finding in findings])
        for finding in findings:
            if finding.advice:
                output.line(f"{finding.check}: {finding.advice}")
    return FAILED if any(finding.state == "failed" for finding in findings) else OK


def examine() -> list[Finding]:
    """Every check, in the order in which they build on each other."""
    from mlxd import settings as all_settings
    from mlxd_client.errors import MlxdError

    engine, gpu = _engine()
    findings = [_python(), _packages(), engine, *([] if gpu is None else [gpu])]
    try:
        loaded = all_settings.load()
    except MlxdError as error:  # also a path that no socket can have
        findings.append(_failed("settings", str(error), "correct it; where it is in the file, by `mlxd config edit`"))
    else:
        changed = [name for name, origin in loaded.origins.items() if origin.kind != "default"]
        told = f"changed: {', '.join(changed)}" if changed else "all at their default"
        findings.append(Finding(check="settings", state="ok", told=told))
        checks: tuple[Callable[[Settings], Finding], ...] = (
            _home, _files, _socket, _daemon, _service, _disk, _memory, _batches,
        )  # fmt: skip
        findings += [check(loaded.settings) for check in checks]
    findings.append(_hub())
    return findings


def _ok(check: str, told: str) -> Finding:
    return Finding(check=check, state="ok", told=told)


def _warning(check: str, told: str, advice: str) -> Finding:
    return Finding(check=check, state="warning", told=told, advice=advice)


def _failed(check: str, told: str, advice: str) -> Finding:
    return Finding(check=check, state="failed", told=told, advice=advice)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return _failed("python", found, "install mlxd with Python 3.11, 3.12 or 3.13")
    if sys.platform == "darwin" and os.uname().machine != "arm64":
        told = f"{found}, built for Intel and run by Rosetta"
        return _failed("python", told, "install mlxd with an arm64 Python: MLX needs one")
    return _ok("python", f"{found}, {sys.executable}")


def _packages() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    found, missing = [], []
    for name in ("mlxd", "mlxd-client", "mlx", "mlx-lm", "transformers", "huggingface-hub"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return _failed("packages", f"missing: {', '.join(missing)}", "install mlxd anew into this environment")
    return _ok("packages", ", ".join(found))


def _engine() -> tuple[Finding, Finding | None]:
    """MLX is tried in a process of its own: it may end it. Returns what it says of the GPU, too, where it runs."""
    import shutil

    status, told = _run(_ENGINE, ENGINE_S)
    device, _, facts = told.partition("\t")
    if status != 0 or not facts:
        advice = "install mlx anew; on a Mac it needs macOS 14 or later"
        return _failed("engine", f"MLX does not run: {told}", advice), None
    gpu = _gpu(device, *facts.split("\t"))
    if sys.platform == "linux" and "cpu" in device and shutil.which("g++") is None:
        advice = "install g++: MLX compiles its kernels with it, and is faster so"
        return _warning("engine", f"{device}, without g++", advice), gpu
    return _ok("engine", device), gpu


def _gpu(device: str, name: str, most: str) -> Finding:
    """Args:
    most: bytes that the system would have the GPU use at most; 0 where that is not known.
    """
    if "gpu" in device:
        room = f", {int(most) / 1e9:.0f} GB of memory at most" if int(most) else ""
        return _ok("gpu", (name or "found") + room)
    if sys.platform == "darwin":
        told = "MLX computes on the processor, many times slower"
        return _warning("gpu", told, "in a virtual machine there is no GPU; elsewhere install mlx anew")
    return _ok("gpu", "none is used: on Linux models run on the processor")


def _home(settings: Settings) -> Finding:
    try:
        found = os.stat(settings.home)
    except FileNotFoundError:
        return _ok("home", f"{settings.home}, not there yet")
    except OSError as error:
        return _failed("home", f"{settings.home}: {error.strerror}", "set MLXD_HOME to a folder that you can use")
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        told = f"{settings.home} is no folder of yours"
        return _failed("home", told, "set MLXD_HOME to another folder")
    if stat.S_IMODE(found.st_mode) & 0o077:
        told = f"{settings.home} is open to others (mode {stat.S_IMODE(found.st_mode):o})"
        return _warning("home", told, "the daemon closes it when it starts; `chmod 700` does so now")
    return _ok("home", settings.home)


def _files(settings: Settings) -> Finding:
    """What lies in the home folder, and whether the daemon can use it and others cannot."""
    if not os.path.isdir(settings.home):
        return _ok("files", "none yet")
    mine, wrong = os.geteuid(), []
    for name in ("", "config.toml", "logs", "logs/mlxd.log", "run", "cache", "downloads.json"):
        path = os.path.join(settings.home, name)
        try:
            found = os.stat(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            wrong.append(f"{name or 'the folder'} ({error.strerror})")
            continue
        if found.st_uid != mine:
            wrong.append(f"{name or 'the folder'} (another user's)")
        elif not os.access(path, os.R_OK if name == "config.toml" else os.R_OK | os.W_OK):
            wrong.append(f"{name or 'the folder'} (no permission)")
        elif found.st_mode & 0o022 and name:
            wrong.append(f"{name} (others may write it)")
    if wrong:
        return _failed("files", f"in {settings.home}: {', '.join(wrong)}", "make them yours alone: chown, chmod go-w")
    return _ok("files", "yours, and nobody else's to write")


def _socket(settings: Settings) -> Finding:
    path = settings.socket
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        folder = os.path.dirname(path)
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            return _failed("socket", f"{folder} cannot be written", "set MLXD_SOCKET to a place that you can write")
        return _ok("socket", f"{path}, not there yet")
    except OSError as error:
        return _failed("socket", f"{path}: {error.strerror}", "set MLXD_SOCKET to a place that you can use")
    if not stat.S_ISSOCK(found.st_mode):
        return _failed("socket", f"{path} is no socket", "move it away, or set MLXD_SOCKET to another place")
    if found.st_uid != os.geteuid():
        return _failed("socket", f"{path} is another user's", "set MLXD_SOCKET to another place")
    if stat.S_IMODE(found.st_mode) & 0o077:
        told = f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):o})"
        return _warning("socket", told, "`mlxd stop`: the next daemon makes it anew; others are refused all the same")
    return _ok("socket", f"{path}, yours alone")


def _daemon(settings: Settings) -> Finding:
    from mlxd import __version__
    from mlxd.versions import is_older
    from mlxd_client import Client
    from mlxd_client.errors import ConnectFailed, MlxdError

    try:
        with Client(settings.socket, name="mlxd-doctor", start=False, reconnect=False, timeout_s=10.0) as client:
            status = client.status()
    except ConnectFailed as error:
        if os.path.exists(settings.socket) and "no mlxd listens" not in str(error):
            return _failed("daemon", str(error), "another user's, or no permission: set MLXD_SOCKET or MLXD_HOME")
        return _ok("daemon", "does not run; the first command starts it")
    except MlxdError as error:
        return _failed("daemon", f"it does not answer: {error}", "`mlxd stop`, or end the process; its log says more")
    if status.version != __version__:
        told = f"version {status.version} runs, {__version__} is installed"
        if is_older(status.version, than=__version__):
            return _warning("daemon", told, "`mlxd restart` lets the installed one take over, with nothing lost")
        return _warning("daemon", told, "update this mlxd: what a newer one keeps, an older one may not read")
    broken = [worker.model for worker in status.workers if worker.breaker == "open"]
    if broken:
        return _warning("daemon", f"workers keep dying: {', '.join(broken)}", "`mlxd status` says how")
    loaded = f"{status.models.loaded} model{'' if status.models.loaded == 1 else 's'} loaded"
    return _ok("daemon", f"version {status.version}, process {status.pid}, {loaded}")


def _service(settings: Settings) -> Finding:
    from mlxd.service.manager import manager_for
    from mlxd.service.spec import ServiceError, describe

    try:
        state = manager_for(describe(settings)).state()
    except ServiceError as error:
        return _ok("service", f"none: {error}")
    if not state.installed:
        return _ok("service", "not installed; `mlxd service install` has the system start the daemon")
    if state.failed is not None or not state.listening:
        told = f"installed, but {'failed: ' + state.failed if state.failed else 'the socket is not held'}"
        return _failed("service", told, "`mlxd service restart`, then `mlxd service logs`")
    if not state.current:
        return _warning("service", "installed with other settings than this shell's", "`mlxd service restart`")
    return _ok("service", f"installed ({state.manager})")


def _disk(settings: Settings) -> Finding:
    import shutil

    from mlxd.store.hub import cache_folder

    folder = str(cache_folder(os.environ))
    there = folder
    while not os.path.exists(there):
        there = os.path.dirname(there)
    free = shutil.disk_usage(there).free
    told = f"{free / 1e9:.0f} GB free for models in {folder}"
    if not os.access(there, os.W_OK):
        return _failed("disk", f"{folder} cannot be written", "set HF_HOME or HF_HUB_CACHE to a folder that can")
    own = settings.home if os.path.isdir(settings.home) else os.path.dirname(settings.home)
    if os.path.isdir(own) and shutil.disk_usage(own).free < LEAST_OWN_BYTES:
        told += f"; next to none for logs in {settings.home}"
        return _failed("disk", told, "make room there: the daemon cannot keep what it has to remember")
    if free < LEAST_FREE_BYTES:
        return _warning("disk", told, "`mlxd list` shows what models take, `mlxd rm` deletes them")
    return _ok("disk", told)


def _batches(settings: Settings) -> Finding:
    from pathlib import Path

    from mlxd.batch.header import FILE, VERSION, version_of

    file = Path(settings.home) / FILE
    damaged = sorted(file.parent.glob(f"{FILE}.damaged-*"))
    version = version_of(file)
    if version is not None and version > VERSION:
        told = f"{file} was written by a newer mlxd (version {version}, this one reads up to {VERSION})"
        return _failed("batches", told, "use that mlxd, or move the file away")
    if damaged:
        told = f"a file of batch jobs was damaged, and is set aside: {damaged[-1]}"
        return _warning("batches", told, "submit what was not done again; delete the file when nothing is missing")
    if not file.exists():
        return _ok("batches", "none were ever put in")
    return _ok("batches", f"{sum(each.stat().st_size for each in file.parent.glob(FILE + '*')) / 1e6:.1f} MB in {file}")


def _memory(settings: Settings) -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    told = f"{settings.memory_budget_bytes / 1e9:.1f} GB for models, of {memory.total / 1e9:.1f} GB"
    if settings.memory_budget_bytes > memory.total:
        return _warning("memory", told, "lower memory_budget_bytes: this is more than there is")
    return _ok("memory", told)


def _hub() -> Finding:
    status, told = _run(_HUB, HUB_S + 20, str(HUB_S))
    if status == 0 and told == "offline":
        return _ok("hub", "not asked: HF_HUB_OFFLINE is set")
    if status == 0:
        return _ok("hub", told)
    return _warning("hub", told, "downloads will fail; check the network, HF_ENDPOINT and proxies")


def _run(code: str, limit_s: float, *arguments: str) -> tuple[int, str]:
    """Run Python code elsewhere. Returns its status, and the last line that it printed."""
    import subprocess

    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {limit_s:g} s"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode < 0:
        return done.returncode, f"the process died of signal {-done.returncode}"
    return done.returncode, lines[-1][:200] if lines else ""
