"""Laws of the generator that the built-in model learns from: same seed same pair, clean means clean."""

import json
import re
import sys
from pathlib import Path
from random import Random

import pytest

FOLDER = Path(__file__).parents[2] / "tools/train_cleanup"
sys.path.insert(0, str(FOLDER))

from corrupt import FILLERS, example  # noqa: E402
from sentences import Source, templates  # noqa: E402
from spoken import cardinal, ordinal, ordinal_digits  # noqa: E402
from vocabulary import held, plural, read, verb  # noqa: E402

from mlxd.fidelity import invented  # noqa: E402

PAIRS = [example(Random(seed), test=seed % 2 == 1) for seed in range(1500)]


def test_a_seed_decides_the_pair() -> None:
    assert [example(Random(seed), test=seed % 2 == 1) for seed in range(200)] == PAIRS[:200]


def test_clean_text_has_no_filler_and_no_slot() -> None:
    filler = re.compile(rf"\b(?:{'|'.join(sorted(set(FILLERS)))})\b")
    for _, clean in PAIRS:
        assert not filler.search(clean), clean
        assert not re.search(r"\{\w+\}", clean), clean


def test_clean_text_starts_and_ends_as_text_does() -> None:
    for raw, clean in PAIRS:
        assert clean == clean.strip(), clean
        assert clean, raw


def test_clean_text_says_nothing_that_the_raw_text_does_not() -> None:
    """The very law that the daemon's guard checks; a few spellings are beyond it."""
    broken = [(raw, clean) for raw, clean in PAIRS if invented(raw, clean)]
    assert len(broken) < 0.01 * len(PAIRS), broken[:5]


def test_some_text_is_clean_already() -> None:
    share = sum(raw == clean for raw, clean in PAIRS) / len(PAIRS)
    assert 0.08 < share < 0.3


@pytest.mark.parametrize("name", ["real.jsonl", "dev.jsonl"])
def test_hand_written_text_is_no_template(name: str) -> None:
    written = " ".join((FOLDER / f"vocab/{kind}.txt").read_text() for kind in ("templates", "natural", "passages"))
    sentences = {s.strip().lower() for s in re.split(r"[.!?\n]", written) if len(s.split()) > 2}
    for line in (FOLDER / name).read_text().splitlines():
        for text in re.split(r"[.!?]", json.loads(line)["clean"]):
            assert text.strip().lower() not in sentences, text


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "zero"),
        (21, "twenty one"),
        (105, "one hundred five"),
        (2500, "two thousand five hundred"),
        (1_000_000, "one million"),
        (12_345, "twelve thousand three hundred forty five"),
    ],
)
def test_numbers_are_said(number: int, said: str) -> None:
    assert cardinal(number) == said


def test_ordinals() -> None:
    assert [ordinal_digits(n) for n in (1, 2, 3, 11, 12, 13, 21, 30)] == (
        "1st 2nd 3rd 11th 12th 13th 21st 30th".split()
    )
    assert ordinal(22) == "twenty second"


def test_inflection() -> None:
    assert [plural(w) for w in ("city", "box", "child", "toy")] == ["cities", "boxes", "children", "toys"]
    stop = verb("stop")
    assert (stop.third, stop.past, stop.ing) == ("stops", "stopped", "stopping")
    assert verb("write/wrote/written").ing == "writing"


def test_held_words_never_reach_training() -> None:
    source = Source(Random(0))
    assert not any(held(source.pick(read("nouns"))) for _ in range(2000))
    assert not set(templates("train")) & set(templates("test"))
