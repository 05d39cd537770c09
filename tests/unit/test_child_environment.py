"""What of the daemon's environment its children see."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxd.children.environment import child_environment

SECRETS = """HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_HUB_TOKEN GITHUB_TOKEN NPM_AUTH_TOKEN OPENAI_API_KEY openai_api_key
ANTHROPIC_APIKEY AWS_ACCESS_KEY_ID AWS_SESSION_TOKEN AZURE_CLIENT_ID DB_PASSWORD MY_SECRET CLIENT_SECRET_FILE
GOOGLE_APPLICATION_CREDENTIALS SSH_PRIVATE_KEY LISTEN_FDS LISTEN_PID NOTIFY_SOCKET WATCHDOG_USEC
PYTHONINSPECT""".split()

HARMLESS = """PATH HOME LANG HF_HOME HF_HUB_CACHE TOKENIZERS_PARALLELISM XDG_RUNTIME_DIR OMP_NUM_THREADS HTTPS_PROXY
METAL_DEVICE_WRAPPER_TYPE MLX_METAL_JIT KEYBOARD AUTHOR PYTHONPATH SSL_CERT_FILE MLXD_HOME""".split()


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_stay_behind(name: str) -> None:
    assert name not in child_environment({name: "x"}, Path("/run"))


@pytest.mark.parametrize("name", HARMLESS)
def test_the_rest_goes_along(name: str) -> None:
    assert child_environment({name: "x"}, Path("/run"))[name] == "x"


def test_changes_come_last() -> None:
    base = {"HF_TOKEN": "secret", "LANG": "C"}
    env = child_environment(base, Path("/run/tmp"), {"HF_TOKEN": "given", "HF_HUB_OFFLINE": None, "LANG": None})
    assert env["HF_TOKEN"] == "given"
    assert "HF_HUB_OFFLINE" not in env
    assert "LANG" not in env
    assert env["TMPDIR"] == "/run/tmp"
