"""Whether a rewritten text says only what its source says, word by word.

Pure text in, words out: no model, no policy. Formatting is forgiven (casing, marks,
numbers in digits, symbols, joined or split words), other words are not. The time is
linear in the texts, whatever is in them.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

#: words that carry no content of their own; negations are not among them
FUNCTION_WORDS = frozenset(
    "a about an and are as at be been being but by could d did do does for from had has have he "
    "her here hers him his how i id if ill im in into is it its ive ll m may me might my of off on "
    "or our out over re s shall she should so than that thats the their them then there these "
    "they theyre this those to up us ve was we were what when where which who whom whose why will "
    "with would you your".split()
)
#: spellings that mean the same: variant -> the one compared
SAME = {
    "dr": "doctor",
    "mr": "mister",
    "mrs": "missus",
    "misses": "missus",
    "ms": "miss",
    "ok": "okay",
    "alright": "allright",
    "vs": "versus",
    "st": "street",
    "ave": "avenue",
    "rd": "road",
    "dollars": "dollar",
    "bucks": "dollar",
    "euros": "euro",
    "pounds": "pound",
    "cents": "cent",
    "percentage": "percent",
    "kg": "kilograms",
    "km": "kilometers",
    "mg": "milligrams",
    "ml": "milliliters",
    "cm": "centimeters",
    "mm": "millimeters",
    "lbs": "pound",
    "lb": "pound",
    "gb": "gigabytes",
    "mb": "megabytes",
    "kb": "kilobytes",
    "hr": "hours",
    "hrs": "hours",
    "min": "minutes",
    "mins": "minutes",
    "sec": "seconds",
    "secs": "seconds",
}
SYMBOLS = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "%": "percent", "@": "at", "&": "and"}

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_SMALL_ORDINALS = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = {word: value for names in (_SMALL, _SMALL_ORDINALS) for value, word in enumerate(names)}
VALUES |= {word: 10 * tens for tens, word in enumerate(_TENS, 2)}
VALUES |= {f"{word[:-1]}ieth": 10 * tens for tens, word in enumerate(_TENS, 2)}
VALUES |= {"oh": 0, "o": 0}
MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MULTIPLIERS |= {f"{word}th": value for word, value in MULTIPLIERS.items()}

#: bounds that keep the time linear: words joined, letters of a join, words and digits of a number
JOIN, JOINED_LETTERS, SPAN, DIGITS, READINGS = 5, 48, 14, 16, 24

_TOKEN = re.compile(
    r"\d{1,3}(?:,\d{3})+(?!\d)|\d+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    r"|(?:(?![\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])[^\W\d_])+"
    r"(?:['\u2019\u02bc](?:(?![\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])[^\W\d_])+)*|[$€£¥%@&]"
)
_APOSTROPHES = str.maketrans("", "", "'\u2019\u02bc")


class Token(NamedTuple):
    """A word, a group of digits or a symbol: as it stands, and as it is compared."""

    surface: str
    norm: str


def tokens(text: str) -> list[Token]:
    """Split a text; suffixes of ordinals (the "rd" of 3rd) are dropped."""
    found: list[Token] = []
    end_of_digits = -1
    for match in _TOKEN.finditer(text):
        surface = match[0]
        norm = _norm(surface)
        if match.start() == end_of_digits and surface.lower() in ("st", "nd", "rd", "th"):
            continue
        if norm.isdecimal():
            end_of_digits = match.end()
        if norm:
            found.append(Token(surface, norm))
    return found


def _norm(surface: str) -> str:
    """Case, accents and apostrophes off; digits in ASCII without commas; symbols as words."""
    if surface.isascii():
        folded = surface.lower().translate(_APOSTROPHES)
    else:
        split = unicodedata.normalize("NFKD", surface.casefold()).translate(_APOSTROPHES)
        folded = "".join(c for c in split if not unicodedata.combining(c)).casefold()
    if folded[:1].isdecimal():
        return "".join(str(unicodedata.decimal(c)) for c in folded if c.isdecimal())
    return SYMBOLS.get(surface) or SAME.get(folded, folded)


def content(text: str) -> tuple[str, ...]:
    """The content words of a text as they stand in it, digits and symbols included."""
    return tuple(t.surface for t in tokens(text) if t.norm not in FUNCTION_WORDS)


def invented(source: str, output: str) -> tuple[str, ...]:
    """The content words of ``output`` that ``source`` does not account for, in order.

    A word is accounted for as often as the source has it, so endless repetition shows too.
    Numbers may change form ("nineteen fifty" and 1950), words may be joined or split
    ("wi fi" and WiFi), letters may become an acronym. Never raises on text.
    """
    have, want = tokens(source), tokens(output)
    counts = Counter(t.norm for t in have)
    open_: list[int] = []
    for at, token in enumerate(want):
        if counts[token.norm] > 0:
            counts[token.norm] -= 1
        elif token.norm not in FUNCTION_WORDS:
            open_.append(at)
    if open_:
        open_ = _without_numbers(have, want, open_)
    if open_:
        open_ = _without_joins(have, want, open_)
    return tuple(want[at].surface for at in open_)


def missing(reference: str, output: str) -> tuple[str, ...]:
    """The content words of ``reference`` that ``output`` has lost, in order."""
    return invented(output, reference)


def kept(reference: str, output: str) -> float:
    """Share of the content words of ``reference`` that ``output`` has kept, 0 to 1."""
    total = len(content(reference))
    return 1.0 if not total else 1.0 - len(missing(reference, output)) / total


def _digits_of(norm: str) -> str | None:
    """The digits that a single output token stands for."""
    if norm.isdecimal():
        return norm.lstrip("0") or "0"
    if norm in VALUES:
        return str(VALUES[norm])
    return str(MULTIPLIERS[norm]) if norm in MULTIPLIERS else None


def _without_numbers(have: list[Token], want: list[Token], open_: list[int]) -> list[int]:
    """Drop from ``open_`` the numbers that the source says in other words."""
    wanted: dict[int, str] = {}
    for at in open_:
        number = _digits_of(want[at].norm)
        if number is not None:
            wanted[at] = number
    if not wanted:
        return open_
    found = numbers([t.norm for t in have], set(wanted.values()))
    return [at for at in open_ if wanted.get(at) not in found]


def numbers(norms: list[str], wanted: set[str]) -> set[str]:
    """Those of the ``wanted`` digit strings, without leading zeros, that spans of words may be written as."""
    prefixes = {number[:size] for number in wanted for size in range(min(len(number), DIGITS) + 1)}
    units = [_units(norms, at) for at in range(len(norms))]
    found: set[str] = set()
    for start in range(len(norms)):
        ends = {(start, "")} if units[start] else set()
        while ends:
            grown: set[tuple[int, str]] = set()
            for at, text in ends:
                for used, more in units[at] if at < len(units) else ():
                    longer = (text + more).lstrip("0")
                    if longer in prefixes and at + used - start <= SPAN:
                        grown.add((at + used, longer))
            ends = set(sorted(grown)[:READINGS])
            found.update((text or "0") for _, text in ends if (text or "0") in wanted)
    return found


def _numeric(norms: list[str], at: int) -> bool:
    norm = norms[at]
    if norm == "a":
        return at + 1 < len(norms) and norms[at + 1] in MULTIPLIERS
    return norm in VALUES or norm in MULTIPLIERS or (norm.isdecimal() and len(norm) <= DIGITS)


def _units(norms: list[str], at: int) -> list[tuple[int, str]]:
    """Readings that start at ``at``: (tokens used, digits), of one word up to a cardinal."""
    if at >= len(norms) or not _numeric(norms, at):
        return []
    norm, units = norms[at], []
    if norm.isdecimal():
        units.append((1, norm))
    elif norm in VALUES:
        units.append((1, str(VALUES[norm])))
        after = VALUES.get(norms[at + 1], 0) if at + 1 < len(norms) else 0
        if VALUES[norm] >= 20 and 0 < after < 10:
            units.append((2, str(VALUES[norm] + after)))
    units.extend(_cardinals(norms, at))
    return units


def _cardinals(norms: list[str], at: int) -> Iterator[tuple[int, str]]:
    """Readings with hundred, thousand and so on: "two thousand five hundred" is 2500."""
    total, group, scaled, last = 0, None, False, 10**DIGITS
    for used in range(1, SPAN + 1):
        if at + used > len(norms):
            return
        norm = norms[at + used - 1]
        if norm in MULTIPLIERS:
            size, group = MULTIPLIERS[norm], 1 if group is None else group
            if size >= last or (size == 100 and group >= 100) or group >= 1000:
                return
            if size == 100:
                group *= 100
            else:
                total, group, last = total + group * size, None, size
            scaled = True
        elif norm in ("and", "a") and (scaled or used == 1):
            continue
        elif norm in VALUES:
            below = group or 0
            room = 100 if not below % 100 else 10 if not below % 10 and below % 100 > 10 else 0
            if not 0 < VALUES[norm] < room:
                return
            group = below + VALUES[norm]
        elif norm.isdecimal() and len(norm) <= DIGITS and group is None:
            group = int(norm)
        else:
            return
        if scaled:
            yield used, str(total + (group or 0))


def _without_joins(have: list[Token], want: list[Token], open_: list[int]) -> list[int]:
    """Drop words that the source has in pieces, and pieces of words that it has whole."""
    wanted = {want[at].norm for at in open_}
    whole = wanted & set(_joins([t.norm for t in have]))
    left = [at for at in open_ if want[at].norm not in whole]
    runs = _runs(left)
    pieces: set[int] = set()
    words = {t.norm for t in have}
    for run in runs:
        for first in range(len(run)):
            text = ""
            for last in range(first, min(len(run), first + JOIN)):
                text += want[run[last]].norm
                if len(text) > JOINED_LETTERS:
                    break
                if last > first and text in words:
                    pieces.update(run[first : last + 1])
    return [at for at in left if at not in pieces]


def _joins(norms: list[str]) -> Iterator[str]:
    """Every join of two to JOIN neighbouring words, up to JOINED_LETTERS letters."""
    for start in range(len(norms)):
        text = norms[start]
        for norm in norms[start + 1 : start + JOIN]:
            text += norm
            if len(text) > JOINED_LETTERS:
                break
            yield text


def _runs(places: list[int]) -> list[list[int]]:
    """Neighbouring places together."""
    runs: list[list[int]] = []
    for at in places:
        if runs and runs[-1][-1] == at - 1:
            runs[-1].append(at)
        else:
            runs.append([at])
    return runs
