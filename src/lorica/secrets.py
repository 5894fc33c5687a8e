"""Secrets never reach a file, a log or W&B: what counts as one, and how it is written instead."""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "***"

_SECRET_NAME = re.compile(r"(?i)(^|[._-])(api_?key|token|secret|password|passwd|credentials?)$")
# Formats published by their issuers: Hugging Face, W&B, OpenAI and Anthropic, GitHub, AWS, Google; and user:password@ in an address.
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d_[A-Za-z0-9_]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{20,}|\bAKIA[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_-]{30,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_ASSIGNMENT = re.compile(r"(?i)([\w.\-]*(?:api_?key|token|secret|password|passwd)\s*[=:]\s*)([^\s,}\]]+)")
_HARMLESS = {"", "null", "none", "true", "false", "0", "1", "***"}


def _from_environment() -> list[str]:
    """Values of environment variables whose names say that they are secret."""
    found = {v for k, v in os.environ.items() if _SECRET_NAME.search(k) and len(v) >= 8}
    return sorted(found, key=len, reverse=True)


def redact(text: str) -> str:
    """`text` with every known secret replaced by `***`: by format, by assignment to a secret's name, by the environment's values."""
    for value in _from_environment():
        text = text.replace(value, REDACTED)
    text = _SECRET_VALUE.sub(REDACTED, text)
    return _ASSIGNMENT.sub(lambda m: m[0] if m[2].strip("'\"").lower() in _HARMLESS else m[1] + REDACTED, text)


def redact_tree(node: Any, name: str = "") -> Any:
    """A copy of nested dicts and lists in which every secret string is redacted; keys decide too (`api_key: ...`)."""
    if isinstance(node, dict):
        return {k: redact_tree(v, str(k)) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [redact_tree(v, name) for v in node]
    if isinstance(node, str):
        return REDACTED if _SECRET_NAME.search(name) and node.lower() not in _HARMLESS else redact(node)
    return node
