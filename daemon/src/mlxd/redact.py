"""What leaves this machine loses first: secrets, what people said, and where their home is.

Knows by name and by form what is a secret; whoever has one of their own passes it as such.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["TEXT_FIELDS", "TOKEN", "Redactor", "secrets_of"]

# Fields that hold what a user said or a model answered.
TEXT_FIELDS = frozenset(
    {"prompt", "text", "system", "messages", "content", "answer", "reasoning", "pieces", "invented"}
)
# A Hugging Face access token, as it may stand in an error's text.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

# Fields that hold what another program wrote, of which only the form is kept: see Redactor.trace.
_FOREIGN = frozenset({"last_words", "line", "exception", "stack", "stack_info"})
# Tables of settings whose values are prompts.
_PROMPTS = frozenset({"personas", "templates"})
_SECRET_NAME = re.compile(
    r"(token|secret|passw(or)?d|passphrase|credentials?|cookie|authorization|private_?key|api_?key|access_?key|_key)$",
    re.IGNORECASE,
)
# None of these may take a time that grows with the square of the text's length: the text may be anybody's.
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\bhf_[A-Za-z0-9]{6,}"), "hf_***"),
    (re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}"), "***"),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abprs]-)[A-Za-z0-9_-]{10,}"), "***"),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), "***"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]*"), "***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), r"\1 ***"),
    (re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/@'\"]+@"), r"\1***@"),
    (re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s?#'\"]{1,1000})[?#][^\s'\"]+"), r"\1?***"),
    (
        re.compile(
            r"(?i)((?:token|secret|passw(?:or)?d|api[_-]?key|credentials?|authorization)[\"']?\s*[=:]\s*)"
            r"([\"']?)[^\s\"',;}\]]{3,}"
        ),
        r"\1\2***",
    ),
    (re.compile(r"\b((?:personas|templates)\b\S*) cannot be .*", re.DOTALL), r"\1 cannot be …"),
    (re.compile(r"/(Users|home)/[^/\s'\":]+"), r"/\1/***"),
)
# Of a traceback, or of what a C library says before it ends a process. What else is printed may be anybody's text.
_TRACE = re.compile(
    r"\s*(Traceback |File \"|Fatal Python error|Current thread|Thread 0x|Python runtime state|<no Python frame>|"
    r"libc\+\+abi|terminate called|Assertion |-\[MTL|\[METAL\]|\[metal|\[malloc|\[mlx|MLX error|"
    r"During handling of the above|The above exception|  \+ Exception Group|Segmentation fault|Killed|Aborted)"
)
_EXCEPTION = re.compile(r"([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Died|Failed|Lost))\b")
_MOST_CHARACTERS = 2000
# So much of a text is looked through; what may be the beginning of something secret at its end is left out.
_LOOKED_THROUGH, _LEFT_OUT = 16_000, 4_000
_LEAST_SECRET = 5


class Redactor:
    """Replaces in text, and in values of any depth.

    Args:
        secrets: words that are replaced wherever they stand.
        home: the user's home folder, which becomes `~`.
    """

    def __init__(self, secrets: Iterable[str] = (), home: str = "") -> None:
        longest_first = sorted({secret for secret in secrets if len(secret) >= _LEAST_SECRET}, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        home = home.rstrip("/")
        self._home = re.compile(re.escape(home) + r"(?=/|[\s'\",:;)\]}]|$)") if home else None

    def text(self, text: str) -> str:
        if self._secrets is not None:
            text = self._secrets.sub("***", text)
        if self._home is not None:
            text = self._home.sub("~", text)
        for form, instead in _FORMS:
            text = form.sub(instead, text)
        return text

    def trace(self, text: str) -> str:
        """Of a traceback, or other last words: where it was and of what kind; never what the exception said."""
        kept = []
        for line in text.splitlines():
            if _TRACE.match(line):
                kept.append(self.text(line)[:300])
            elif found := _EXCEPTION.match(line):
                kept.append(found[1])
            elif line.strip():
                kept.append("…")
        shortened = [line for place, line in enumerate(kept) if line != "…" or kept[place - 1 : place] != ["…"]]
        return "\n".join(shortened)

    def value(self, value: Any, name: str = "") -> Any:
        """A value as JSON has them; `name` is that of the field that holds it."""
        if name in TEXT_FIELDS and isinstance(value, (str, bytes, list, tuple, dict)):
            return f"({len(value)} long)"
        if name in _PROMPTS and isinstance(value, dict):
            return sorted(map(self.text, value))
        if isinstance(value, str):
            if _SECRET_NAME.search(name) and value:
                return "***"
            if name in _FOREIGN:
                return self.trace(value)
            told = self.text(value[:_LOOKED_THROUGH])
            if len(value) > _LOOKED_THROUGH:
                told = told[:-_LEFT_OUT]
            return told if len(told) <= _MOST_CHARACTERS else told[:_MOST_CHARACTERS] + "…"
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(inner, name) for inner in value]
        return value if isinstance(value, (int, float, bool, type(None))) else self.text(str(value))


def secrets_of(env: Mapping[str, str]) -> set[str]:
    """What the environment holds that nobody else should see, and the token that the hub's tools have stored."""
    found = {value for name, value in env.items() if _SECRET_NAME.search(name)}
    for value in env.values():  # of http://user:password@proxy, either word
        for inside in re.findall(r"://([^\s/@]+)@", value):
            found |= {inside, *inside.split(":", 1)[1:]}
    folder = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    for path in (env.get("HF_TOKEN_PATH"), os.path.join(folder, "token")):
        try:
            with open(os.path.expanduser(path or ""), encoding="utf-8", errors="replace") as file:
                found.add(file.read(4096).strip())
        except OSError:
            pass
    return {secret for secret in found if len(secret) >= _LEAST_SECRET}
