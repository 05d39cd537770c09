"""Personas and templates: what holds where, what is refused by name, and that texts stay texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.personas import check_template, completed
from mlxd.settings import SettingsError, from_text, load
from mlxd_client.errors import InvalidParams
from mlxd_client.types import UNSET, ChatParams, Message, Persona, ProcessParams, Template

PERSONAS = {
    "editor": Persona(system="Edit.", model="org/edit", temperature=0.2, thinking=False, stop=["END"]),
    "json": Persona(schema={"type": "object"}),
    "plain": Persona(max_tokens=5),
}
TEMPLATES = {
    "translate": Template(
        prompt="To {language}, {tone}: {{{text}}} {language}",
        placeholders=["language", "tone"],
        defaults={"tone": "plain"},
    ),
}  # fmt: skip


def process(**given: Any) -> ProcessParams:
    return completed(ProcessParams(**{"prompt": "p"} | given), PERSONAS, TEMPLATES)


def chat(*roles: str, **given: Any) -> ChatParams:
    turns = [Message(role=role, content=role) for role in roles]  # type: ignore[arg-type]
    return completed(ChatParams(messages=turns, **given), PERSONAS, TEMPLATES)


# --- personas -----------------------------------------------------------------------------------------------------


def test_a_request_without_names_is_left_as_it_is() -> None:
    params = ProcessParams(prompt="p", temperature=1.0)
    assert completed(params, PERSONAS, TEMPLATES) is params


def test_a_persona_holds_where_the_request_says_nothing() -> None:
    made = process(persona="editor", temperature=0.9)
    assert (made.system, made.model, made.temperature, made.thinking, made.stop) == (
        "Edit.", "org/edit", 0.9, False, ["END"],
    )  # fmt: skip
    assert made.persona is UNSET
    assert process(persona="editor", system="Mine.", model="org/mine").system == "Mine."
    assert process(persona="editor", model="org/mine").model == "org/mine"
    assert process(persona="plain").system is UNSET


def test_a_system_turn_of_the_conversation_stands() -> None:
    assert [turn.content for turn in chat("user", persona="editor").messages] == ["Edit.", "user"]
    assert [turn.content for turn in chat("system", "user", persona="editor").messages] == ["system", "user"]
    assert [turn.content for turn in chat("user", persona="plain").messages] == ["user"]


@pytest.mark.parametrize(
    ("persona", "given", "absent"),
    [("json", {"grammar": "start: /x/"}, "schema"), ("editor", {"thinking_budget": 10}, "thinking")],
)
def test_options_that_exclude_each_other_are_the_requests(persona: str, given: dict[str, Any], absent: str) -> None:
    assert getattr(process(persona=persona, **given), absent) is UNSET


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"persona": "editr"}, "persona", "did you mean editor?"),
        ({"persona": "__class__"}, "persona", "there is no persona '__class__'"),
        ({"template": "tranlate"}, "template", "did you mean translate?"),
        ({"template": "translate"}, "values", "needs a value for 'language'"),
        ({"template": "translate", "values": {"langage": "x"}}, "values", "did you mean language?"),
        ({"template": "translate", "values": {"text": "x", "language": "y"}}, "values", "goes in `prompt`"),
        ({"values": {"a": "b"}}, "values", "no template is named"),
    ],
)
def test_what_is_wrong_is_refused_by_name(given: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        process(**given)
    assert said in caught.value.message
    assert caught.value.details["field"] == field


# --- templates ----------------------------------------------------------------------------------------------------


def test_a_template_takes_values_and_defaults() -> None:
    made = process(template="translate", values={"language": "German"}, prompt="Hi")
    assert made.prompt == "To German, plain: {Hi} German"
    assert (made.template, made.values) == (UNSET, UNSET)


@given(st.text(), st.text(), st.text())
def test_what_a_request_brings_is_put_in_as_it_is(prompt: str, language: str, tone: str) -> None:
    made = process(template="translate", values={"language": language, "tone": tone}, prompt=prompt or "x")
    assert made.prompt == f"To {language}, {tone}: {{{prompt or 'x'}}} {language}"


@pytest.mark.parametrize(
    "text", ["{language}", "{0}", "{text.__class__}", "{{}}", "%s %n", "{text!r:>9999999}", "${HOME}"]
)
def test_nothing_is_read_as_code(text: str) -> None:
    assert process(template="translate", values={"language": text}, prompt=text).prompt.count(text) == 3


def test_a_prompt_that_grows_beyond_all_bounds_is_refused_before_it_is_made() -> None:
    many = {"many": Template(prompt="{text}" * 10_000)}
    began = time.monotonic()
    with pytest.raises(InvalidParams, match="the limit is") as caught:
        completed(ProcessParams(prompt="x" * 1_000_000, template="many"), {}, many)
    assert caught.value.details["field"] == "prompt"
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "no place"}, "has no {text}"),
        ({"prompt": "{text} {"}, "a brace stands alone at '{'"),
        ({"prompt": "{text} }"}, "a brace stands alone"),
        ({"prompt": "{text} {Text}"}, "a brace stands alone"),
        ({"prompt": "{text} {text.real}"}, "a brace stands alone"),
        ({"prompt": "{text} {lang}"}, "{lang} is not among its placeholders"),
        ({"prompt": "{text} {langage}", "placeholders": ["language"]}, "did you mean language?"),
        ({"prompt": "{text}", "placeholders": ["language"]}, "has no {language}"),
        ({"prompt": "{text}", "defaults": {"text": "x"}}, "default for 'text'"),
    ],
)
def test_a_template_that_cannot_be_filled_is_no_template(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"brace|placeholders|has no|default") as caught:
        check_template(msgspec.convert(fields, Template))
    assert said in str(caught.value)


# --- in the settings ----------------------------------------------------------------------------------------------

WRITTEN = """
[personas.editor]
system = "Edit."
temperature = 0.2
stop = ["END"]

[templates.translate]
prompt = "To {language}: {text}"
placeholders = ["language"]
"""


def read(folder: Path, text: str) -> Any:
    return load({"HOME": str(folder), "MLXD_HOME": str(folder)}, text=text).settings


def test_they_are_written_in_the_file(tmp_path: Path) -> None:
    settings = read(tmp_path, WRITTEN)
    assert settings.personas == {"editor": Persona(system="Edit.", temperature=0.2, stop=["END"])}
    assert settings.templates["translate"].placeholders == ["language"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[personas.editor]\ntemprature = 1", "personas.editor cannot be {'temprature': 1} ({place}:2): it has a field "
         "'temprature' that is none; did you mean temperature?"),
        ("[personas.editor]\ntemperature = 9", "<= 5.0 at temperature"),
        ("[personas.editor]\nstream = true", "it has a field 'stream' that is none"),
        ("[personas.editor]\nschema = true\ngrammar = 'x'", "both a schema and a grammar"),
        ("[personas]\neditor = 'x'", "personas.editor cannot be 'x'"),
        ("personas = []", "personas cannot be []"),
        ("\n[templates.t]\nprompt = 'x'", "({place}:2): its prompt has no {text}"),
        ("[templates.t]\nprompt = '{text}'\nplaceholders = ['A']", "templates.t cannot be"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert said.replace("{place}", f"{tmp_path}/config.toml") in str(caught.value)


def test_as_typed() -> None:
    assert from_text("personas.editor", '{"system": "x"}') == {"system": "x"}
    assert from_text("aliases.a", "true") == "true"
    assert from_text("keep_alive.a/b.c", "-1") == -1
    assert from_text("pinned", '["a"]') == ["a"]
    assert from_text("kv_bits.a", "4") == 4
    assert from_text("log_prompts", "true") is True
    for name, text in (
        ("keep_alive.a", "x"),
        ("kv_bits.a", "5"),
        ("pinned", "[x"),
        ("nothing", "1"),
        ("drain_s.a", "1"),
    ):
        with pytest.raises(SettingsError):
            from_text(name, text)
