"""Writes launchd/: the property list and the units as `mlxd service install` would for a user called `you`, and the
property list of an app that brings mlxd along.

python3 tools/dev.py draw
"""

from __future__ import annotations

import plistlib
from pathlib import Path

from mlxd.notify import PATIENCE_S
from mlxd.service.launchd import property_list
from mlxd.service.spec import ServiceSpec
from mlxd.service.systemd import service_unit, socket_unit
from mlxd.settings import Settings

FOLDER = Path(__file__).resolve().parent.parent / "launchd"


def sample(user_home: str, home: str) -> ServiceSpec:
    settings = Settings(home=home, socket=f"{home}/mlxd.sock", memory_budget_bytes=1, prompt_cache_bytes=0)
    return ServiceSpec(
        name="mlxd", command=[f"{user_home}/.local/bin/python", "-m", "mlxd", "serve", "--managed"], environment={},
        home=home, socket=settings.socket, log_file=str(settings.log_file), stop_s=int(settings.drain_s) + PATIENCE_S,
    )  # fmt: skip


def embedded(installed: bytes) -> bytes:
    """What an app registers by SMAppService: as what is installed, but with nothing in it that differs from user to
    user or from place to place, as it is signed with the app. launchd makes the socket and says where in MLXD_SOCKET.
    """
    made = plistlib.loads(installed)
    program = "Contents/Helpers/mlxd"
    listeners = {"SecureSocketWithKey": "MLXD_SOCKET"}
    changes = {
        "Label": "com.example.app.mlxd",
        "BundleProgram": program,
        "ProgramArguments": ["mlxd", "serve", "--managed"],
        "Sockets": dict.fromkeys(made["Sockets"], listeners),
        "AssociatedBundleIdentifiers": ["com.example.app"],
    }
    left_out = ("EnvironmentVariables", "StandardOutPath", "StandardErrorPath")
    kept = {key: value for key, value in (made | changes).items() if key not in left_out}
    return plistlib.dumps({key: kept[key] for key in ("Label", "BundleProgram")} | kept, sort_keys=False)


def files() -> dict[Path, bytes]:
    mac = sample("/Users/you", "/Users/you/Library/Application Support/mlxd")
    linux = sample("/home/you", "/home/you/.local/share/mlxd")
    return {
        FOLDER / "org.mlxd.mlxd.plist": property_list(mac),
        FOLDER / "com.example.app.mlxd.plist": embedded(property_list(mac)),
        FOLDER / "mlxd.socket": socket_unit(linux).encode(),
        FOLDER / "mlxd.service": service_unit(linux).encode(),
    }
