"""From clean sentences to raw dictation: casing, punctuation, fillers, slips of the tongue.

``example`` is the generator's one entrance: a pair of raw and clean text, a pure
function of the random source.
"""

import re
from dataclasses import dataclass
from random import Random

from sentences import (
    CORRECTABLE,
    NUMERIC,
    SLOTS,
    Source,
    Unit,
    capital,
    fill,
    passage,
    salad,
    sentence,
    templates,
    unit,
    written,
)
from vocabulary import FUNCTION_WORDS, common_words, lines

#: always removed
FILLERS = ("um", "uh", "um", "uh", "er", "erm", "uhm", "umm", "uhh", "hmm")
#: removed only next to a filler, or inside a clause for "you know" and "i mean"
SOFT = ("like", "so", "well", "you know", "i mean", "okay so", "basically")
#: words of SOFT: no filler is put beside one that is to be kept
SOFT_WORDS = frozenset("like so well know mean okay basically".split())
DOUBLED = frozenset("very really so that had no bye ha yes many".split())
MARKERS = (
    "no sorry",
    "sorry",
    "i mean",
    "no wait",
    "wait no",
    "or rather",
    "no i mean",
    "sorry i mean",
    "uh no",
    "no actually",
    "make that",
    "oh wait",
    "um no sorry",
    "i'm sorry",
    "actually no",
    "no make that",
)
SCRATCH = (
    "scratch that",
    "no scratch that",
    "um scratch that",
    "scratch that sorry",
    "delete that",
    "actually scratch that",
    "no wait scratch that",
)
ABANDONED = (
    "i was going to",
    "what i",
    "i think that",
    "the thing",
    "so the",
    "we were",
    "if you",
    "it's",
    "there's a",
    "i just",
    "and then",
    "can we",
    "he said",
    "i wanted",
    "this is the",
    "well the",
)
SPOKEN_MARKS = {",": "comma", ".": "period", "?": "question mark", "!": "exclamation point", ":": "colon"}
PREPOSITIONS = frozenset("on at in to for from by with of about until before after since".split())
DETERMINERS = frozenset("the a an my your his her our their this that these those some".split())
CONTRACTIONS = frozenset(
    "don't doesn't didn't can't won't isn't aren't wasn't weren't couldn't wouldn't shouldn't haven't "
    "hasn't i'm i've you're they're that's there's what's let's it's".split()
)


@dataclass(slots=True)
class Heard:
    """A stretch of raw speech: ``said`` bare, ``print`` as a careful recogniser writes it."""

    said: str
    print: str
    tail: str = ""
    filler: bool = False


def heard(u: Unit) -> Heard:
    return Heard(u.said, u.text, u.tail)


def filler(rng: Random) -> Heard:
    """A hard filler, at times with a soft one beside it."""
    word = rng.choice(FILLERS)
    roll = rng.random()
    parts = [word]
    if roll < 0.12:
        parts = [word, rng.choice(SOFT)]
    elif roll < 0.2:
        parts = [rng.choice(SOFT), word]
    elif roll < 0.25:
        parts = [word, rng.choice(FILLERS)]
    shown = rng.choice((", ", ", ", " ")).join(parts).replace("i mean", "I mean")
    tail = "" if (roll < 0.12 and rng.random() < 0.6) or rng.random() < 0.1 else ","
    return Heard(" ".join(parts), shown, tail, True)


def partial(word: str, rng: Random) -> str | None:
    """The cut-off start of a word, or None where it would be a word of its own."""
    if len(word) < 3 or not word.isalpha():
        return None
    cut = word[: rng.randint(1, min(4, len(word) - 1))]
    if cut in FUNCTION_WORDS or cut in COMMON or cut in ("a", "i"):
        return None
    return cut


COMMON = frozenset(common_words())


def correction(units: list[Unit], at: int, out: list[Heard], src: Source) -> None:
    """Say another value first, then take it back; ``out`` gets the wrong part."""
    rng, u = src.rng, units[at]
    wrong = unit(u.kind, src)
    if wrong.said == u.said:
        return
    marker = rng.choice(MARKERS)
    if u.kind not in NUMERIC and marker in ("sorry", "make that", "uh no"):
        marker = "no sorry"
    out.append(Heard(wrong.said, wrong.text, ","))
    parts = marker.replace("i mean", "I mean").replace("i'm", "I'm")
    out.append(Heard(marker, parts, ",", True))
    if at and units[at - 1].said in PREPOSITIONS | DETERMINERS and not units[at - 1].tail:
        lead = units[at - 1]
        roll = rng.random()
        if roll < 0.5 or (lead.said in DETERMINERS and u.kind not in NUMERIC):
            out.append(heard(lead))


def slips(units: list[Unit], rates: dict[str, float], src: Source) -> list[Heard]:
    """Raw speech of one sentence, by the rate of each slip per word."""
    rng, out = src.rng, []
    for at, u in enumerate(units):
        beside = u.said in SOFT_WORDS or (at > 0 and units[at - 1].said in SOFT_WORDS)
        if rng.random() < rates["filler"] and not beside:
            out.append(filler(rng))
        elif (
            at > 1
            and rng.random() < rates["soft"]
            and not units[at - 1].tail
            and (units[at - 1].said not in KNOWING and u.said not in KNOWN)
        ):
            word = rng.choice(("you know", "you know", "i mean"))
            out.append(Heard(word, word.replace("i m", "I m"), ",", True))
        roll = rng.random()
        if u.kind in CORRECTABLE and rng.random() < rates["correct"]:
            correction(units, at, out, src)
        elif roll < rates["repeat"] and u.said not in DOUBLED and u.kind not in NUMERIC:
            for _ in range(rng.choice((1, 1, 1, 2))):
                out.append(Heard(u.said, u.text))
        elif roll < rates["repeat"] + rates["start"]:
            cut = partial(u.said, rng)
            if cut:
                out.append(Heard(cut, cut + rng.choice(("-", "-", "")), ""))
                back = rng.choice((0, 0, 1, 2))
                if all(not p.tail for p in units[max(0, at - back) : at]):
                    out.extend(heard(p) for p in units[max(0, at - back) : at])
        elif roll < rates["repeat"] + rates["start"] + rates["again"] and at >= 2:
            back = rng.choice((2, 2, 3, 4))
            span = units[max(0, at - back) : at]
            if all(not p.tail for p in span) and span[0].said != u.said:
                if rng.random() < 0.3:
                    out.append(filler(rng))
                out.extend(heard(p) for p in span)
        out.append(heard(u))
    if rng.random() < rates["filler"] / 2:
        out.append(filler(rng))
    return out


KNOWING = frozenset(
    "do you don't if as that did let didn't does i we they to should would could may "
    "might please already never always and but".split()
)
KNOWN = frozenset("what the a how that who where when why if about it him her them this".split())
QUIET = {"filler": 0.0, "soft": 0.0, "correct": 0.0, "repeat": 0.0, "start": 0.0, "again": 0.0}


def rates(rng: Random) -> dict[str, float]:
    """How clumsy a speaker is."""
    roll = rng.random()
    if roll < 0.25:
        return QUIET
    if roll < 0.92:
        return {"filler": 0.07, "soft": 0.006, "correct": 0.12, "repeat": 0.025, "start": 0.012, "again": 0.012}
    return {"filler": 0.15, "soft": 0.01, "correct": 0.2, "repeat": 0.06, "start": 0.03, "again": 0.02}


def bare(stream: list[Heard], rng: Random, printed: float, drop_apostrophe: bool, marks: bool) -> str:
    """Lower case without punctuation, as a plain recogniser gives it.

    ``printed``: share of values written in digits; ``marks``: punctuation is said aloud.
    """
    words = []
    for h in stream:
        word = h.said
        if any(c.isdigit() for c in h.print) and rng.random() < printed:
            word = h.print.lower()
            if word.endswith((" am", " pm")) and rng.random() < 0.3:
                word = word[:-3] + word[-2:]
        if drop_apostrophe and word in CONTRACTIONS:
            word = word.replace("'", "")
        words.append(word)
        if marks and not h.filler:
            words.extend(SPOKEN_MARKS[c] for c in h.tail if c in SPOKEN_MARKS)
    return " ".join(words)


def printed(stream: list[Heard], rng: Random, digits: float) -> str:
    """Cased and punctuated, slips included, as a careful recogniser gives it."""
    words: list[str] = []
    start = True
    for h in stream:
        word = h.print
        if any(c.isdigit() for c in word) and rng.random() >= digits:
            word = h.said
        if h.filler and words and words[-1][-1].isalnum():
            words[-1] += ","
        if start and word[:1].islower() and not ("@" in word or "." in word or "_" in word):
            word = word[0].upper() + word[1:]
        start = False
        words.append(word + h.tail)
    text = " ".join(words)
    return text if text[-1:] in ".!?" else text.rstrip(",") + "."


def scratched(src: Source, sentences: list[list[Unit]]) -> list[Heard]:
    """A sentence that the speaker takes back, with the words that do so."""
    rng = src.rng
    last = sentences[-1]
    if rng.random() < 0.6:
        pool = templates("train")
        wrong = fill(rng.choice(pool), src)
    else:
        wrong = [unit(u.kind, src) if u.kind in SLOTS and u.kind in CORRECTABLE else u for u in last]
    words = rng.choice(SCRATCH)
    out = [heard(capital(u)) if i == 0 else heard(u) for i, u in enumerate(wrong)]
    out.append(Heard(words, words[0].upper() + words[1:], ".", True))
    return out


def clean_text(src: Source) -> str:
    """Text that is clean already, in a style that the templates do not make."""
    rng = src.rng
    line = rng.choice(lines("clean"))

    def value(match: re.Match) -> str:
        text = SLOTS[match[1]](src)[0]
        start = match.start() == 0 or line[match.start() - 1] in '\n"'
        return text[0].upper() + text[1:] if start and rng.random() < 0.9 else text

    return re.sub(r"\{(\w+)\}", value, line)


def dictation(src: Source, sentences: list[list[Unit]], plain: bool = False) -> str:
    """Raw dictation of clean sentences, in one of the styles of recognisers."""
    rng = src.rng
    pace = QUIET if plain else rates(rng)
    style = rng.random()
    scratch = not plain and len(sentences) < 3 and rng.random() < 0.025
    marks = not plain and rng.random() < 0.03
    if style < 0.74:
        drop, digits = rng.random() < 0.12, rng.choice((0.0, 0.0, 0.0, 0.5, 1.0))
        render = lambda s: bare(s, rng, digits, drop, marks)  # noqa: E731
    elif style < 0.82:
        render = lambda s: " ".join(h.print for h in s)  # noqa: E731
    else:
        digits = rng.choice((1.0, 1.0, 0.5, 0.0))
        render = lambda s: printed(s, rng, digits)  # noqa: E731
    parts = []
    for at, units in enumerate(sentences):
        if scratch and at == len(sentences) - 1:
            parts.append(render(scratched(src, sentences)))
        stream = slips(units, pace, src)
        first = next((h for h in stream if not h.filler), None)
        if first is not None and stream[0] is first and style >= 0.74:
            first.print = capital(Unit(first.print, "")).text if not units[0].fixed else first.print
        if not plain and pace is not QUIET and rng.random() < 0.012:
            words = rng.choice(ABANDONED)
            joint = rng.choice(FILLERS[:4])
            stream = [Heard(f"{words} {joint}", f"{words}, {joint}", ",", True), *stream]
        parts.append(render(stream))
    return " ".join(parts)


def example(rng: Random, test: bool = False, copying: float = 0.12) -> tuple[str, str]:
    """One pair (raw, clean).

    ``test``: held-out words and templates too. ``copying``: share of word salad.
    """
    src = Source(rng, test)
    roll = rng.random()
    if roll < copying:
        sentences = [salad(src)]
        plain = rng.random() < 0.5
        if rng.random() < 0.15:
            return (text := written(sentences)), text
        return dictation(src, sentences, plain), written(sentences)
    roll = rng.random()
    if roll < 0.04:
        return (text := clean_text(src)), text
    if rng.random() < 0.25:
        sentences = passage(src)
    else:
        count = rng.choices((1, 2, 3, 4), (60, 25, 10, 5))[0]
        sentences = [sentence(src, count == 1) for _ in range(count)]
    clean = written(sentences)
    if roll < 0.16:
        return clean, clean
    return dictation(src, sentences), clean


if __name__ == "__main__":
    import sys

    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for index in range(30):
        raw, text = example(Random(seed * 1000 + index))
        print(f"- {raw}\n+ {text}\n")
