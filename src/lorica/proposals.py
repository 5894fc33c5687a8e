"""What a message proposes in place of what was typed: the nearest name, and words as a shell and Hydra's grammar take them. No torch."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorica.config import as_typed


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like `name`, or None where nothing is alike."""
    options = list(valid)
    for wanted in (name, name.lower()):
        if found := difflib.get_close_matches(wanted, options, n=1, cutoff=0.5):
            return found[0]
    inside = [o for o in options if min(len(name), len(o)) > 1 and (name in o or o in name)]
    return min(inside, key=lambda o: (not o.startswith(name), len(o)), default=None)


def sibling(path: Path) -> str:
    """`; did you mean ...?` with the nearest name in the folder where `path` was looked for, or nothing."""
    parent = path.expanduser().parent
    if path.expanduser().exists():
        return ""
    names = sorted(os.listdir(parent)) if parent.is_dir() else []
    stems = difflib.get_close_matches(path.stem, {Path(name).stem for name in names}, n=1, cutoff=0.6)  # endings alone make no names alike
    near = nearest(path.name, [name for name in names if Path(name).stem in stems])
    return f"; did you mean {parent / near}?" if near else ""


def pasted(key: str, value: object) -> str:
    """key=value as it is pasted into a shell: a text that Hydra's grammar would not take as it stands is in quotes."""
    return in_shell(f"{key}={_in_grammar(value)}")


def in_shell(text: str) -> str:
    """One word of a shell's."""
    return text if re.fullmatch(r"[\w./:@+=,\[\]-]*", text, re.ASCII) else shlex.quote(text)


def _in_grammar(value: object) -> str:
    """As Hydra reads it: a text that would be something else, or nothing, is in quotes."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_in_grammar, value))}]"
    if not isinstance(value, str):
        return as_typed(value)
    if re.fullmatch(r"[A-Za-z_./][\w./:@+-]*", value, re.ASCII) and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    inner = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), value)  # a backslash is one elsewhere
    return f'"{inner}"'


def quoted(key: str, value: str, parser: Any) -> str:
    """key=value as a shell and Hydra's grammar take it: texts with other than plain letters and digits in quotes, in a list each; or ""."""
    from hydra.errors import HydraException

    proposal = pasted(key, value)
    if value[:1] in "[{":
        words = [word.strip() for word in value[1:-1].split(",")]
        if value[-1] != "]" or any(set(word) & set("[]{}'\"") for word in words):
            return ""
        plain = re.compile(r"[\w .+-]*", re.ASCII)
        proposal = shlex.quote(f"{key}=[{','.join(w if plain.fullmatch(w) else json.dumps(w, ensure_ascii=False) for w in words)}]")
    try:
        parser.parse_override(shlex.split(proposal)[0])
    except HydraException:
        return ""
    return proposal


def uncut(words: Sequence[str]) -> str | None:
    """The first key=value that a shell cut at its spaces: a list, a mapping, several values, or what has spaces around its `=`."""
    for i, whole in enumerate(words):
        for more in words[i + 1 :]:
            if _open(whole):
                whole += more if whole.endswith("=") else f" {more}"
            elif ("=" not in whole and more.startswith("=")) or (whole.endswith(("=", ",")) and "=" not in more and "=" in whole):
                whole += more
            else:
                break
        if whole != words[i] and re.fullmatch(r"[+~]*[A-Za-z_][\w./@]*=.+", whole) and not _open(whole):
            return whole
    return None


def _open(text: str) -> bool:
    """Whether a bracket is not closed."""
    return sum(map(text.count, "[{")) > sum(map(text.count, "]}"))
