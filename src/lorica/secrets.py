"""Secrets never reach a file, a log or W&B: what counts as one, and how it is written instead."""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "***"

_WORDS = r"(?:api_?key|access_?key|private_?key|token|secret|password|passwd|credentials?)"
_SECRET_NAME = re.compile(rf"(?i)(^|[._-]){_WORDS}$")
_TOKENIZER_NAME = re.compile(r"(?i)(pad|eos|bos|unk|sep|cls|mask|eot|stop|start|special|image|next|first|last)_token$")
# Formats published by their issuers: Hugging Face, W&B, OpenAI and Anthropic, GitHub, AWS, Google; and user:password@ in an address.
# They begin where a word does, or after a line break that is written as two characters.
_SECRET_VALUE = re.compile(
    r"(?:\b|(?<=\\[nrt]))(?:hf_[A-Za-z0-9]{16,}|wandb_v\d_[A-Za-z0-9_]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|AKIA[A-Z0-9]{16}\b|AIza[A-Za-z0-9_-]{30,})|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{16,}"
)
_ASSIGNMENT = re.compile(rf"""(?i)(?<![\w.\-])([\w.\-]*{_WORDS})(["']?\s*[=:]\s*["']?)([^\s,}}\]"']+)""")
_HARMLESS = {"", "null", "none", "true", "false", "0", "1", "***"}


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable is called like a secret; a tokenizer's `pad_token` is none."""
    return bool(_SECRET_NAME.search(name)) and not _TOKENIZER_NAME.search(name)


def _from_environment() -> list[str]:
    """Values of environment variables whose names say that they are secret, as they are and as Python writes them."""
    values = {v for k, v in os.environ.items() if is_secret_name(k) and len(v) >= 8}
    found = values | {repr(v)[1:-1] for v in values}
    return sorted(found, key=len, reverse=True)


def _assigned(match: re.Match[str]) -> str:
    """`name=value` without the value, where the name is a secret's and this isn't a sentence or a template (`Token: {text}`)."""
    name, sign, value = match.groups()
    if not is_secret_name(name) or value.lower() in _HARMLESS or value[0] in "{<[$":
        return match[0]
    prose = sign[0] not in "='\"" and re.fullmatch(r"(?i)token|secret|password|credentials?", name)
    if prose and not (len(value) >= 6 and re.search(r"\d", value) and re.search(r"[A-Za-z]", value)):
        return match[0]
    return f"{name}{sign}{REDACTED}{':' if value[-1] == ':' else ''}"  # a message goes on after a colon


def redact(text: str) -> str:
    """`text` with every known secret replaced by `***`: by format, by assignment to a secret's name, by the environment's values."""
    for value in _from_environment():
        text = text.replace(value, REDACTED)
    return _ASSIGNMENT.sub(_assigned, _SECRET_VALUE.sub(REDACTED, text))


def redact_tree(node: Any, name: str = "") -> Any:
    """A copy of nested dicts and lists in which every secret string is redacted; keys decide too (`api_key: ...`)."""
    if isinstance(node, dict):
        return {k: redact_tree(v, str(k)) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [redact_tree(v, name) for v in node]
    if isinstance(node, str):
        return REDACTED if is_secret_name(name) and node.lower() not in _HARMLESS else redact(node)
    return node
