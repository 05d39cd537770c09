"""What the docs name exists: links and their anchors, commands and options, settings, methods."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import runpy
import shlex
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxd.cli.exits import BY_KIND
from mlxd.cli.main import build_parser
from mlxd.cli.shells import describe
from mlxd.server.methods.table import METHODS
from mlxd.settings import Settings
from mlxd_client import Client, errors, types
from mlxd_client.methods import ChatOptions, ProcessOptions

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "client/*.md", "clients/**/*.md", "daemon/*.md", "tools/**/*.md")
    for path in ROOT.glob(pattern)
    if "node_modules" not in path.parts
)
DOCS = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
SETTINGS = set(Settings.__struct_fields__)
DEV_COMMANDS = runpy.run_path(str(ROOT / "tools" / "dev.py"))["COMMANDS"]
# Variables that are no settings: those of the tests, and those that stand for any.
OTHER_VARIABLES = {"MLXD_COMMAND", "MLXD_NAME"}
PLACEHOLDERS = {"COMMAND": "run", "PID": "1"}

named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^(```).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


# --- links --------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, by the rules of the forges that show these pages."""
    out: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page.read_text("utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in out:
            number += 1
        out.add(name)
    return out


@named
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@named
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(
        r"`((?:client|clients|daemon|docs|launchd|tests|tools)/[\w./*-]+)`", page.read_text("utf-8")
    ):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {path}"


def test_every_page_is_found_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    links = re.findall(r"\]\(([^)]+)\)", index.read_text("utf-8"))
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links}
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page != index and page not in linked] == []
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


# --- commands -----------------------------------------------------------------------------------------------------


def command_lines(text: str) -> Iterator[str]:
    """Every `mlxd …` that a page shows: in blocks, in indented lines, and in running text, where two words name it."""
    shown = re.findall(r"^ {4}(\S.*)$", prose(text), re.MULTILINE)
    for code in blocks(text, "", "sh", "console"):
        shown += code.splitlines()
    for line in shown:
        yield from _of_shell(line.removeprefix("$ "))
    for code in re.findall(r"`(mlxd [^`]+)`", prose(text)):
        yield from _of_shell(f"{code} --help" if len(code.split()) == 2 else code)


def _of_shell(line: str) -> Iterator[str]:
    """The commands of one line: what pipes, redirections and comments separate."""
    if "mlxd" not in line:
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    try:
        tokens = [*lexer, "|"]
    except ValueError:  # an apostrophe: the line is a sentence
        return
    words: list[str] = []
    before = ""
    for token in tokens:
        if re.fullmatch(r"[|&;]+", token):
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "mlxd":
                yield shlex.join(words)
            words = []
        elif not re.fullmatch(r"[<>]+", token) and before not in ("<", ">", ">>"):
            words.append(token)
        before = token


def wrong(line: str) -> str | None:
    """What the parser has against a command line, or None. Files that it names are there, where they are read."""
    told = io.StringIO()
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)[1:]]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for word in words:
            if re.fullmatch(r"[\w-]+\.(json|lark|txt)", word):
                Path(word).write_text("{}" if word.endswith("json") else "start: /x/")
        return _wrong(words, told)


def _wrong(words: list[str], told: io.StringIO) -> str | None:
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            build_parser().parse_args(words)
    except SystemExit as end:
        return None if end.code == 0 else told.getvalue().splitlines()[-1]
    return None


@named
def test_commands_parse(page: Path) -> None:
    for line in command_lines(page.read_text("utf-8")):
        if "…" not in line:  # which stands for more of the kind
            assert wrong(line) is None, f"{page.name}: {line}: {wrong(line)}"


def test_the_test_would_see_a_wrong_one() -> None:
    (line,) = command_lines("text\n\n    HF_HOME=/x mlxd run --no-such hello | cat > mlxd   # mlxd nonsense\n")
    assert line == "mlxd run --no-such hello"
    assert wrong(line) is not None
    assert wrong("mlxd run hello") is None


def test_the_command_page_lists_every_command() -> None:
    listed = re.findall(r"^\| `([\w-]+)", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    assert {command.name for command in describe(build_parser())} == set(listed)


@pytest.mark.parametrize("page", [page for page in DOCS if page.name != "benchmarks.md"], ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    """Of the command; other programs' are named with the program."""
    known = {flag for command in describe(build_parser()) for word in command.options for flag in word.flags}
    for option in re.findall(r"`(--[\w-]+)[^`]*`", prose(page.read_text("utf-8"))):
        assert option in known, f"{page.name} names the option {option}"


@named
def test_commands_of_the_repository_exist(page: Path) -> None:
    for name in re.findall(r"tools/dev\.py (\w+)", page.read_text("utf-8")):
        assert name in DEV_COMMANDS, f"{page.name} names tools/dev.py {name}"


# --- settings and methods -----------------------------------------------------------------------------------------


@named
def test_settings_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"\bMLXD_([A-Z][A-Z_]+)\b", text):
        assert f"MLXD_{name}" in OTHER_VARIABLES or name.lower() in SETTINGS, f"{page.name} names MLXD_{name}"
    for name in re.findall(r"--set '?(\w+)=(?!VALUE)", text):
        assert name in SETTINGS, f"{page.name} sets {name}"
    for code in blocks(text, "toml"):
        assert set(tomllib.loads(code)) <= SETTINGS, f"{page.name} has other keys than settings"
    for name in re.findall(r"\bsetting `(\w+)", text):
        assert name in SETTINGS, f"{page.name} names the setting {name}"
    for table in re.findall(r"^\| setting .*\n\|[-| ]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        for name in re.findall(r"^\| `\[?(\w+)", table, re.MULTILINE):
            assert name in SETTINGS, f"{page.name} lists {name} as a setting"


@named
def test_methods_and_events_exist(page: Path) -> None:
    groups = "|".join(sorted({name.partition(".")[0] for name in METHODS if "." in name}))
    for name in re.findall(rf"`((?:{groups})\.(?!(?:json|py|toml)\b)[a-z_]+)`", prose(page.read_text("utf-8"))):
        field = name in {f"events.{field}" for field in ("epoch", "rev", "snapshot")}
        assert name in METHODS or field, f"{page.name} names the method {name}"
    for name in re.findall(r"\bevents? `(\w+)`", prose(page.read_text("utf-8"))):
        known = {*types.EVENT_TOPICS, "stream", "event", "lagged", "resync"}
        assert name in known, f"{page.name} names the event {name}"


# --- errors -------------------------------------------------------------------------------------------------------


def test_every_kind_of_error_is_explained() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    explained = re.findall(r"^\| `(\w+)` \| .*\S.* \|$", page.partition("## Errors by kind")[2], re.MULTILINE)
    assert sorted(explained) == sorted(BY_KIND)
    assert errors.BY_KIND.keys() <= BY_KIND.keys()
    for name in re.findall(r"\| `([A-Z]\w+)`(?:, `([A-Z]\w+)`)? \|", page):
        assert all(issubclass(getattr(errors, one), errors.ClientError) for one in name if one)


# --- code ---------------------------------------------------------------------------------------------------------


@named
def test_python_that_is_shown_names_what_there_is(page: Path) -> None:
    """That docs/clients.md runs is another test's; here each block compiles, and calls what clients have."""
    for code in blocks(page.read_text("utf-8"), "python"):
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST
        for node in ast.walk(compile(code, page.name, "exec", flags)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id == "client":
                name, given = node.func.attr, {keyword.arg for keyword in node.keywords} - {None}
                assert hasattr(Client, name), f"{page.name} calls client.{name}"
                assert given <= keywords(name), f"{page.name}: client.{name} takes no {given - keywords(name)}"


def keywords(method: str) -> set[str | None]:
    """What a method of the client may be given by name."""
    options = {"process": ProcessOptions, "chat": ChatOptions}.get(method.removeprefix("stream_"))
    own = set(inspect.signature(getattr(Client, method)).parameters)
    return own | set(options.__annotations__ if options is not None else ())
