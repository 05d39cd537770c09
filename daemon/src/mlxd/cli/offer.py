"""Where a model is not downloaded: what that would take, the line to type, and on a terminal whether to do it now."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxd_client.errors import ModelNotDownloaded
    from mlxd_client.types import Plan

    from .output import Output

__all__ = ["taken"]


def taken(error: ModelNotDownloaded, args: argparse.Namespace, output: Output) -> bool:
    """Tell what is missing; download it if somebody wants that. Returns whether the model is there now.

    Raises what the download failed with; KeyboardInterrupt where it was left.
    """
    if output.json:
        return False  # the error's details say it all
    plan = _plan(error)
    model = plan.model if plan is not None else error.details.get("model")
    if plan is not None:
        _tell(plan, output)
    if not isinstance(model, str):
        return False
    if output.answered and output.ask("Download it now? [y/N]") in ("y", "yes"):
        from .pull import fetch

        fetch(args, output, model)
        return True
    import shlex

    output.note(f"to download it: mlxd pull {shlex.quote(model)}")
    return False


def _plan(error: ModelNotDownloaded) -> Plan | None:
    """What the daemon found out of it, which may be nothing: the hub may not have answered."""
    import msgspec

    from mlxd_client.types import Plan

    try:
        return msgspec.convert(error.details.get("plan"), Plan)
    except msgspec.ValidationError:
        return None


def _tell(plan: Plan, output: Output) -> None:
    from .hub import fits_text
    from .output import bytes_text

    output.note(
        f"download {bytes_text(plan.download_bytes)}, {bytes_text(plan.disk_free_bytes)} are free on the disk"
        f"{f', {bytes_text(plan.disk_missing_bytes)} are missing' if plan.disk_missing_bytes else ''}; "
        f"memory {bytes_text(plan.memory_bytes)}, {bytes_text(plan.memory_available_bytes)} are available"
    )
    if not plan.fits or plan.evicts:
        output.note(f"does it fit: {fits_text(plan)}")
