"""Writes launchd/: the property list and the units as `mlxd service install` would for a user called `you`.

python3 tools/dev.py draw
"""

from __future__ import annotations

from pathlib import Path

from mlxd.service.launchd import property_list
from mlxd.service.spec import PATIENCE_S, ServiceSpec
from mlxd.service.systemd import service_unit, socket_unit
from mlxd.settings import Settings

FOLDER = Path(__file__).resolve().parent.parent / "launchd"


def sample(user_home: str, home: str) -> ServiceSpec:
    settings = Settings(home=home, socket=f"{home}/mlxd.sock", memory_budget_bytes=1, prompt_cache_bytes=0)
    return ServiceSpec(
        name="mlxd", command=[f"{user_home}/.local/bin/python", "-m", "mlxd", "serve", "--managed"], environment={},
        home=home, socket=settings.socket, log_file=str(settings.log_file), stop_s=int(settings.drain_s) + PATIENCE_S,
    )  # fmt: skip


def files() -> dict[Path, bytes]:
    mac = sample("/Users/you", "/Users/you/Library/Application Support/mlxd")
    linux = sample("/home/you", "/home/you/.local/share/mlxd")
    return {
        FOLDER / "org.mlxd.mlxd.plist": property_list(mac),
        FOLDER / "mlxd.socket": socket_unit(linux).encode(),
        FOLDER / "mlxd.service": service_unit(linux).encode(),
    }
