"""New rows for a trained model: the same wording as in training, from the task description kept beside the weights."""

from __future__ import annotations

from typing import Any

from lorica.data.chat import parse_messages
from lorica.data.classification import fill_prompt
from lorica.data.examples import Example, Message
from lorica.data.instruction import fill_instruction
from lorica.data.module import BadRow


def ask_text(task: dict[str, Any], text: str, origin: str = "") -> Example:
    """One text as an example: the text to label, the question to answer, or the user's turn.

    Args:
        task: lorica.json; {} for weights of another tool, which read the text as it is.
    """
    kind = task.get("kind")
    if kind == "instruction":
        shared = task.get("shared_prompt")
        prompt, given = (shared, text) if shared else (text, "")
        return Example(origin, prompt=fill_instruction(task["prompt_template"], task["prompt_template_with_input"], prompt, given))
    if kind == "chat":
        return Example(origin, messages=(Message("user", text), Message("assistant", "")))
    if kind == "classification":
        return Example(origin, text=text, prompt=fill_prompt(task["prompt_template"], text, task.get("labels") or []))
    return Example(origin, text=text, prompt=text)


def ask_row(task: dict[str, Any], fields: dict[str, Any], column: str | None, origin: str) -> Example:
    """One row of a file: by the training data's columns where it has them, else by its text column.

    Raises:
        BadRow: no text in it.
    """
    if column is None and task.get("kind") == "chat" and task.get("messages_column") in fields:
        turns = parse_messages(fields[task["messages_column"]])
        if turns[-1].role == "assistant":
            turns.pop()
        return Example(origin, messages=(*turns, Message("assistant", "")))
    if column is None and task.get("kind") == "instruction" and fields.get(task["prompt_column"]):
        given = str(fields.get(task.get("input_column") or "") or "").strip()
        return Example(
            origin,
            prompt=fill_instruction(
                task["prompt_template"], task["prompt_template_with_input"], str(fields[task["prompt_column"]]).strip(), given
            ),
        )
    name = column or text_column(task, fields)
    value = fields.get(name)
    if value is None or not str(value).strip():
        raise BadRow(f"has no {name}")
    return ask_text(task, str(value).strip(), origin)


def text_column(task: dict[str, Any], fields: dict[str, Any]) -> str:
    """The column with the text: the training data's, else `text`, else the only one."""
    for name in (task.get("text_column"), task.get("input_column"), task.get("prompt_column"), "text"):
        if name and name in fields:
            return str(name)
    return next(iter(fields)) if len(fields) == 1 else str(task.get("text_column") or "text")
