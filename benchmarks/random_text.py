"""Rows of random words of about given lengths in tokens, for speed where real rows can't be had or must have known lengths.

The words are those that the tokenizer has one token for, so that a text of n words has n tokens.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"  # data.prompt_template of data=instruction
PROMPT_SHARE = 0.45
HELD_OUT = 16


class Words:
    """Draws texts of n tokens."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(seed)
        spelt = {tokenizer.decode([i]).strip() for i in range(len(tokenizer))}
        candidates = sorted(w for w in spelt if len(w) > 1 and w.isascii() and w.isalpha() and w.islower())
        before = self.count("the")
        ids = tokenizer([f"the {w}" for w in candidates], add_special_tokens=False)["input_ids"]
        self.words = np.array([w for w, row in zip(candidates, ids, strict=True) if len(row) == before + 1])
        if len(self.words) < 50:
            raise SystemExit(f"the tokenizer has only {len(self.words)} words of one token")

    def count(self, text: str, special: bool = False) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def text(self, tokens: int) -> str:
        """Random words."""
        return " ".join(self.rng.choice(self.words, max(1, tokens)))


def document_lengths(rng: np.random.Generator, rows: int) -> list[int]:
    """About 300 tokens: lognormal, sigma 0.5, 48 to 1,024."""
    return [int(n) for n in np.clip(rng.lognormal(np.log(300), 0.5, rows), 48, 1024)]


def write_instructions(folder: Path, tokenizer: Any, rows: int, length: int | None = None) -> None:
    """train, validation and test.jsonl with instruction and output; the instruction in its wording is 45 % of the tokens.

    Args:
        length: of every row; None: `document_lengths`.
    """
    words = Words(tokenizer)
    around = words.count(TEMPLATE.replace("{prompt}", "the"), special=True) - words.count("the")
    for name, n in (("validation", HELD_OUT), ("test", HELD_OUT), ("train", rows)):
        lines = []
        for total in [length] * n if length else document_lengths(words.rng, n):
            prompt = round(total * PROMPT_SHARE)
            row = {"instruction": words.text(prompt - around), "output": words.text(total - prompt - 1)}  # 1: eos
            lines.append(json.dumps(row) + "\n")
        _write(folder / f"{name}.jsonl", "".join(lines))


def news_lengths(rng: np.random.Generator, rows: int) -> list[int]:
    """Like AG News in RoBERTa's tokens: 53 on average."""
    return [int(n) for n in np.clip(rng.lognormal(np.log(50), 0.33, rows), 14, 256)]


def write_news(folder: Path, tokenizer: Any, rows: int) -> None:
    """train, validation and test.csv in AG News' layout (class 1-4, title, description, no header), random classes."""
    words = Words(tokenizer)
    around = words.count("the", special=True) - words.count("the") + 1  # the stop between title and description
    for name, n in (("validation", 4 * HELD_OUT), ("test", 4 * HELD_OUT), ("train", rows)):
        lines = []
        for length in news_lengths(words.rng, n):
            lines.append([str(words.rng.integers(1, 5)), words.text(8), words.text(length - around - 8)])
        _write_csv(folder / f"{name}.csv", lines)


def write_texts(file: Path, tokenizer: Any, rows: int) -> None:
    """Lines of the same lengths to be asked: a csv with a column text."""
    words = Words(tokenizer, seed=1)
    around = words.count("the", special=True) - words.count("the")
    _write_csv(file, [["text"], *([words.text(length - around)] for length in news_lengths(words.rng, rows))])


def _write(path: Path, text: str) -> None:
    """Under a temporary name first: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    temporary.replace(path)
