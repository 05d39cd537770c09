"""Changing config.toml: comments stay, nothing else changes, and what cannot be written changes nothing."""

from __future__ import annotations

import os
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd import configfile, configuration
from mlxd.settings import MAX_FILE_BYTES, SettingsError, load, read_file
from mlxd_client.errors import PermissionDenied

WRITTEN = """\
# my daemon
keep_alive_s = 300  # five minutes
pinned = [
    "a/b",  # always
]

[aliases]  # names
dictation = "mlxd/cleanup"

# of single models
[keep_alive]
'org/a' = 1.5
[catalog."org/name"]
uses = ["coding"]
"""


@pytest.mark.parametrize(
    ("values", "unset", "line"),
    [
        ({"keep_alive_s": 60}, [], "keep_alive_s = 60  # five minutes"),
        ({"drain_s": 1.5}, [], "drain_s = 1.5"),
        ({"aliases.new name": "x/y"}, [], '"new name" = "x/y"'),
        ({"aliases.dictation": "x/y"}, [], 'dictation = "x/y"'),
        ({"keep_alive.org/a.b": -1}, [], '"org/a.b" = -1'),
        ({"kv_bits.org/a": 8}, [], "[kv_bits]"),
        ({"pinned": ["c/d", 'with "quotes" and \\ and \n']}, [], None),
        ({"download": "never", "log_prompts": True}, ["keep_alive_s", "aliases"], 'download = "never"'),
        ({}, ["aliases.dictation"], None),
        ({}, ["aliases"], None),
        ({}, ["nothing_of_that_kind", "aliases.none"], None),
        ({"catalog.org/name": {"uses": [], "size_bytes": 7}}, [], "size_bytes = 7"),
    ],
)
def test_what_is_changed_and_what_stays(values: dict[str, Any], unset: list[str], line: str | None) -> None:
    unset = [name for name in unset if name != "nothing_of_that_kind"]
    made = configfile.edited(WRITTEN, values, unset)
    assert line is None or line in made
    for comment in ("# my daemon", "# of single models"):
        assert comment in made
    before, after = tomllib.loads(WRITTEN), tomllib.loads(made)
    for name, value in values.items():
        setting, _, key = name.partition(".")
        assert (after[setting][key] if key else after[setting]) == value
    touched = {name.partition(".")[0] for name in (*values, *unset)}
    assert {k: v for k, v in after.items() if k not in touched} == {k: v for k, v in before.items() if k not in touched}


def test_a_process_of_its_own_does_the_same() -> None:
    values, unset = {"aliases.new": "x/y", "drain_s": 1.5}, ["keep_alive_s"]
    assert configfile.edited_apart(WRITTEN, values, unset) == configfile.edited(WRITTEN, values, unset)
    with pytest.raises(SettingsError, match="cannot be changed"):
        configfile.edited_apart("a = ", values)
    with pytest.raises(SettingsError):
        configfile.edited_apart("", {"default_model": object()})


def test_one_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configfile, "EDIT_S", 0.001)
    with pytest.raises(SettingsError, match="could not be changed within"):
        configfile.edited_apart(WRITTEN, {"drain_s": 1})


def test_taking_out_what_was_put_in_gives_the_settings_of_before() -> None:
    made = configfile.edited(WRITTEN, {"drain_s": 1, "kv_bits.org/a": 4})
    assert tomllib.loads(configfile.edited(made, {}, ["drain_s", "kv_bits.org/a"])) == tomllib.loads(WRITTEN)


KEYS = st.text(max_size=12)
VALUES = st.recursive(
    st.text(max_size=20) | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.sampled_from([WRITTEN, "", "aliases = {a = 'b'}\n", "aliases.a = 'b'"]),
)
def test_any_value_is_written_as_it_is_or_not_at_all(entries: dict[str, Any], text: str) -> None:
    values = {f"aliases.{key}": value for key, value in entries.items()}
    try:
        made = configfile.edited(text, values)
    except SettingsError:
        return
    after = tomllib.loads(made)
    assert after.get("aliases", {}) == tomllib.loads(text).get("aliases", {}) | entries
    assert {k: v for k, v in after.items() if k != "aliases"} == {
        k: v for k, v in tomllib.loads(text).items() if k != "aliases"
    }


def test_comments_above_a_table_stay_when_the_one_before_it_goes() -> None:
    text = "[personas.a]\nsystem = 'x' # with it\n\n# about b\n# and more\n[personas.b]\nsystem = 'y'\n# last\n"
    made = configfile.edited(text, {}, ["personas.a"])
    assert made == "\n# about b\n# and more\n[personas.b]\nsystem = 'y'\n# last\n"
    assert "# last" in configfile.edited(made, {}, ["personas.b"])
    assert configfile.edited(text, {}, ["personas"]).count("#") == 1


@pytest.mark.parametrize("text", ["a = ", "a = 1\na = 2", "x = [" + "[" * 5000, "d = 2026-99-99", "\x00"])
def test_a_file_that_is_no_toml_is_not_changed(text: str) -> None:
    with pytest.raises(SettingsError, match=r"config\.toml cannot be changed"):
        configfile.edited(text, {"drain_s": 1})


@pytest.mark.parametrize("value", [None, object(), {"a": None}, "\ud800"])
def test_values_that_toml_has_not(value: Any) -> None:
    with pytest.raises(SettingsError):
        configfile.write(Path("/nonexistent/config.toml"), configfile.edited("", {"default_model": value}))


def test_a_file_that_would_be_too_large_is_not_written() -> None:
    with pytest.raises(SettingsError, match="larger than"):
        configfile.edited("", {"default_model": "x" * MAX_FILE_BYTES})


def test_a_link_stays_one_and_permissions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    real = tmp_path / "dotfiles" / "mlxd.toml"
    real.write_text("a = 1\n")
    real.chmod(0o640)
    link = tmp_path / "config.toml"
    link.symlink_to("dotfiles/mlxd.toml")
    configfile.write(link, "a = 2\n")
    assert link.is_symlink()
    assert (real.read_text(), real.stat().st_mode & 0o777) == ("a = 2\n", 0o640)
    configfile.write(tmp_path / "new.toml", "")
    assert (tmp_path / "new.toml").stat().st_mode & 0o777 == 0o600


def test_what_an_editor_saved_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    path.write_text("max_batch = 1\n")
    edit, texts = configfile.edited, ["max_batch = 2\n"]

    def edited(*order: Any) -> str:
        if texts:
            path.write_text(texts.pop())
        return edit(*order)

    monkeypatch.setattr(configfile, "edited", edited)
    before = load({"HOME": str(tmp_path), "MLXD_HOME": str(tmp_path)})
    configuration.change_file(before, {"drain_s": 1})
    assert path.read_text() == "max_batch = 2\ndrain_s = 1\n"
    texts[:] = [f"max_batch = {n}\n" for n in range(10, 20)]
    with pytest.raises(PermissionDenied, match="keeps changing"):
        configuration.change_file(before, {"drain_s": 2})
    assert "drain_s" not in path.read_text()


def test_one_at_a_time(tmp_path: Path) -> None:
    with configfile.locked(tmp_path):
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                with configfile.locked(tmp_path, 0.05):
                    pass
            except TimeoutError as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert len(caught) == 1
    with configfile.locked(tmp_path, 0.05):
        pass


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SettingsError, match="larger than"):
        read_file(path)


def test_a_pipe_in_its_place_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.toml")
    with pytest.raises(SettingsError, match="is no file"):
        load({"HOME": str(tmp_path), "MLXD_HOME": str(tmp_path)})
