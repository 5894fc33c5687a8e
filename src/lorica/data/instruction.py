"""Prompts with written answers, of anybody's: a prompt column, an optional input column, a completion column."""

from __future__ import annotations

from typing import Any, ClassVar

from lorica.config import InstructionDataConfig
from lorica.data.examples import Example
from lorica.data.readers import Row
from lorica.data.rows import BadRow, Rows


class InstructionRows(Rows):
    """`data=instruction`."""

    generative: ClassVar[bool] = True
    config: InstructionDataConfig

    def columns(self) -> dict[str, str]:
        c = self.config
        needed = {"data.prompt_column": c.prompt_column, "data.completion_column": c.completion_column}
        return needed | ({"data.input_column": c.input_column} if c.input_column else {})

    def prepare_rows(self, rows: dict[str, list[Row]]) -> None:
        """Find out whether every row has the same instruction, so that a new text can be taken as its input."""
        prompts = {str(r.fields.get(self.config.prompt_column) or "").strip() for r in rows["train"] if not r.fault}
        self.shared_prompt = prompts.pop() if len(prompts) == 1 and self.config.input_column else None

    def describe(self) -> dict[str, Any]:
        c = self.config
        columns = ("prompt_column", "input_column", "completion_column")
        names = (*columns, "prompt_template", "prompt_template_with_input", "max_new_tokens")
        return {"kind": "instruction", "shared_prompt": self.shared_prompt, **{n: getattr(c, n) for n in names}}

    def to_example(self, row: Row) -> Example:
        """prompt (in its wording) and completion."""
        c = self.config
        prompt, given, answer = (_text(row, column) if column else "" for column in (c.prompt_column, c.input_column, c.completion_column))
        if not prompt and not given:
            raise BadRow(f"has no {c.prompt_column}")
        if not answer:
            raise BadRow(f"has no {c.completion_column}")
        return Example(row.origin, prompt=self.ask(prompt, given), completion=answer)

    def ask(self, prompt: str, given: str = "") -> str:
        """The wording a model reads for an instruction and its input."""
        return fill_instruction(self.config.prompt_template, self.config.prompt_template_with_input, prompt, given)


def fill_instruction(template: str, template_with_input: str, prompt: str, given: str) -> str:
    """The template with {prompt} and, where there is an input, {input}."""
    if not given:
        return template.replace("{prompt}", prompt)
    head, _, tail = template_with_input.partition("{input}")
    return head.replace("{prompt}", prompt) + given + tail.replace("{prompt}", prompt)


def _text(row: Row, column: str) -> str:
    value = row.fields.get(column)
    if value is not None and not isinstance(value, (str, int, float)):
        raise BadRow(f"has a {type(value).__name__} in {column}, not text")
    return "" if value is None else str(value).strip()
