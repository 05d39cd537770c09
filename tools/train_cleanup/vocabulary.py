"""Word lists of the generator, their inflection, and made-up words.

Words whose checksum is divisible by ``HELD_EVERY`` are kept out of training data,
so that the held-out set has words that the model never saw.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from zlib import crc32

FOLDER = Path(__file__).parent / "vocab"
HELD_EVERY = 9
FUNCTION_WORDS = frozenset(
    "a about above across after against all along although am among an and another any anybody "
    "anyone anything are around as at back be because been before behind being below between both "
    "but by can could did do does doing done down during each either else enough even ever every "
    "everybody everyone everything few for from further get go going gonna got had has have having "
    "he her here hers herself him himself his how i if in into is it its itself just kind let like "
    "lot many may me might mine more most much must my myself near neither never no nobody none nor "
    "not nothing now of off okay on once one only onto or other others our ours out over own quite "
    "rather really said same say shall she should since so some somebody someone something still "
    "such than that the their theirs them themselves then there these they this those though "
    "through to today together tomorrow tonight too toward under unless until up upon us used "
    "very want was we well were what whatever when whenever where wherever whether which while who "
    "whom whose why will with within without would yes yesterday yet you your yours yourself "
    "i'm i'll i'd i've it's that's there's don't doesn't didn't can't won't isn't aren't wasn't "
    "weren't couldn't wouldn't shouldn't haven't hasn't you're you'll you'd we're we'll we've "
    "they're they'll he's she's let's what's".split()
)
MEDICINES = (
    "ibuprofen amoxicillin aspirin metformin lisinopril atorvastatin omeprazole prednisone "
    "albuterol insulin penicillin warfarin gabapentin sertraline levothyroxine naproxen "
    "acetaminophen hydrocortisone morphine codeine"
).split()
VOWELS = "aeiou"


def held(word: str) -> bool:
    """Whether a word or template is kept for the held-out set."""
    return crc32(word.encode()) % HELD_EVERY == 0


@cache
def read(name: str) -> tuple[str, ...]:
    """The words of ``vocab/<name>.txt``; underscores become spaces."""
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    words = (w for line in lines if not line.startswith("#") for w in line.split())
    return tuple(dict.fromkeys(w.replace("_", " ") for w in words))


@cache
def lines(name: str) -> tuple[str, ...]:
    """The lines of ``vocab/<name>.txt`` without comments."""
    text = (FOLDER / f"{name}.txt").read_text().splitlines()
    return tuple(line.replace("\\n", "\n") for line in text if line and not line.startswith("# "))


def plural(noun: str) -> str:
    irregular = {
        "child": "children",
        "man": "men",
        "woman": "women",
        "person": "people",
        "foot": "feet",
        "tooth": "teeth",
        "mouse": "mice",
        "people": "people",
        "fish": "fish",
        "goose": "geese",
        "salesman": "salesmen",
        "wife": "wives",
        "knife": "knives",
        "leaf": "leaves",
        "wolf": "wolves",
        "shelf": "shelves",
        "life": "lives",
        "tomato": "tomatoes",
        "potato": "potatoes",
        "photo": "photos",
    }
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "x", "ch", "sh", "z")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in VOWELS:
        return noun[:-1] + "ies"
    return noun + "s"


def doubles(verb: str) -> bool:
    """Whether the last consonant doubles before -ed and -ing (stop, stopped)."""
    if verb in (
        "commit",
        "admit",
        "submit",
        "permit",
        "occur",
        "prefer",
        "regret",
        "refer",
        "begin",
        "forget",
        "upset",
        "reset",
        "split",
        "quit",
        "swim",
        "transfer",
    ):
        return True
    return (
        len(verb) <= 5
        and verb[-1] not in VOWELS + "wxy"
        and verb[-2] in VOWELS
        and (len(verb) < 3 or verb[-3] not in VOWELS)
        and sum(c in VOWELS for c in verb) == 1
    )


@dataclass(frozen=True)
class Verb:
    """The five forms of a verb."""

    base: str
    third: str
    past: str
    participle: str
    ing: str


def verb(entry: str) -> Verb:
    """Inflect ``base`` or ``base/past/participle``."""
    base, *rest = entry.split("/")
    third = plural(base) if base not in ("have", "do", "go") else {"have": "has", "do": "does", "go": "goes"}[base]
    stem = base + base[-1] if doubles(base) else base
    if base.endswith("ie"):
        ing = base[:-2] + "ying"
    elif base.endswith("e") and not base.endswith(("ee", "oe", "ye")):
        ing = base[:-1] + "ing"
    else:
        ing = stem + "ing"
    if base.endswith("e"):
        past = base + "d"
    elif base.endswith("y") and base[-2] not in VOWELS:
        past = base[:-1] + "ied"
    else:
        past = stem + "ed"
    return Verb(base, third, *(rest or (past, past)), ing)


@cache
def verbs() -> tuple[Verb, ...]:
    return tuple(verb(w) for w in read("verbs"))


@cache
def common_words() -> tuple[str, ...]:
    """Every lower-case word of the lists, inflected."""
    words = [
        *read("nouns"),
        *map(plural, read("nouns")),
        *read("mass"),
        *read("adjectives"),
        *read("adverbs"),
        *MEDICINES,
    ]
    for v in verbs():
        words += [v.base, v.third, v.past, v.participle, v.ing]
    return tuple(dict.fromkeys(words))


@cache
def clear_names() -> tuple[str, ...]:
    """The commoner names that are no word in lower case, so that casing is decidable alone."""
    common = set(common_words()) | FUNCTION_WORDS
    lists = {"first_names": 460, "last_names": 268, "places": 193, "brands": 200, "acronyms": 200, "languages": 80}
    names = (n for kind, most in lists.items() for n in read(kind)[:most])
    return tuple(n for n in names if n.lower() not in common and not held(n))


ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p ph pl pr qu r s sc sh sk sl sm "
    "sn sp st str sw t th tr tw v w wh x y z zh"
).split()
NUCLEI = "a e i o u a e i o u ai au ea ee ei eu ia ie io oa oi oo ou ue y".split()
CODAS = ("b ck d f ft g k l ld lm lt m mp n nd ng nk nt p r rd rk rm rn rt s sh sk st t th x z ss ll").split()


def made_up(rng: Random) -> str:
    """A pronounceable word that is in no list: syllables, or a common word misspelt."""
    if rng.random() < 0.35:
        word = rng.choice(common_words())
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(word))
            letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
            word = rng.choice(
                (
                    word[:at] + letter + word[at:],
                    word[:at] + letter + word[at + 1 :],
                    word[:at] + word[at + 1 :] if len(word) > 3 else word + letter,
                )
            )
        return word
    parts = []
    for _ in range(rng.choice((1, 2, 2, 2, 3, 3, 4))):
        onset = rng.choice(ONSETS) if not parts or rng.random() < 0.85 else ""
        coda = rng.choice(CODAS) if rng.random() < 0.4 else ""
        parts.append(onset + rng.choice(NUCLEI) + coda)
    return "".join(parts) + (rng.choice(("s", "ing", "ed", "er", "ly")) if rng.random() < 0.15 else "")


def made_up_name(rng: Random) -> str:
    """A made-up proper name, capitalised."""
    while True:
        word = made_up(rng)
        if len(word) > 2:
            break
    if rng.random() < 0.3:
        word += rng.choice("son ez ski ova ini berg mann sen ov ich ti ko a ia ey".split())
    return word.capitalize()
