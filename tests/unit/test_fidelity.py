"""Laws and examples of fidelity: what formatting may change and what it may not."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.fidelity import content, invented, kept, missing


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("um so i think we should meet on monday at three pm", "I think we should meet on Monday at 3 PM."),
        ("at three thirty p m", "At 3:30 PM."),
        ("it costs four dollars and fifty cents", "It costs $4.50."),
        ("two thousand five hundred dollars", "$2,500."),
        ("a hundred and twenty three people", "123 people."),
        ("it grew fifteen point five percent", "It grew 15.5%."),
        ("in nineteen fifty and twenty twenty six", "In 1950 and 2026."),
        ("march twenty second", "March 22nd"),
        ("the twenty-third of may", "The 23rd of May."),
        ("call five five five one two three four", "Call 555-1234."),
        ("blood pressure one thirty eight over eighty six", "Blood pressure 138/86."),
        ("maria dot lopez at example dot com", "maria.lopez@example.com"),
        ("write main dot p y", "Write main.py."),
        ("the a p i uses web socket over wi fi", "The API uses WebSocket over Wi-Fi."),
        ("doctor smith and mister jones", "Dr. Smith and Mr. Jones."),
        ("dont touch the neighbors cat", "Don't touch the neighbor's cat."),
        ("a twenty five year old", "A 25-year-old."),
        ("two point five million", "2.5 million"),
        ("2 million", "2,000,000"),
        ("room 3", "Room three."),
        ("flip-flops", "flip flops"),
        ("websocket", "web socket"),
        ("cafe", "Café"),
        ("twelve hundred oak avenue", "1200 Oak Avenue"),
        ("", ""),
    ],
)
def test_formatting_is_no_invention(source: str, output: str) -> None:
    assert invented(source, output) == ()


@pytest.mark.parametrize(
    ("source", "output", "words"),
    [
        ("tell maria", "Tell Tofia.", ("Tofia",)),
        ("at three pm", "At 4 PM.", ("4",)),
        ("at three pm", "At 3 AM.", ("AM",)),
        ("i like it", "I do not like it.", ("not",)),
        ("twenty dollars", "20%", ("%",)),
        ("very good", "Very very very good.", ("very", "very")),
        ("nineteen fifty", "1951", ("1951",)),
        ("", "Hello", ("Hello",)),
    ],
)
def test_invention_is_found(source: str, output: str, words: tuple[str, ...]) -> None:
    assert invented(source, output) == words


def test_kept_is_the_share_of_content_words() -> None:
    assert kept("Meet Maria on Monday.", "Meet on Monday.") == pytest.approx(2 / 3)
    assert missing("Meet Maria on Monday.", "Meet on Monday.") == ("Maria",)
    assert kept("", "anything") == 1.0
    assert kept("the of", "") == 1.0


@given(st.text())
def test_a_text_accounts_for_itself(text: str) -> None:
    assert invented(text, text) == ()
    assert kept(text, text) == 1.0


@given(st.text(), st.text())
def test_invented_words_are_content_of_the_output_in_order(source: str, output: str) -> None:
    rest = iter(content(output))
    assert all(word in rest for word in invented(source, output))


@given(st.text(), st.text(), st.text())
def test_more_source_never_invents_more(source: str, more: str, output: str) -> None:
    before, after = invented(source, output), invented(f"{source} . {more}", output)
    assert len(after) <= len(before)


@given(st.lists(st.sampled_from("one two twenty hundred thousand and a point oh 7 first".split()), max_size=40))
def test_number_words_never_fail(words: list[str]) -> None:
    text = " ".join(words)
    assert invented(text, text) == ()


@pytest.mark.parametrize("piece", ["one ", "a", "a ", "9", "9 ", "1,000,", "\u0301", "hundred ", "日", "'", "x'", "ﷺ"])
def test_hostile_text_takes_linear_time(piece: str) -> None:
    def seconds(count: int) -> float:
        began = time.perf_counter()
        invented(piece * count, "12345 zebra " + piece[::-1] * count)
        return time.perf_counter() - began

    small, large = min(seconds(2_000) for _ in range(3)), seconds(20_000)
    assert large < 40 * small + 0.25
