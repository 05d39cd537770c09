"""Personas and templates of a daemon's settings, as requests, apps and people use them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from mlxd_client import errors
from mlxd_client.types import Completion
from support.daemon import Daemon

WRITTEN = """\
[personas.editor]
system = "Edit."
model = "mlxd/cleanup"
temperature = 0.25
description = "for letters"

[templates.translate]
prompt = "To {language}: {text}"
placeholders = ["language"]
"""


def asked_of(made: Completion) -> Any:
    """What the worker was asked, as it says itself."""
    return json.loads(made.text)


def mlxd(daemon: Daemon, *words: str) -> str:
    """What a command of the same home prints."""
    command = [sys.executable, "-m", "mlxd", *words]
    return subprocess.run(command, env=daemon.env, capture_output=True, text=True, check=True, timeout=60).stdout


def test_requests_name_them_and_a_change_holds_for_the_next_request() -> None:
    daemon = Daemon(bad_child="worker")
    (daemon.home / "config.toml").write_text(WRITTEN)
    with daemon, daemon.client() as client:
        asked = asked_of(client.process("!asked", persona="editor"))
        assert asked["messages"] == [{"role": "system", "content": "Edit."}, {"role": "user", "content": "!asked"}]
        assert asked["options"] == {"temperature": 0.25}
        asked = asked_of(client.chat("!asked", persona="editor", temperature=1.0))
        assert (asked["messages"][0]["role"], asked["options"]) == ("system", {"temperature": 1.0})
        made = client.process("one two", persona="editor", template="translate", values={"language": "German"})
        assert made.text == "To German: one two"
        with pytest.raises(errors.InvalidParams, match="did you mean editor"):
            client.process("x", persona="editro")
        found = client.personas()
        assert list(found.personas) == ["editor"]
        assert found.templates["translate"].prompt == "To {language}: {text}"
        assert mlxd(daemon, "run", "--template", "translate", "--value", "language=German", "a b") == "To German: a b\n"
        assert '"Edit."' in mlxd(daemon, "run", "--persona", "editor", "!asked")
        assert [line.split()[:2] for line in mlxd(daemon, "personas").splitlines()] == [
            ["NAME", "KIND"], ["editor", "persona"], ["translate", "template"],
        ]  # fmt: skip
        assert mlxd(daemon, "personas", "--kind", "persona", "--quiet") == "editor\n"
        assert mlxd(daemon, "personas", "--kind", "template", "--quiet") == "translate\n"
        assert json.loads(mlxd(daemon, "personas", "--json"))["personas"]["editor"]["temperature"] == 0.25
        client.config_set({"personas.editor": {"system": "Write."}}, unset=["templates.translate"])
        assert mlxd(daemon, "personas", "--kind", "template").startswith("the settings have no template; ")
        asked = asked_of(client.process("!asked", persona="editor", model="mlxd/cleanup"))
        assert (asked["messages"][0]["content"], asked["options"]) == ("Write.", {})
        with pytest.raises(errors.InvalidParams, match="there is no template"):
            client.process("x", template="translate")
        with pytest.raises(errors.InvalidParams, match="temperature"):
            client.config_set({"personas.editor": {"temperature": 100}})
