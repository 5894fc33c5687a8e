"""New rows for a trained model: the same wording as in training, from the task description kept beside the weights."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from lorica.data.ag_news import tidy
from lorica.data.chat import parse_messages
from lorica.data.classification import fill_prompt, label_numbers, written_label
from lorica.data.examples import Example, Message
from lorica.data.instruction import fill_instruction
from lorica.data.rows import BadRow


def ask_text(task: dict[str, Any], text: str, origin: str = "") -> Example:
    """One text as an example: the text to label, the question to answer, or the user's turn.

    Args:
        task: lorica.json; {} for weights of another tool, which read the text as it is.
    """
    kind = task.get("kind")
    if kind is not None:
        text = text.strip()
    if task.get("tidy", task.get("data") == "ag_news"):
        text = tidy(text)
    if kind == "instruction":
        shared = task.get("shared_prompt")
        prompt, given = (shared, text) if shared else (text, "")
        return Example(origin, prompt=fill_instruction(task["prompt_template"], task["prompt_template_with_input"], prompt, given))
    if kind == "chat":
        return Example(origin, messages=(Message("user", text), Message("assistant", "")))
    if kind == "classification":
        return Example(origin, text=text, prompt=fill_prompt(task["prompt_template"], text, task.get("labels") or []))
    return Example(origin, text=text, prompt=text)


def ask_row(task: dict[str, Any], fields: dict[str, Any], column: str | None, origin: str, only: str | None = None) -> Example:
    """One row of a file: by the training data's columns where it has them, else by its text column.

    Args:
        column: the one with the text, where it was said. only: the only one of the file.
    Raises:
        BadRow: no text in it, or something else than one.
    """
    if column is None and task.get("kind") == "chat" and task.get("messages_column") in fields:
        turns = parse_messages(fields[task["messages_column"]])
        if turns[-1].role == "assistant":
            turns.pop()
        if not turns or turns[-1].role != "user":
            raise BadRow("has no message by the user")
        return Example(origin, messages=(*turns, Message("assistant", "")))
    if column is None and task.get("kind") == "instruction" and fields.get(task["prompt_column"]):
        given = _text_of(fields, task.get("input_column") or "")
        if not (prompt := _text_of(fields, task["prompt_column"])):
            raise BadRow(f"has no {task['prompt_column']}")
        return Example(origin, prompt=fill_instruction(task["prompt_template"], task["prompt_template_with_input"], prompt, given))
    name = column or known_column(task, fields) or only or str(task.get("text_column") or "text")
    if not (text := _text_of(fields, name)):
        raise BadRow(f"has no {name}")
    return ask_text(task, text, origin)


def ask_answered_row(task: dict[str, Any], fields: dict[str, Any], origin: str) -> Example:
    """`ask_row` with the row's own answer, where it has one: its completion, the assistant's last turn, its label.

    Raises:
        BadRow: no text in it, or something else than one.
    """
    example = ask_row(task, fields, None, origin)
    kind = task.get("kind")
    if kind == "instruction":
        return replace(example, completion=_text_of(fields, task.get("completion_column") or "output"))
    if kind == "chat" and task.get("messages_column") in fields:
        last = parse_messages(fields[task["messages_column"]])[-1]
        return replace(example, messages=(*example.messages[:-1], last)) if last.role == "assistant" else example
    if task.get("labels"):
        value = written_label(fields.get(task.get("label_column") or "label"))
        numbers = label_numbers(task["labels"], task.get("label_values") or ())
        return replace(example, label=numbers.get(value, numbers.get(value.casefold())))
    return example


def _text_of(fields: dict[str, Any], name: str) -> str:
    """A column's value as text, numbers too; "" where there is none.

    Raises:
        BadRow: a list or an object, which is no text.
    """
    value = fields.get(name)
    if isinstance(value, (list, dict)):
        raise BadRow(f"has a {type(value).__name__} as {name}, not a text")
    return "" if value is None else str(value).strip()


def text_column(task: dict[str, Any], fields: dict[str, Any]) -> str:
    """The column with a file's texts, by a row that is sound: the training data's, else `text`, else the only one."""
    only = next(iter(fields)) if len(fields) == 1 else None
    return known_column(task, fields) or only or str(task.get("text_column") or "text")


def known_column(task: dict[str, Any], fields: Collection[str]) -> str | None:
    """The column that is read by its name: the training data's, or `text`."""
    for name in (task.get("text_column"), task.get("input_column"), task.get("prompt_column"), "text"):
        if name and name in fields:
            return str(name)
    return None


def typed_text(task: dict[str, Any], example: Example) -> str:
    """What a person would type to ask an example's question: the way back from `ask_text`.

    Args:
        task: what the data module describes.
    """
    if example.messages:
        return next((m.content for m in example.messages if m.role == "user"), example.messages[0].content)
    if task.get("kind") != "instruction":
        return example.text or example.prompt
    for name, slots in (("prompt_template_with_input", ("prompt", "input")), ("prompt_template", ("prompt",))):
        found = _filled_in(task[name], slots, example.prompt)
        if found is not None:
            prompt, given = found["prompt"], found.get("input", "")
            return given if given and prompt == task.get("shared_prompt") else f"{prompt} {given}".strip()
    return example.prompt


def _filled_in(template: str, slots: tuple[str, ...], text: str) -> dict[str, str] | None:
    """What stands in `text` where the template has {prompt} and {input}; None where it is not of this template."""
    pattern, seen = "", set()
    for part in re.split(r"(\{(?:prompt|input)\})", template):
        name = part.strip("{}")
        if part != f"{{{name}}}" or name not in slots or (name in seen and name == "input"):
            pattern += re.escape(part)
        else:
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>.*?)"
            seen.add(name)
    match = re.fullmatch(pattern, text, re.DOTALL)
    return match.groupdict() if match else None
