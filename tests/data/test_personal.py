"""Personal data and damaged encodings: what is found, what is left alone, and that nothing found is shown."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.data.oddities import oddities, visible
from lorica.data.personal import masked, spans

FOUND = [
    ("write to jane.doe+news@mail.example.co.uk today", "email", "jane.doe+news@mail.example.co.uk"),
    ("(ada@example.org)", "email", "ada@example.org"),
    ("call (415) 555-2671 now", "phone", "(415) 555-2671"),
    ("on 415-555-2671.", "phone", "415-555-2671"),
    ("1-800-555-0199 is free", "phone", "1-800-555-0199"),
    ("ring +44 20 7946 0958", "phone", "+44 20 7946 0958"),
    ("+49 (0)30 901820", "phone", "+49 (0)30 901820"),
    ("from 030 901 8201 at noon", "phone", "030 901 8201"),
    ("Phone: 555-0123", "phone", "555-0123"),
    ("SSN 123-45-6789", "national_id", "123-45-6789"),
    ("NINO AB 12 34 56 C", "national_id", "AB 12 34 56 C"),
    ("DNI 12345678Z", "national_id", "12345678Z"),
    ("NIE X1234567L", "national_id", "X1234567L"),
    ("CPF 111.444.777-35", "national_id", "111.444.777-35"),
    ("NIR 2 55 08 14 168 025 38", "national_id", "2 55 08 14 168 025 38"),
    ("11010519491231002X", "national_id", "11010519491231002X"),
    ("CF RSSMRA85T10A562S.", "national_id", "RSSMRA85T10A562S"),
    ("Patient: Jane Doe, 34", "patient_name", "Jane Doe"),
    ("PATIENT NAME: Jane Q. Doe", "patient_name", "Jane Q. Doe"),
    ("a patient named Łukasz came", "patient_name", "Łukasz"),
    ("Hello, my name is Anne-Marie O'Neil.", "patient_name", "Anne-Marie O'Neil"),
    ("age 4\nName: Tom\n", "patient_name", "Tom"),
    ("I saw Mr. John Smith.", "titled_name", "John Smith"),
    ("Mrs Özil asked", "titled_name", "Özil"),
]
LEFT = [
    "the score was 21-17, 21-19 in 2004",
    "on 2004-10-12 and 12/10/2004, at 10:30:00",
    "$1,234,567.89 or 3.14159265",
    "ask @user or #1234567",
    "version 10.15.7.1234, 192.168.100.200",
    "000-12-3456 and 666-12-3456 are no numbers of persons",
    "DNI 12345678A",  # another letter belongs to it
    "CPF 111.444.777-36",
    "111.111.111-11",
    "NIR 2 55 08 14 168 025 39",
    "110105194912310021",
    "be patient: Good things come",
    "Patient: Hello, I have a cough",
    "the patient is a 34 year old woman",
    "Miss the bus, Mr of nothing",
    "an e-mail to a@b or me@home",
]


@pytest.mark.parametrize(("text", "kind", "part"), FOUND)
def test_personal_data_is_found_and_masked(text: str, kind: str, part: str) -> None:
    assert [(k, text[a:b]) for k, a, b in spans(text)] == [(kind, part)]
    assert masked(text) == text.replace(part, "".join("•" if c.isalnum() else c for c in part))


@pytest.mark.parametrize("text", LEFT)
def test_other_text_is_left_alone(text: str) -> None:
    assert spans(text) == [] and masked(text) == text


def test_what_overlaps_counts_once() -> None:
    assert [kind for kind, *_ in spans("Patient: Mr. John Smith, john.smith@example.com, tel 415-555-2671")] == [
        "titled_name",
        "email",
        "phone",
    ]


@given(st.lists(st.sampled_from([text for text, *_ in FOUND] + LEFT) | st.text(max_size=20), max_size=5).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_a_masked_text_is_as_long_and_keeps_all_else(text: str) -> None:
    hidden = masked(text)
    at = [(a, b) for _, a, b in spans(text)]
    assert len(hidden) == len(text) and all(b <= c for (_, b), (c, _) in pairwise(at))
    for i, (before, after) in enumerate(zip(text, hidden, strict=True)):
        inside = any(a <= i < b for a, b in at)
        assert after == ("•" if inside and before.isalnum() else before)


ODD = [
    ("cafÃ©, that\u00e2\u20ac\u2122s it", ["mojibake"]),
    ("\u00f0\u0178\u02dc\u0080 smile", ["mojibake", "control_characters"]),
    ("lost \ufffd here", ["replacement_character"]),
    ("\ufefftext", ["byte_order_mark"]),
    ("bell \x07", ["control_characters"]),
    ("zero\u200bwidth and \u202eturned", ["invisible_characters"]),
    ("Tom &amp; Jerry, Arsenal #39;s", ["html_entities"]),
    (r"it\u2019s", ["escapes"]),
]
USUAL = [
    "café, naïve, SÃO PAULO, CAFÉ…",
    "line\nbreak\tand tab\r\n",
    "AT&T, #1 and C# 10",
    "日本語 🎉 👩‍🚀",
    "“quoted” – dash",
    r"C:\users\x",
]


@pytest.mark.parametrize(("text", "kinds"), ODD)
def test_damaged_encodings_are_told_apart(text: str, kinds: list[str]) -> None:
    assert oddities(text) == kinds


@pytest.mark.parametrize("text", USUAL)
def test_usual_text_is_not_odd(text: str) -> None:
    assert oddities(text) == []


@given(st.text(st.characters(codec="utf-8", exclude_characters="\u00a0"), min_size=1, max_size=30))
def test_text_that_was_decoded_twice_is_found(text: str) -> None:
    """For characters of Western scripts, which is where it happens."""
    western = "".join(c for c in text if "\u00c0" <= c <= "\u00ff")
    if western:
        assert "mojibake" in oddities(western.encode().decode("latin-1"))


@given(st.text(max_size=60))
def test_nothing_unseen_is_left(text: str) -> None:
    assert all(c in "\t\n" or (c.isprintable() or oddities(c) == []) for c in visible(text))
