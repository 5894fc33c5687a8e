"""What went wrong on a text's way here: mojibake, replacement characters, byte order marks, control characters, entities, escapes."""

from __future__ import annotations

import re

KINDS = {
    "mojibake": "UTF-8 read as another encoding (“CafÃ©”)",
    "replacement_character": "U+FFFD, where a character was lost",
    "byte_order_mark": "U+FEFF inside a text",
    "control_characters": "control characters other than tab and line break",
    "invisible_characters": "zero-width and direction marks",
    "html_entities": "HTML entities not resolved (“&amp;”)",
    "escapes": "escapes written out (“\\u2019”)",
}

# The bytes 80 to BF as Windows-1252 shows them, or as they are in Latin-1.
_FOLLOWING = "".join(sorted({bytes([b]).decode("cp1252", "ignore") for b in range(0x80, 0xC0)} | {chr(b) for b in range(0x80, 0xC0)}))
_MOJIBAKE = re.compile(f"[ÂÃ][{re.escape(_FOLLOWING)}]|â[€‚„†™œ\x80-\x9f][{re.escape(_FOLLOWING)}]|ð[Ÿ\x9f][{re.escape(_FOLLOWING)}]{{2}}")
_FOUND = {
    "replacement_character": re.compile("\ufffd"),
    "byte_order_mark": re.compile("\ufeff"),
    "control_characters": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "invisible_characters": re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069]"),
    "html_entities": re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|[mn]dash|hellip|#\d{1,6}|#x[0-9a-fA-F]{1,5});|(?<![&\w])#\d{2,4};"),
    "escapes": re.compile(r"\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}"),
}
_ANY = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufffdÂÃâð&#\\\\]"
)
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


def oddities(text: str) -> list[str]:
    """The kinds that a text has."""
    if not _ANY.search(text):
        return []
    found = [kind for kind, pattern in _FOUND.items() if pattern.search(text)]
    return ["mojibake", *found] if any(_was_utf8(m[0]) for m in _MOJIBAKE.finditer(text)) else found


def _was_utf8(text: str) -> bool:
    """Whether characters are the bytes of one other character."""
    raw = bytearray()
    for c in text:
        try:
            raw += c.encode("cp1252")
        except UnicodeEncodeError:
            raw.append(ord(c) & 0xFF)
    try:
        return len(raw.decode("utf-8")) == 1
    except UnicodeDecodeError:
        return False


def visible(text: str) -> str:
    """A text with its control, zero-width and direction characters written as their numbers."""
    return _UNSEEN.sub(lambda m: f"‹U+{ord(m[0]):04X}›", text)
