"""Clean sentences as lists of units: templates filled from the word lists.

A unit knows how it is written and how it is said; ``corrupt`` turns a list of units
into raw dictation. Everything is a function of a ``random.Random``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import spoken
from vocabulary import (
    FUNCTION_WORDS,
    MEDICINES,
    clear_names,
    common_words,
    held,
    lines,
    made_up,
    made_up_name,
    plural,
    read,
    verbs,
)


@dataclass(frozen=True, slots=True)
class Unit:
    """One written word or value.

    ``text`` is written inside a sentence, ``said`` spoken in lower case; ``tail`` and
    ``head`` are the punctuation that sticks to it; ``kind`` is the slot it came from
    ("w": an ordinary word); ``fixed`` forbids a capital at the start of a sentence.
    """

    text: str
    said: str
    kind: str = "w"
    tail: str = ""
    head: str = ""
    fixed: bool = False


class Source:
    """Draws words; ``test`` lets held-out words and templates in, and prefers them."""

    def __init__(self, rng: Random, test: bool = False):
        self.rng, self.test = rng, test

    def pick(self, words: tuple[str, ...]) -> str:
        """One word; in training never a held-out one, in testing a third of the time one."""
        want = self.test and self.rng.random() < 0.33
        for _ in range(30):
            word = self.rng.choice(words)
            if held(word) == want:
                return word
        return self.rng.choice(words) if self.test else words[1]

    def noun(self) -> str:
        if self.rng.random() < 0.04:
            return made_up(self.rng)
        word = self.pick(read("nouns"))
        if self.rng.random() < 0.06:
            return f"{self.pick(read('nouns'))} {word}"
        return word

    def first(self) -> str:
        return made_up_name(self.rng) if self.rng.random() < 0.12 else self.pick(read("first_names"))

    def last(self) -> str:
        name = made_up_name(self.rng) if self.rng.random() < 0.2 else self.pick(read("last_names"))
        if name in ("Obrien", "OConnor", "ODonnell", "OLeary", "ONeill"):
            return f"O'{name[1].upper()}{name[2:]}"
        return name


def said_file(text: str) -> str:
    return (
        text.replace(".", " dot ").replace("_", " underscore ").replace("-", " dash ").replace("/", " slash ").lower()
    )


def slug(src: Source) -> str:
    rng = src.rng
    return rng.choice((src.pick(read("nouns")), src.first().lower(), made_up(rng)))


def email(src: Source) -> tuple[str, str]:
    rng = src.rng
    user = (
        rng.choice(
            (
                lambda: f"{src.first()}.{src.last()}",
                lambda: src.first(),
                lambda: f"{src.first()}_{src.last()}",
                lambda: f"{src.first()}{rng.randint(1, 99)}",
                lambda: slug(src),
                lambda: made_up(rng),
            )
        )()
        .lower()
        .replace("'", "")
    )
    host = f"{rng.choice(('example', 'gmail', 'outlook', 'yahoo', slug(src), slug(src)))}"
    host = f"{host}.{rng.choice(('com', 'com', 'org', 'net', 'edu', 'io', 'de', 'co.uk'))}"
    text = f"{user}@{host}"
    said = re.sub(r"\d+", lambda m: " " + spoken.under_hundred(int(m[0])), said_file(user))
    return text, f"{said} at {said_file(host)}"


def url(src: Source) -> tuple[str, str]:
    rng = src.rng
    text = f"{slug(src)}.{rng.choice(('com', 'org', 'io', 'net', 'dev'))}"
    if rng.random() < 0.4:
        text = f"www.{text}"
    if rng.random() < 0.4:
        text += f"/{slug(src)}"
    said = said_file(text)
    if rng.random() < 0.3:
        said = said.replace("www ", "w w w ")
    return text, said


def file(src: Source) -> tuple[str, str]:
    rng = src.rng
    base = slug(src) + (f"_{slug(src)}" if rng.random() < 0.3 else "")
    ext = rng.choice("py js ts json md txt csv yaml html css pdf sh toml".split())
    said = said_file(base) + " dot " + (" ".join(ext) if rng.random() < 0.4 else ext)
    return f"{base}.{ext}", said


def ident(src: Source) -> tuple[str, str]:
    text = "_".join(slug(src) for _ in range(src.rng.choice((2, 2, 3))))
    return text, said_file(text)


def title(src: Source, kinds: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    written, said = src.rng.choice(kinds)
    name = src.last() if src.rng.random() < 0.85 else src.pick(common_words()).capitalize()
    return f"{written} {name}", f"{said} {name.lower()}"


def cased(name: str, rng: Random) -> tuple[str, str]:
    """A name as written and as heard: acronyms may be spelled out."""
    if name.isupper() and len(name) <= 5 and rng.random() < 0.15:
        return name, " ".join(name.lower())
    return name, name.lower()


def noun_phrase(src: Source) -> str:
    """A noun phrase without an article, of one to three words."""
    rng = src.rng
    head = rng.choice((plural(src.pick(read("nouns"))), src.pick(read("mass")), src.pick(read("mass"))))
    roll = rng.random()
    if roll < 0.35:
        return head
    if roll < 0.6:
        return f"{src.pick(read('adjectives'))} {head}"
    if roll < 0.8:
        return f"{src.pick(read('nouns'))} {head}"
    if roll < 0.9:
        return f"{src.pick(read('nouns'))} of {src.pick(read('mass'))}"
    return f"a {src.pick(read('nouns'))}" if rng.random() < 0.5 else f"some {head}"


KIN = (
    "Aunt {F}|Uncle {F}|Grandma {F}|Grandpa {F}|Professor {L}|Captain {L}|Coach {L}|Judge {L}|Senator {L}|"
    "Officer {L}|Detective {L}|President {L}|Queen {F}|King {F}|Saint {F}|Father {F}|Sister {F}|Nurse {F}"
).split("|")
INSTITUTIONS = (
    "{L} Hospital|{P} General Hospital|Saint {F} Hospital|{P} University|the University of {P}|{L} College|"
    "{L} Elementary|{L} High School|{P} Airport|the {P} Museum of Art|the Bank of {P}|{L} and Sons|{L} Brothers|"
    "the {P} Times|the {L} Institute|{P} City Hall|{L} Dental|{L} Pharmacy|the {L} Foundation"
).split("|")
PLACES = (
    "Lake {L}|Mount {L}|the {L} River|{L} Park|{L} Beach|{L} County|{L} Bridge|{L} Square|{L} Street|"
    "{L} Avenue|{L} Road|North {P}|South {P}|West {P}|East {P}|Fort {L}|Port {L}|{L} Island|{L} Falls|"
    "Cape {L}|{L} Bay|{L} Valley|the {P} Canal|Mount {mk}|Lake {mk}"
).split("|")


def pattern(choices: list[str]) -> Callable[[Source], tuple[str, str]]:
    """A slot filled from patterns that hold names."""

    def make(source: Source) -> tuple[str, str]:
        text = re.sub(r"\{(\w+)\}", lambda m: SLOTS[m[1]](source)[0], source.rng.choice(choices))
        return text, text.lower()

    return make


TITLES = (("Mr.", "mister"), ("Mr.", "mr"), ("Mrs.", "mrs"), ("Ms.", "ms"))
DOCTORS = (("Dr.", "doctor"), ("Dr.", "dr"), ("Dr.", "doctor"))
#: slot -> maker of (written, said)
SLOTS = {
    "N": lambda s: (w := s.noun(), w),
    "Ns": lambda s: (w := plural(s.pick(read("nouns"))), w),
    "M": lambda s: (w := s.pick(read("mass")), w),
    "J": lambda s: (w := made_up(s.rng) if s.rng.random() < 0.03 else s.pick(read("adjectives")), w),
    "R": lambda s: (w := s.pick(read("adverbs")), w),
    "V": lambda s: (w := made_up(s.rng) if s.rng.random() < 0.03 else s.rng.choice(verbs()).base, w),
    "Vs": lambda s: (w := s.rng.choice(verbs()).third, w),
    "Ved": lambda s: (w := s.rng.choice(verbs()).past, w),
    "Vpp": lambda s: (w := s.rng.choice(verbs()).participle, w),
    "Ving": lambda s: (w := s.rng.choice(verbs()).ing, w),
    "F": lambda s: (w := s.first(), w.lower()),
    "L": lambda s: (w := s.last(), w.lower()),
    "FL": lambda s: (w := f"{s.first()} {s.last()}", w.lower()),
    "P": lambda s: (w := made_up_name(s.rng) if s.rng.random() < 0.1 else s.rng.choice(read("places")), w.lower()),
    "rel": lambda s: (w := s.rng.choice(read("relations")), w),
    "NP": lambda s: (w := noun_phrase(s), w),
    "B": lambda s: cased(s.rng.choice(read("brands")), s.rng),
    "A": lambda s: cased(s.rng.choice(read("acronyms")), s.rng),
    "mk": lambda s: (w := made_up_name(s.rng), w.lower()),
    "Dr": lambda s: title(s, DOCTORS),
    "Mr": lambda s: title(s, TITLES),
    "med": lambda s: (w := s.rng.choice(MEDICINES), w),
    "kin": pattern(KIN),
    "inst": pattern(INSTITUTIONS),
    "geo": pattern(PLACES),
    "lang": lambda s: (w := s.rng.choice(read("languages")), w.lower()),
    "holi": lambda s: (w := s.rng.choice(read("holidays")), w.lower()),
    "email": email,
    "url": url,
    "file": file,
    "ident": ident,
}
VALUES = (
    "time hour day month date year num num2 big dec ver digits ordnum ordday money bigmoney pct age yearold "
    "frac dur temp bp phone flight addr span"
).split()


def value(make: Callable[[Random], spoken.Pair]) -> Callable[[Source], spoken.Pair]:
    """A slot whose filling needs no words."""
    return lambda source: make(source.rng)


SLOTS |= {name: value(getattr(spoken, name)) for name in VALUES}
SLOTS["digits2"] = SLOTS["num2"]
#: kinds that a speaker corrects with another value of the same kind
CORRECTABLE = frozenset(
    "time hour day month date year num big dec ver digits money pct age dur temp "
    "F FL P B N M J Ns Dr Mr phone addr".split()
)
NUMERIC = frozenset(
    "time hour day month date year num num2 big dec ver digits digits2 money bigmoney "
    "pct age yearold dur temp bp phone flight addr span ordnum ordday email url file ident".split()
)
FIXED = frozenset(("email", "url", "file", "ident"))

CHOICE = re.compile(r"\(([^()|]+(?:\|[^()|]+)+)\)")


def unit(kind: str, src: Source) -> Unit:
    """A filled slot."""
    text, said = SLOTS[kind](src)
    return Unit(text, said, kind, fixed=kind in FIXED or (text[:1].islower() and text[1:2].isupper()))


def starts_with_vowel(word: str) -> bool:
    low = word.lower()
    if word.isupper() and len(word) > 1:
        return word[0] in "AEFHILMNORSX"
    if low.startswith(("hour", "honest", "heir", "8", "11", "18")):
        return True
    if low.startswith(("uni", "use", "usu", "eu", "one", "once", "util", "ukr")) and low != "uninvited":
        return False
    return low[:1] in VOWEL_LETTERS


VOWEL_LETTERS = frozenset("aeiou")


def fill(template: str, src: Source) -> list[Unit]:
    """The units of one template line."""
    text = CHOICE.sub(lambda m: src.rng.choice(m[1].split("|")), template)
    units: list[Unit] = []
    for word in text.split():
        match = re.match(r"^([\"(]*)\{(\w+)\}((?:'s)?)([.,!?;:)\"]*)$", word)
        if match:
            head, kind, suffix, tail = match.groups()
            made = unit(kind, src)
            made = replace(
                made,
                text=made.text + suffix,
                said=made.said + suffix,
                head=head,
                tail=tail,
                kind="w" if suffix else kind,
            )
        else:
            core = word.rstrip('.,!?;:"') if word not in (".", "...") else word
            lowered = core.lower()
            made = Unit(core, lowered, tail=word[len(core) :])
        if units and units[-1].text.lower() in ("a", "an"):
            vowel = starts_with_vowel(made.text)
            article = "an" if vowel else "a"
            old = units[-1]
            units[-1] = replace(old, text=article if old.text[0] == "a" else article.capitalize(), said=article)
        units.append(made)
    first = units[0]
    if first.kind == "w" and first.text not in ("I", "I'm", "I'd", "I'll", "I've"):
        units[0] = replace(first, text=first.text[0].lower() + first.text[1:])
    return units


@cache
def templates(which: str) -> tuple[str, ...]:
    """Template lines: "train", or "test" for those kept out of training."""
    found = [t for t in lines("templates") if held(t) == (which == "test")]
    return tuple(found + [t for t in lines("natural") if held(t) == (which == "test")])


@cache
def passages(which: str) -> tuple[tuple[str, ...], ...]:
    """Passages split into sentences, "train" or "test" as ``templates``."""
    return tuple(tuple(re.split(r"(?<=[.!?]) ", line)) for line in lines("passages") if held(line) == (which == "test"))


def salad(src: Source) -> list[Unit]:
    """Random words in random order: nothing to lean on, so the model has to copy."""
    rng = src.rng
    units = []
    mix, values = rng.random(), rng.random() < 0.45
    for _ in range(rng.choice((1, 2, 3, 4, 6, 8, 10, 12, 15, 20))):
        roll = rng.random()
        if values and units and roll < 0.25 and units[-1].kind == "w":
            units.append(unit(rng.choice(SALAD_VALUES), src))
            continue
        if roll < 0.3 * mix:
            word = made_up(rng)
        elif roll < 0.62:
            word = src.pick(common_words())
        elif roll < 0.94:
            word = rng.choice(FUNCTION_LIST)
        else:
            word = rng.choice(clear_names())
        if units and units[-1].text.lower() == word.lower():
            continue
        text = word if word[0].isupper() or (not word.startswith(("i'",)) and word != "i") else ("I" + word[1:])
        units.append(Unit(text, word.lower(), "w", fixed=text[:1].islower() and text[1:2].isupper()))
    return [*units[:-1], replace(units[-1], tail=".")]


#: values that may stand anywhere in a salad
SALAD_VALUES = tuple(
    "time day date year num num big dec ver digits money money bigmoney pct pct dur temp bp phone flight addr span "
    "email url file ordnum age Dr Mr".split()
)
FUNCTION_LIST = tuple(sorted(FUNCTION_WORDS - {"well", "so", "like", "okay", "me", "may"}))
KEEP = FUNCTION_WORDS | frozenset("um uh er sorry actually scratch mean know wait".split())


def shake(units: list[Unit], rate: float, src: Source) -> list[Unit]:
    """Replace ordinary words at random, so that what is likely is no guide to what was said."""
    rng, out = src.rng, []
    for u in units:
        if (
            u.kind in ("w", "N", "J", "V", "Ns", "M")
            and u.said not in KEEP
            and u.text.islower()
            and (rng.random() < rate)
            and "'" not in u.text
        ):
            word = made_up(rng) if rng.random() < 0.5 else src.pick(common_words())
            u = replace(u, text=word, said=word, kind="w")
        out.append(u)
    return out


#: words before a sentence that are kept, unless a filler stands beside them
OPENERS = "so so and but well, okay, oh, anyway, also, yes, no, actually, then".split()
OPENED = frozenset("so and but well okay oh anyway also yes no actually then sure hi hey hello dear right wow".split())
JOINTS = ("and", "but", "so", "because", "and then")


def passage(src: Source, most: int = 5) -> list[list[Unit]]:
    """Consecutive sentences of a passage, at times shaken."""
    rng = src.rng
    lines_ = rng.choice(passages("test" if src.test and rng.random() < 0.33 else "train"))
    first = rng.randrange(len(lines_)) if rng.random() < 0.5 else 0
    rate = rng.choice((0.0, 0.08, 0.2))
    return [shake(fill(line, src), rate, src) for line in lines_[first : first + most]]


def sentence(src: Source, alone: bool = True) -> list[Unit]:
    """One clean sentence: a template, at times two joined, at times shaken.

    ``alone``: no other sentence follows, so that shaking hides no boundary.
    """
    rng = src.rng
    pool = templates("test") if src.test and rng.random() < 0.33 else templates("train")
    units = fill(rng.choice(pool), src)
    if rng.random() < 0.1 and units[-1].tail == ".":
        second = fill(rng.choice(pool), src)
        if (
            second[-1].tail == "."
            and second[0].text[0].isalpha()
            and len(units) + len(second) < 30
            and (second[0].said not in ("and", "so", "then", "but", "well", "okay", "no", "yes", "sure"))
        ):
            joint = rng.choice(JOINTS)
            comma = "" if joint == "because" else ","
            words = [Unit(w, w) for w in joint.split()]
            units = [*units[:-1], replace(units[-1], tail=comma), *words, *second]
    if rng.random() < 0.05 and units[0].said not in OPENED and units[0].text[:1].isalpha():
        opener = rng.choice(OPENERS)
        word = opener.rstrip(",")
        units = [Unit(word, word, tail=opener[len(word) :]), *units]
    roll = rng.random()
    rate = 0.0 if roll < 0.6 else 0.12 if roll < 0.9 else 0.5 if alone else 0.05
    return shake(units, rate, src) if rate else units


def capital(u: Unit) -> Unit:
    """The unit at the start of a sentence."""
    if u.fixed or not u.text:
        return u
    return replace(u, text=u.text[0].upper() + u.text[1:])


def written(sentences: list[list[Unit]]) -> str:
    """The clean text of several sentences."""
    return " ".join(" ".join(f"{u.head}{u.text}{u.tail}" for u in [capital(s[0]), *s[1:]]) for s in sentences)
