"""Conversations in UltraChat's layout: a column with a list of {role, content}; every assistant turn is learnt."""

from __future__ import annotations

from typing import Any, ClassVar

from lorica.config import ChatDataConfig
from lorica.data.examples import Example, Message
from lorica.data.readers import Row
from lorica.data.rows import BadRow, Rows

ROLES = ("system", "user", "assistant")


class ChatRows(Rows):
    """`data=chat`."""

    generative: ClassVar[bool] = True
    sample_name: ClassVar[str] = "chat"
    config: ChatDataConfig

    def columns(self) -> dict[str, str]:
        return {"data.messages_column": self.config.messages_column}

    def describe(self) -> dict[str, Any]:
        return {"kind": "chat", "messages_column": self.config.messages_column, "max_new_tokens": self.config.max_new_tokens}

    def to_example(self, row: Row) -> Example:
        """The conversation up to its last assistant turn."""
        messages = parse_messages(row.fields.get(self.config.messages_column))
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if len(messages) < 2:
            raise BadRow("has no answer by the assistant")
        return Example(row.origin, messages=tuple(messages))


def parse_messages(value: Any) -> list[Message]:
    """A list of {role, content}: an optional system message, then user and assistant in turn.

    Raises:
        BadRow: anything else.
    """
    if not isinstance(value, list) or not value:
        raise BadRow("has no list of messages")
    messages = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES:
            raise BadRow(f"has the unknown role {str(role)[:40]!r}")
        if not isinstance(content, str) or not content.strip():
            raise BadRow(f"has an empty {role} message")
        messages.append(Message(role, content.strip()))
    spoken = [m.role for m in messages if m.role != "system"]
    if any(m.role == "system" for m in messages[1:]) or any(role != ROLES[1 + i % 2] for i, role in enumerate(spoken)):
        raise BadRow("has roles out of turn")
    return messages
