"""Personal data in texts: e-mail addresses, phone numbers, national identity numbers, names of patients. Found to be counted and masked.

Patterns, not understanding: what is written in none of these ways is missed, and a number may happen to look like one. Where a kind of
number has check digits they are checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

KINDS = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "national_id": "national identity numbers",
    "patient_name": "names said to be a patient's or the writer's own",
    "titled_name": "names after Mr, Mrs or Ms",
}

Span = tuple[str, int, int]  # kind, first character, end
Test = Callable[[str], bool]

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:\w[\w-]{0,62}\.){1,8}[^\W\d_]{2,24}(?![\w@-])")
_DIGITS = re.compile(r"\d(?:[ ().\-/]{0,3}\d){5}")  # without six digits near each other there is no number to look at
_PHONES = (
    re.compile(r"(?<![\w+])(?:\+|00(?=\d{1,3}[ .-]))[1-9]\d{0,2}(?:[ .\-/]{0,2}\(?\d{1,5}\)?){2,6}(?!\w)"),  # +44 20 7946 0958
    re.compile(r"(?<![\w.\-/+])(?:1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])\d{3}[-. ]\d{4}(?![\w-]|\.\d)"),  # (555) 010-0199
    re.compile(r"(?<![\w.,/\-+])(?<!\d )\(?0[1-9]\d{0,4}\)?[ /-]{1,3}\d{2,5}(?:[ -]?\d{2,4}){1,3}(?![\w-]|\.\d)"),  # 030 / 901 820
    re.compile(
        r"\b(?:phone|telephone|tel|mobile|cell|fax|whatsapp|call)(?:\s+(?:no|number|at|on|me|us))*\W{1,4}(\d[\d ().-]{5,16}\d)(?!\w)",
        re.IGNORECASE,
    ),
)
_UPPER = "A-ZÀ-ÖØ-ÞŁŠŽČĆŚŹŻĐĐŐŰİ"
_WORD = rf"[{_UPPER}][\w'’-]+"
_NAME = rf"{_WORD}(?:[ \t]+[{_UPPER}](?:[\w'’-]+|\.?)){{0,3}}"
_WHOLE_NAME = rf"{_WORD}(?:[ \t]+[{_UPPER}]\.?)?(?:[ \t]+{_WORD}){{1,2}}"
_PATIENT = re.compile(
    rf"\b(?:[Pp]atient|PATIENT)(?:['’]s)?(?:\s+(?:[Nn]ame|NAME)\s*(?:[:=]|is\b)|\s+(?:named|called))\s*(?P<named>{_NAME})"
    rf"|(?<![Bb]e )\b(?:[Pp]atient|PATIENT)\s*[:=]\s*(?P<called>{_WHOLE_NAME})"  # "Patient: Hello" is a speaker
    rf"|\b[Mm]y\s+(?:full\s+)?name\s+is\s+(?P<own>{_NAME})"
    rf"|^[ \t]*[Nn]ame[ \t]*:[ \t]*(?P<field>{_NAME})",
    re.MULTILINE,
)
_TITLED = re.compile(rf"\b(?:Mr|Mrs|Ms|Mx)(?:\.\s*|\s+)(?P<name>{_NAME})")


def _digits(text: str) -> list[int]:
    return [int(c) for c in text if c.isdigit()]


def _spanish(text: str) -> bool:
    """DNI and NIE: the letter is that of the number modulo 23."""
    number = text[:-1].translate(str.maketrans("XYZ", "012")).replace("-", "")
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1]


def _french(text: str) -> bool:
    """NIR: 97 less the number modulo 97 is the key."""
    d = "".join(map(str, _digits(text)))
    return 97 - int(d[:13]) % 97 == int(d[13:])


def _brazilian(text: str) -> bool:
    """CPF: two check digits modulo 11."""
    d = _digits(text)
    return len(set(d)) > 1 and all(sum((n + 1 - i) * d[i] for i in range(n)) * 10 % 11 % 10 == d[n] for n in (9, 10))


def _chinese(text: str) -> bool:
    """GB 11643: weights are powers of two modulo 11."""
    return "10X98765432"[sum(int(c) * pow(2, 17 - i, 11) for i, c in enumerate(text[:17])) % 11] == text[17].upper()


_IDS: tuple[tuple[re.Pattern[str], Test | None], ...] = (
    (re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])"), None),  # US social security number
    (re.compile(r"(?<!\w)(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D](?!\w)"), None),  # UK
    (re.compile(r"(?<![\w-])(?:\d{8}|[XYZ]-?\d{7})-?[A-Z](?!\w)"), _spanish),
    (re.compile(r"(?<!\w)[12] ?\d\d ?\d\d ?\d\d ?\d{3} ?\d{3} ?\d\d(?!\w)"), _french),
    (re.compile(r"(?<!\w)\d{3}\.\d{3}\.\d{3}-\d\d(?!\w)"), _brazilian),
    (re.compile(r"(?<!\w)[1-9]\d{5}(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])\d{3}[\dXx](?!\w)"), _chinese),
)
_ITALIAN = re.compile(r"(?<!\w)[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z](?!\w)")  # codice fiscale


def spans(text: str) -> list[Span]:
    """Where personal data stands in a text, in order; what overlaps counts once."""
    found: list[Span] = []
    for one in _all(text):
        if not any(one[1] < end and start < one[2] for _, start, end in found):
            found.append(one)
    return sorted(found, key=lambda span: span[1])


def _all(text: str) -> Iterator[Span]:
    """Every match, the surest kinds first."""
    if "@" in text:
        for m in _EMAIL.finditer(text):
            yield "email", m.start(), m.end()
    if _DIGITS.search(text):
        for pattern, test in _IDS:
            for m in pattern.finditer(text):
                if test is None or test(m[0]):
                    yield "national_id", m.start(), m.end()
        for pattern in _PHONES:
            for m in pattern.finditer(text):
                named = m.lastindex or 0  # after the word "phone", seven digits are enough
                if (7 if named else 9) <= len(_digits(m[named])) <= 15:
                    yield "phone", m.start(named), m.end(named)
    for m in _ITALIAN.finditer(text):
        yield "national_id", m.start(), m.end()
    if "atient" in text or "PATIENT" in text or "ame" in text:
        for m in _PATIENT.finditer(text):
            yield "patient_name", m.start(m.lastgroup or 0), m.end(m.lastgroup or 0)
    if "M" in text:
        for m in _TITLED.finditer(text):
            yield "titled_name", m.start("name"), m.end("name")


def masked(text: str) -> str:
    """A text in which every letter and digit of personal data is a dot; as long as it was."""
    for _, start, end in spans(text):
        text = text[:start] + dots(text[start:end]) + text[end:]
    return text


def dots(text: str) -> str:
    """Every letter and digit as a dot."""
    return "".join("•" if c.isalnum() else c for c in text)
