"""Stop strings, reasoning and whole characters, as pure text logic: whatever the pieces, the text is the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxd.worker.text import TextStream, make_machine

THINK = ("<think>", "</think>")


class Pieces:
    """A detokenizer whose tokens are the pieces themselves."""

    def __init__(self) -> None:
        self.last_segment = ""

    def add_token(self, piece: str) -> None:
        self.last_segment = piece

    def finalize(self) -> None:
        self.last_segment = ""


def run(pieces: list[str], stop: list[str], *, think: bool = False, inside: bool = False) -> tuple[str, str, bool]:
    stream = TextStream(Pieces(), make_machine(stop, THINK if think else None), in_reasoning=inside)
    shown = []
    for piece in pieces:
        shown.append(stream.add(piece))  # type: ignore[arg-type]
        if stream.stopped:
            break
    shown.append(stream.finish())
    text, reasoning = ("".join(part) for part in zip(*shown, strict=True))
    assert text == "".join(stream.text)
    assert reasoning == "".join(stream.reasoning)
    return text, reasoning, stream.stopped


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        found = [word for word in stop if text[:end].endswith(word)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    pieces=st.lists(st.text("abc\n", max_size=4), max_size=12),
    stop=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=4),
)
def test_a_stop_string_never_shows_however_the_text_is_split(pieces: list[str], stop: list[str]) -> None:
    text, _, stopped = run(pieces, stop)
    assert (text, stopped) == cut("".join(pieces), stop)


@given(text=st.text(max_size=40), sizes=st.lists(st.integers(1, 5), min_size=40, max_size=40))
def test_without_stops_every_character_passes_at_once(text: str, sizes: list[int]) -> None:
    stream = TextStream(Pieces(), make_machine([], None))
    at = 0
    for size in sizes:
        assert stream.add(text[at : at + size]) == (text[at : at + size], "")  # type: ignore[arg-type]
        at += size


@given(pieces=st.lists(st.sampled_from(["<", "thi", "nk", ">", "</", "think>", "a", "b", " "]), max_size=14))
def test_reasoning_is_the_same_however_the_markers_are_split(pieces: list[str]) -> None:
    whole = "".join(pieces)
    assert run(pieces, [], think=True) == run([whole], [], think=True) == run(list(whole), [], think=True)


def test_reasoning_apart_from_the_answer() -> None:
    assert run(["<thi", "nk>\nlet me", " see</th", "ink>\n\n", "\nyes"], [], think=True) == ("yes", "let me see", False)
    assert run(["let me see</think>", "yes"], [], think=True, inside=True) == ("yes", "let me see", False)
    assert run(["never ends"], [], think=True, inside=True) == ("", "never ends", False)


def test_a_stop_string_counts_in_the_answer_only() -> None:
    assert run(["<think>a\n\nb</think>c\n", "\nd"], ["\n\n"], think=True) == ("c", "a\n\nb", True)


def test_the_start_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = TextStream(Pieces(), make_machine(["###"], None))
    assert stream.add("a##") == ("a", "")  # type: ignore[arg-type]
    assert stream.add("b#") == ("##b", "")  # type: ignore[arg-type]
    assert stream.finish() == ("#", "")
