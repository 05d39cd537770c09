"""Where redirects may lead, which answers are taken, and what is said about failures."""

from __future__ import annotations

import pytest

from mlxd.fetch.http import Failure, Unranged, check_answer, next_url, origin, reason_of, retry_after


@pytest.mark.parametrize(
    ("location", "leads_to"),
    [
        ("https://cdn.example/x?sig=1#part", "https://cdn.example/x?sig=1"),
        ("/api/resolve-cache/x", "https://hub.example/api/resolve-cache/x"),
        ("//cdn.example/x", "https://cdn.example/x"),
    ],
)
def test_redirects_that_lead_somewhere(location: str, leads_to: str) -> None:
    assert next_url("https://hub.example/a/b", location) == leads_to


@pytest.mark.parametrize(
    "location",
    ["", "http://hub.example/x", "ftp://cdn.example/x", "file:///etc/passwd", "javascript:x",
     "https://user@cdn.example/x", "https://user:word@cdn.example/x", "https://cdn.example:99999/x",
     "https://cdn.example:x/", "https://cdn.example/\nx", "https://cdn.example/\u00e9", "https://[::1/x",
     "https://cdn.example/" + "x" * 20_000, "https://cdn.example:0/x"],
)  # fmt: skip
def test_redirects_that_lead_nowhere(location: str) -> None:
    with pytest.raises(Failure):
        next_url("https://hub.example/a/b", location)


def test_from_http_a_redirect_may_go_to_http_and_https() -> None:
    assert next_url("http://127.0.0.1:8/a", "http://localhost:8/b") == "http://localhost:8/b"
    assert next_url("http://127.0.0.1:8/a", "https://cdn.example/b") == "https://cdn.example/b"


def test_the_same_host_is_the_same_scheme_name_and_port() -> None:
    assert origin("https://hub.example/a") == origin("https://HUB.example:443/b")
    others = ["http://hub.example", "https://hub.example:444", "https://hub.example.evil", "https://evil/hub.example"]
    assert all(origin(other) != origin("https://hub.example") for other in others)
    assert origin("https://[::1") == ("", "", 0)


def test_an_answer_has_to_be_what_was_asked_for() -> None:
    good = {"content-range": "bytes 10-19/100", "content-length": "10"}
    check_answer(206, good, (10, 20), 100, "")
    check_answer(206, {"content-range": "bytes 10-19/*"}, (10, 20), 100, "")
    check_answer(200, {"content-length": "100"}, None, 100, "")
    check_answer(200, {}, None, 100, "")


@pytest.mark.parametrize(
    "changed",
    [{"content-range": "bytes 11-20/100"}, {"content-range": "bytes 10-18/100"}, {"content-range": "bytes 10-19/101"},
     {"content-range": ""}, {"content-range": "bytes */100"}, {"content-range": "bytes 10-19/100\n"},
     {"content-range": "bytes " + "9" * 5000 + "-19/100"}, {"content-length": "11"}, {"content-length": "x"},
     {"content-encoding": "gzip"}],
)  # fmt: skip
def test_any_other_range_is_a_failure(changed: dict[str, str]) -> None:
    with pytest.raises(Failure):
        check_answer(206, {"content-range": "bytes 10-19/100", "content-length": "10"} | changed, (10, 20), 100, "")


def test_a_server_without_ranges_is_told_from_one_that_errs() -> None:
    with pytest.raises(Unranged):
        check_answer(200, {"content-length": "100"}, (10, 20), 100, "")
    for status, headers in ((200, {"content-length": "99"}), (206, {})):
        with pytest.raises(Failure):
            check_answer(status, headers, None, 100, "")


def test_retry_after_is_a_number_of_seconds() -> None:
    assert retry_after("7") == 7.0
    assert retry_after(" 0 ") == 0.0
    for odd in (None, "", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "1e9", "9" * 400, "٣"):
        assert retry_after(odd) is None


def test_reasons_hold_nothing_of_what_an_error_says() -> None:
    class LocalProtocolError(Exception):
        pass

    told = reason_of(LocalProtocolError("Illegal header value b'Bearer hf_secret'"))
    assert "hf_secret" not in told
    assert reason_of(ConnectionRefusedError(111, "at hf_secret")) == "Connection refused"
