"""What leaves this machine loses secrets, what people said, and where their home is; the rest stays readable."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mlxd.redact import Redactor, secrets_of

REDACTOR = Redactor(secrets=["correct horse"], home="/home/anna")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("token hf_abcdefghijklmnop end", "token hf_*** end"),
        ("https://me:pw12345@hub.example/x", "https://***@hub.example/x"),
        ("GET https://hub.example/a?sig=1&token=2 failed", "GET https://hub.example/a?*** failed"),
        ("Authorization: Bearer abc.def-123", "Authorization: *** ***"),
        ('{"api_key": "abcd1234", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("--token=abcd1234 --steps=5", "--token=*** --steps=5"),
        ("sk-abcdefghijklmnopqrstu and AKIAABCDEFGHIJKLMNOP", "*** and ***"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.sig", "***"),
        ("the correct horse", "the ***"),
        ("/home/anna/models/x and /home/annabel/y", "~/models/x and /home/***/y"),
        ("in /home/anna.", "in /home/***"),
        ("personas.butler cannot be {'system': 'dear diary'} (x.toml:3)", "personas.butler cannot be …"),
        ("/Users/bert/Library", "/Users/***/Library"),
    ],
)
def test_forms(text: str, told: str) -> None:
    assert REDACTOR.text(text) == told


@pytest.mark.parametrize(
    "text",
    [
        "prompt_tokens=120 completion_tokens: 30", "org/model-4bit at main", "the worker (pid 12) was ended by SIGSEGV",
        "http://127.0.0.1:8080/api/models", "tokens.count took 0.2 s", "2026-11-21T18:29:12.270816Z",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert REDACTOR.text(text) == text


def test_values() -> None:
    told = REDACTOR.value(
        {
            "prompt": "dear diary", "messages": [{"content": "hi"}], "hub_token": "abc", "tokens": 5, "ok": True,
            "nested": {"path": "/home/anna/x", "password": "p"}, "personas": {"butler": {"system": "be formal"}},
            "long": "x" * 10_000, "odd": {1, 2},
        }
    )  # fmt: skip
    assert told["prompt"] == "(10 long)"
    assert told["messages"] == "(1 long)"
    assert told["hub_token"] == told["nested"]["password"] == "***"
    assert (told["tokens"], told["ok"], told["nested"]["path"]) == (5, True, "~/x")
    assert told["personas"] == ["butler"]
    assert len(told["long"]) < 3000


def test_a_traceback_says_where_and_never_what() -> None:
    trace = (
        "Traceback (most recent call last):\n"
        '  File "/home/anna/mlxd/worker.py", line 5, in run\n'
        '    answer = model("dear diary")\n'
        "mlxd.worker.faults.EngineLost: dear diary\n"
        "dear diary, again\n"
        "and again\n"
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] out of memory"
    )
    assert REDACTOR.trace(trace).splitlines() == [
        "Traceback (most recent call last):", '  File "~/mlxd/worker.py", line 5, in run', "…",
        "mlxd.worker.faults.EngineLost", "…",
        "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] out of memory",
    ]  # fmt: skip


def test_secrets_are_found_by_name_in_urls_and_in_the_hubs_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    env = {
        "HF_HOME": str(tmp_path), "MY_API_KEY": "by-its-name", "https_proxy": "http://me:sesame12@proxy:1",
        "TOKENIZERS_PARALLELISM": "false", "EMPTY_TOKEN": "",
    }  # fmt: skip
    assert secrets_of(env) == {"from-a-file", "by-its-name", "me:sesame12", "sesame12"}


@pytest.mark.parametrize(
    "piece", ["x", "a.", "eyJ-", "token", "https://", "http://a", "bearer ", "token=", "ghp_", "/home/"]
)
def test_long_texts_take_no_time_that_grows_with_their_square(piece: str) -> None:
    def seconds(count: int) -> float:
        text = piece * count
        began = time.process_time()
        Redactor().text(text)
        return time.process_time() - began

    seconds(100)
    shorter, longer = (min(seconds(count) for _ in range(3)) for count in (2_000, 32_000))
    assert longer < max(16 * shorter * 4, 0.2)
