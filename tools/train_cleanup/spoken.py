"""Written values and how they are said: numbers, times, dates, money, addresses.

Every maker takes a ``random.Random`` and returns ``(written, said)``; ``said`` is
lower case and has no punctuation but apostrophes. No vocabulary lives here.
"""

from random import Random

Pair = tuple[str, str]

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
).split()
MONTHS = ("January February March April May June July August September October November December").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
STREETS = (
    "Maple Oak Cedar Pine Elm Washington Lincoln Park Lake Hill Main Church Mill River Spring "
    "Highland Jefferson Franklin Sunset Chestnut Walnut Broad Market King Queen Victoria"
).split()


def under_hundred(n: int, hyphen: bool = False) -> str:
    """Say 0 <= n < 100; ``hyphen`` joins tens and ones as in print."""
    if n < 20:
        return ONES[n]
    tens, ones = divmod(n, 10)
    if not ones:
        return TENS[tens]
    return f"{TENS[tens]}{'-' if hyphen else ' '}{ONES[ones]}"


def cardinal(n: int, rng: Random | None = None) -> str:
    """Say 0 <= n < 10**9; with ``rng`` the optional "and" and "a hundred" vary."""
    hyphen = rng is not None and rng.random() < 0.1
    if n < 100:
        return under_hundred(n, hyphen)
    size, name = next(s for s in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if n >= s[0])
    head, rest = divmod(n, size)
    lead = cardinal(head, rng) if size > 100 else ONES[head]
    if head == 1 and rng is not None and rng.random() < 0.2:
        lead = "a"
    said = f"{lead} {name}"
    if not rest:
        return said
    joint = " and " if rest < 100 and rng is not None and rng.random() < 0.4 else " "
    return said + joint + cardinal(rest, rng)


def ordinal(n: int) -> str:
    """Say the ordinal of 1 <= n < 100."""
    if n < 20:
        return ORDINALS[n]
    tens, ones = divmod(n, 10)
    if not ones:
        return TENS[tens][:-1] + "ieth"
    return f"{TENS[tens]} {ORDINALS[ones]}"


def ordinal_digits(n: int) -> str:
    """Write 1st, 2nd, 3rd, 4th, 11th, 21st."""
    if 10 <= n % 100 <= 20:
        return f"{n}th"
    return f"{n}{({1: 'st', 2: 'nd', 3: 'rd'}).get(n % 10, 'th')}"


def number_text(n: int) -> str:
    """The house style: words below ten, digits with commas from ten on."""
    return ONES[n] if n < 10 else f"{n:,}"


def spell_digits(digits: str, rng: Random) -> str:
    """Say digits one by one; zero is "oh" now and then."""
    zero = "oh" if rng.random() < 0.4 else "zero"
    return " ".join(zero if d == "0" else ONES[int(d)] for d in digits)


def small(rng: Random) -> int:
    """A count: mostly small, at times hundreds."""
    roll = rng.random()
    if roll < 0.45:
        return rng.randint(2, 9)
    if roll < 0.85:
        return rng.randint(10, 99)
    return rng.choice((100, 150, 200, 250, 300, 500, rng.randint(101, 999)))


def num(rng: Random) -> Pair:
    n = small(rng)
    return number_text(n), cardinal(n, rng)


def num2(rng: Random) -> Pair:
    n = rng.randint(2, 40)
    return str(n), under_hundred(n)


def big(rng: Random) -> Pair:
    roll = rng.random()
    if roll < 0.25:
        n, name = rng.randint(2, 90), rng.choice(("million", "billion", "thousand"))
        if name == "thousand":
            return f"{n * 1000:,}", f"{under_hundred(n)} thousand"
        return f"{n} {name}", f"{under_hundred(n)} {name}"
    if roll < 0.5:
        n = rng.randint(10, 99) * 100
        return f"{n:,}", cardinal(n, rng) if rng.random() < 0.8 or n % 1000 == 0 else (
            f"{under_hundred(n // 100)} hundred"
        )
    n = rng.randint(1000, 999_999)
    if rng.random() < 0.6:
        n = n // 100 * 100 or 1200
    return f"{n:,}", cardinal(n, rng)


def dec(rng: Random) -> Pair:
    whole, part = rng.randint(0, 120), str(rng.randint(1, 99)).strip("0")
    if rng.random() < 0.7:
        part = str(rng.randint(1, 9))
    return f"{whole}.{part}", f"{cardinal(whole)} point {' '.join(ONES[int(d)] for d in part)}"


def ver(rng: Random) -> Pair:
    parts = [rng.randint(0, 20) for _ in range(rng.choice((2, 2, 3)))]
    joint = rng.choice((" point ", " point ", " dot "))
    return ".".join(map(str, parts)), joint.join(map(under_hundred, parts))


def digits(rng: Random) -> Pair:
    """A code, a port, a room: digits without commas."""
    size = rng.choice((2, 3, 3, 4, 4, 5))
    text = str(rng.randint(10 ** (size - 1), 10**size - 1))
    if size == 2:
        return text, under_hundred(int(text))
    head, tail = text[:-2], text[-2:]
    if size in (3, 4) and tail[0] != "0" and rng.random() < 0.4:
        return text, f"{under_hundred(int(head))} {under_hundred(int(tail))}"
    if size == 3 and rng.random() < 0.5:
        return text, cardinal(int(text))
    return text, spell_digits(text, rng)


def ampm(rng: Random, half: str) -> str:
    """Say AM or PM, the ways recognisers write it."""
    return rng.choice((half.lower(), half.lower(), " ".join(half.lower())))


def minutes_said(m: int) -> str:
    return f"oh {ONES[m]}" if m < 10 else under_hundred(m)


def time(rng: Random) -> Pair:
    h, m = rng.randint(1, 12), rng.choice((0, 0, 0, 15, 30, 30, 45, rng.randint(1, 59)))
    clock = f"{h}:{m:02d}" if m else str(h)
    said = under_hundred(h) + (f" {minutes_said(m)}" if m else "")
    if m and rng.random() < 0.3:
        return clock, said
    if rng.random() < 0.04:
        word = rng.choice(("noon", "midnight"))
        return word, word
    half = rng.choice(("AM", "PM", "PM"))
    return f"{clock} {half}", f"{said} {ampm(rng, half)}"


def hour(rng: Random) -> Pair:
    h = rng.randint(1, 12)
    roll = rng.random()
    if roll < 0.5:
        return f"{h} o'clock", f"{under_hundred(h)} o'clock"
    if roll < 0.7:
        phrase = rng.choice(("half past", "quarter past", "quarter to"))
        return f"{phrase} {number_text(h)}", f"{phrase} {under_hundred(h)}"
    return number_text(h), under_hundred(h)


def year(rng: Random) -> Pair:
    y = rng.choice((rng.randint(1900, 1999), rng.randint(2000, 2039), rng.randint(2010, 2039)))
    if 2000 <= y < 2010 or (y < 2020 and rng.random() < 0.2 and y >= 2000):
        return str(y), cardinal(y, rng).replace("a thousand", "two thousand")
    century, rest = divmod(y, 100)
    tail = "hundred" if not rest else minutes_said(rest)
    return str(y), f"{under_hundred(century)} {tail}"


def day(rng: Random) -> Pair:
    d = rng.choice(DAYS)
    if rng.random() < 0.12:
        part = rng.choice(("morning", "afternoon", "evening", "night"))
        return f"{d} {part}", f"{d.lower()} {part}"
    return d, d.lower()


def month(rng: Random) -> Pair:
    m = rng.choice(MONTHS)
    return m, m.lower()


def date(rng: Random) -> Pair:
    m, d = rng.choice(MONTHS), rng.randint(1, 31)
    roll = rng.random()
    if roll < 0.15:
        return f"the {ordinal_digits(d)} of {m}", f"the {ordinal(d)} of {m.lower()}"
    the = "the " if roll < 0.25 else ""
    said = f"{m.lower()} {the}{ordinal(d) if roll < 0.85 else under_hundred(d)}"
    if rng.random() < 0.12:
        y, y_said = year(rng)
        return f"{m} {d}, {y}", f"{said} {y_said}"
    return f"{m} {d}", said


def ordnum(rng: Random) -> Pair:
    n = rng.choice((rng.randint(1, 9), rng.randint(10, 99)))
    return (ordinal(n) if n < 10 else ordinal_digits(n)), ordinal(n)


def ordday(rng: Random) -> Pair:
    n = rng.randint(1, 31)
    return ordinal_digits(n), ordinal(n)


def money(rng: Random) -> Pair:
    roll = rng.random()
    if roll < 0.15:
        d, c = rng.randint(1, 99), rng.choice((25, 50, 75, 95, 99, rng.randint(10, 98)))
        joint = rng.choice((" dollars and {} cents", " dollars {}", " dollars and {}"))
        return f"${d}.{c}", under_hundred(d) + joint.format(under_hundred(c))
    if roll < 0.22:
        c = rng.randint(5, 95)
        return f"{number_text(c)} cents", f"{under_hundred(c)} cents"
    n = rng.choice(
        (
            rng.randint(2, 99),
            rng.randint(1, 9) * 100,
            rng.randint(100, 999),
            rng.randint(2, 90) * 500,
            rng.randint(1000, 99_999),
        )
    )
    if roll < 0.32:
        return f"€{n:,}", f"{cardinal(n, rng)} euros"
    return f"${n:,}", f"{cardinal(n, rng)} dollars"


def bigmoney(rng: Random) -> Pair:
    name = rng.choice(("million", "billion"))
    if rng.random() < 0.5:
        n = rng.randint(1, 99)
        return f"${n} {name}", f"{under_hundred(n)} {name} dollars"
    text, said = dec(rng)
    return f"${text} {name}", f"{said} {name} dollars"


def pct(rng: Random) -> Pair:
    if rng.random() < 0.2:
        text, said = dec(rng)
    else:
        n = rng.randint(1, 100)
        text, said = str(n), cardinal(n)
    return f"{text}%", f"{said} percent"


def age(rng: Random) -> Pair:
    n = rng.randint(2, 95)
    return number_text(n), under_hundred(n)


def yearold(rng: Random) -> Pair:
    n = rng.randint(10, 95)
    return f"{n}-year-old", f"{under_hundred(n)} year old"


def frac(rng: Random) -> Pair:
    text = rng.choice(("half", "a third", "a quarter"))
    return text, text


def dur(rng: Random) -> Pair:
    if rng.random() < 0.3:
        text = rng.choice(
            (
                "an hour",
                "half an hour",
                "a week",
                "a few days",
                "a couple of hours",
                "a month",
                "a while",
                "a minute",
                "a year",
                "a few minutes",
            )
        )
        return text, text
    n, unit = small(rng), rng.choice("minutes hours days weeks months years seconds".split())
    return f"{number_text(n)} {unit}", f"{cardinal(n)} {unit}"


def temp(rng: Random) -> Pair:
    n = rng.randint(2, 110)
    scale = rng.choice(("", "", " Fahrenheit", " Celsius"))
    sign, said = ("-", "minus ") if rng.random() < 0.1 else ("", "")
    return f"{sign}{n} degrees{scale}", f"{said}{cardinal(n)} degrees{scale.lower()}"


def bp(rng: Random) -> Pair:
    hi, lo = rng.randint(95, 180), rng.randint(55, 99)
    said = f"{ONES[hi // 100]} {minutes_said(hi % 100)}" if hi >= 101 else cardinal(hi)
    return f"{hi}/{lo}", f"{said} over {under_hundred(lo)}"


def phone(rng: Random) -> Pair:
    groups = [str(rng.randint(200, 999)), str(rng.randint(1000, 9999))]
    if rng.random() < 0.6:
        groups.insert(0, str(rng.randint(200, 999)))
    return "-".join(groups), " ".join(spell_digits(g, rng) for g in groups)


def flight(rng: Random) -> Pair:
    code = rng.choice(("UA", "BA", "LH", "AF", "DL", "AA", "KL", "SK"))
    n = str(rng.randint(100, 999))
    said = (
        f"{ONES[int(n[0])]} {under_hundred(int(n[1:]))}" if n[1] != "0" and rng.random() < 0.4 else spell_digits(n, rng)
    )
    return f"{code} {n}", f"{' '.join(code.lower())} {said}"


def addr(rng: Random) -> Pair:
    n = rng.choice((rng.randint(1, 99), rng.randint(101, 999), rng.randint(10, 99) * 100))
    street = f"{rng.choice(STREETS)} {rng.choice(('Street', 'Avenue', 'Road', 'Lane', 'Drive'))}"
    if n >= 1000:
        said = f"{under_hundred(n // 100)} hundred"
        if n % 1000 == 0:
            said = f"{ONES[n // 1000]} thousand"
    elif n >= 100:
        said = f"{ONES[n // 100]} {minutes_said(n % 100)}" if n % 100 else cardinal(n)
    else:
        said = under_hundred(n)
    return f"{n} {street}", f"{said} {street.lower()}"


def span(rng: Random) -> Pair:
    """A stretch of time: 3 to 4:30 PM."""
    start, end = rng.randint(1, 9), rng.randint(1, 3)
    half, m = rng.choice(("AM", "PM")), rng.choice((0, 0, 30))
    clock = f"{start + end}:{m}" if m else str(start + end)
    said = under_hundred(start + end) + (" thirty" if m else "")
    return f"{start} to {clock} {half}", f"{under_hundred(start)} to {said} {ampm(rng, half)}"
