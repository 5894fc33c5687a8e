"""Held-out rows and the texts of the token contract as questions."""

from __future__ import annotations

from typing import Any

from lorica.certificate import POSITIONS, Sample, encoded
from lorica.data.asking import ask_text
from lorica.data.encoding import IGNORE, CausalEncoder, build_encoder
from lorica.data.token_contract import TEXTS
from lorica.exports.questions import Questions, Row


def questions_of(task: dict[str, Any], tokenizer: Any, sample: Sample) -> Questions:
    """What every model of the ladder reads.

    Args:
        task: as in lorica.json.
    """
    encoder = build_encoder(task, tokenizer)
    labels = list(task.get("labels") or [])
    rows = [encoded(encoder, example) for example in sample.examples]
    if not isinstance(encoder, CausalEncoder):
        found = [Row(list(row.ids), label=row.label) for row in rows]
        return Questions(task["task"], labels, sample.origin, found)
    found = []
    for row in rows:
        following = [*row.labels[1:], IGNORE]
        read = len(row.ids) - (row.supervised > 0)  # nothing comes after an answer's last token
        first = max(0, read - POSITIONS)
        found.append(Row(list(row.ids[:read]), first, following[first:read]))
    if labels:
        for asked, scored in zip(found, encoder.candidates(sample.examples), strict=True):
            asked.label, asked.sequences, asked.picks = scored.label, scored.sequences, scored.picks
    texts = [*((text, False) for text in TEXTS), (TEXTS[0], True)]
    texts += [encoder.prompt_text(example) for example in (*(ask_text(task, text) for text in TEXTS), *sample.examples)]
    contract = [(text, special, list(tokenizer(text, add_special_tokens=special)["input_ids"])) for text, special in texts]
    return Questions(task["task"], labels, sample.origin, found, contract)
