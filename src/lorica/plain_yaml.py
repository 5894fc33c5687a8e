"""YAML that others wrote is read only where it is plain: no tags, no anchors, nothing that looks up or builds anything. No torch.

Tags can name Python objects, anchors let a few lines unfold to gigabytes, resolvers (`${oc.env:HF_TOKEN}`) would copy the environment
into a run's config.yaml, `_target_` is how Hydra names code. None of them is needed: values are values, and a shell fills in `$NAME`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorica.config import ConfigError

LARGEST = 1 << 20  # bytes of one file
DEEPEST = 32  # collections within each other
BUILDERS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's words for building objects
_OPENED = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{(\w[\w.]*)\}")
_RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{\s*([\w.]+)\s*:")


def read(file: Path, key: str, fix: str = "") -> Any:
    """The content of a YAML file.

    Args:
        key: named in errors.
    Raises:
        ConfigError: it is not plain, or not YAML.
    """
    import yaml

    try:
        if file.stat().st_size > LARGEST:
            raise ConfigError(key, file, f"has more than {LARGEST:,} bytes, which no configuration needs", fix)
        text = file.read_text("utf-8")
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), file, key, fix)
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"line {mark.line + 1}: {e.problem}" if mark else str(e).splitlines()[0]  # type: ignore[union-attr]
        raise ConfigError(key, file, f"is damaged ({where})", fix) from None
    except (ValueError, OverflowError) as e:  # a number of 5,000 digits, the 31st of February
        raise ConfigError(key, file, f"has a value that can't be read ({str(e).splitlines()[0]})", fix) from None
    except OSError as e:
        raise ConfigError(key, file, f"can't be read ({e.strerror or e})", fix) from None


def _check_events(events: Any, file: Path, key: str, fix: str) -> None:
    import yaml

    depth = 0
    for event in events:
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise ConfigError(key, file, f"line {line} has the tag {event.tag}; tags can name code", "the plain value")
        if getattr(event, "anchor", None) is not None:
            raise ConfigError(key, file, f"line {line} has an anchor or alias (&{event.anchor})", "the values written out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ConfigError(key, file, f"line {line} is nested more than {DEEPEST} deep", fix)


def check_file(file: Path, key: str) -> None:
    """Refuse a file of values that is not plain, or that names code or a resolver.

    Raises:
        ConfigError: names the file and the place.
    """
    for name, value in leaves(read(file, key)):
        _check_leaf(name, value, f" (in {file})")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested dicts and lists with its value, collections too."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for k, value in items:
        name = f"{prefix}.{k}" if prefix else str(k)
        yield name, value
        yield from leaves(value, name)


def _check_leaf(name: str, value: Any, where: str = "") -> None:
    if name.rpartition(".")[2] in BUILDERS:
        raise ConfigError(name, value, f"nothing in a configuration can name code{where}", "leave it out")
    found = _RESOLVER.search(value) if isinstance(value, str) else None
    if found:
        raise ConfigError(
            name, value, f"the resolver {found[1]} looks up what is no part of the configuration{where}", "the value, or $NAME in a shell"
        )


def check_value(name: str, value: Any) -> None:
    """Refuse a value for a key, or what is inside it, that names code or a resolver."""
    for inner, found in ((name, value), *leaves(value, name)):
        _check_leaf(inner, found)


def check_tree(tree: Any) -> None:
    """Refuse resolvers, Hydra's words for code, and references to references, which can unfold to any length, in composed values.

    Args:
        tree: nested dicts and lists, not resolved.
    Raises:
        ConfigError: names the key.
    """
    check_value("", tree)
    values = dict(leaves(tree))
    referring = {name for name, value in values.items() if isinstance(value, str) and _OPENED.search(value)}
    for name in referring:
        references = _REFERENCE.findall(values[name])
        if len(references) != len(_OPENED.findall(values[name])):
            raise ConfigError(name, values[name], "can't be read: a reference is ${section.key}", "the value itself")
        for reference in references:
            if any(other == reference or other.startswith(reference + ".") for other in referring):
                raise ConfigError(name, values[name], f"refers to {reference}, which is a reference itself", "the value itself")
