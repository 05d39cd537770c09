"""Fills quotations in the docs from the files that they quote, so that what a page shows is what the tests run.

A page says `<!-- quoted: FILE NAME -->` … `<!-- end -->`; the file has the lines between `quoted: NAME` and
`end quoted`, each in a comment of its language. What the page has between its marks is made anew.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"<!-- quoted: (\S+) (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_LANGUAGES = {".py": "python", ".js": "js", ".ts": "ts", ".rs": "rust", ".swift": "swift", ".sh": "sh"}


def files(made: dict[Path, bytes | None]) -> dict[Path, bytes | None]:
    """The pages that quote; those that others make in part are taken as these left them."""
    out: dict[Path, bytes | None] = {}
    for page in sorted((ROOT / "docs").glob("*.md")):
        before = made.get(page) or page.read_bytes()
        text = before.decode()
        if _MARK.search(text):
            out[page] = _MARK.sub(lambda found: quotation(found[1], found[2]), text).encode()
    return out


def quotation(file: str, name: str) -> str:
    """The marks with what stands between them. Raises ValueError where the file has no such part."""
    source = (ROOT / file).read_text("utf-8")
    found = re.search(
        rf"^[^\n]*\bquoted: {re.escape(name)}\n(.*?)^[^\n]*\bend quoted", source, re.DOTALL | re.MULTILINE
    )
    if found is None:
        raise ValueError(f"{file} has no part {name!r}")
    text = textwrap.dedent(found[1]).strip("\n")
    return f"<!-- quoted: {file} {name} -->\n```{_LANGUAGES[Path(file).suffix]}\n{text}\n```\n<!-- end -->"
