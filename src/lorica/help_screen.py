"""What `--help` prints: the groups, the flags, and every key with its value now and what it means. No torch."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from lorica.config import as_typed, limits
from lorica.secrets import redact

KEYS = 44  # columns of a key and its value
NARROW = 100  # a terminal with fewer columns gets the meaning below the key


def help_screen(verb: str, tree: Any, groups: Mapping[str, Sequence[str]], *, as_json: bool, of_train: bool) -> str:
    """The whole text, secrets redacted.

    Args:
        tree: the verb's OmegaConf tree, typed by the schema (`composition.compose_tree`).
        groups: each group with its options, for a verb that has groups.
        as_json: the verb has `--json`. of_train: it takes the groups and keys of train besides its own.
    """
    options = "".join(f"  {group}: {', '.join(names)}\n" for group, names in groups.items())
    return (
        (f"usage: lorica {verb} [group=option ...] [key=value ...] [-m]" if groups else f"usage: lorica {verb} key=value ...")
        + (" [--json]" if as_json else "")
        + " [--cfg job] [--config-dir DIR] [-sc install=bash]\n\n"
        + (f"groups\n{options}\n" if groups else "")
        + ("every group and key of train too: lorica train --help\n\n" if of_train else "")
        + "keys, their values now and what they mean (more in docs/configuration.md)\n"
        + "\n".join(laid_out(_keys(tree), shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    )


def _keys(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key=value, meaning) of every leaf."""
    from omegaconf import OmegaConf

    of = OmegaConf.get_type(tree)
    known = {f.name: f.metadata for f in dataclasses.fields(of)} if dataclasses.is_dataclass(of) else {}
    for name, value in cast(dict[str, Any], OmegaConf.to_container(tree)).items():
        if isinstance(value, dict) and value:
            yield from _keys(tree[name], f"{prefix}{name}.")
        else:
            about: Mapping[str, Any] = known.get(name, {})
            choices = "one of " + ", ".join(about["choices"]) if about.get("choices") else ""
            meaning = "; ".join(filter(None, (about.get("meaning"), choices, limits(about))))
            yield redact(f"{prefix}{name}={as_typed(value)}").replace("\n", "\\n"), meaning


def laid_out(keys: Iterator[tuple[str, str]], width: int | None) -> Iterator[str]:
    """A line each, to search in; on a terminal so many columns wide, broken at words."""
    for key, meaning in keys:
        line = f"  {key:<{KEYS}}  {meaning}".rstrip()
        if width is None or len(line) <= width:
            yield line
        elif width < NARROW or len(key) > KEYS:
            yield f"  {key}"
            yield textwrap.fill(meaning, max(width, 30), initial_indent=" " * 6, subsequent_indent=" " * 6)
        else:
            yield textwrap.fill(line, width, subsequent_indent=" " * (KEYS + 4))
