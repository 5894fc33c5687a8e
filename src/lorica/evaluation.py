"""The test pass: its figures, and every test row with its prediction."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from lorica import metrics
from lorica.calibration import Calibration, expected_calibration_error
from lorica.callbacks import Evaluate, of_ranks
from lorica.data.encoding import CausalEncoder
from lorica.data.examples import Example
from lorica.data.module import LoricaDataModule
from lorica.models.module import CausalLMModule, LoricaModule

GENERATION_BATCH = 32  # test prompts answered at once


def test(
    data: LoricaDataModule, module: LoricaModule, trainer: Trainer, evaluate: Evaluate, calibration: Calibration | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Read the test rows once: (figures, rows with predictions). The rows are whole on rank 0 and empty on others.

    Args:
        calibration: of the weights; probabilities are those that `predict` gives with it.
    """
    if not data.eval_rows["test"]:
        return {}, []
    begun = time.perf_counter()
    trainer.test(module, datamodule=data, verbose=False)
    figures = {**evaluate.figures, "test/samples_per_second": len(data.eval_rows["test"]) / (time.perf_counter() - begun)}
    scores = {k: v for rows_of_rank in of_ranks(trainer, evaluate.rows) for k, v in rows_of_rank.items()}
    if not trainer.is_global_zero:
        return figures, []
    rows: list[dict[str, Any]] = [{"origin": e.origin, "text": _asked(e)} for e in data.splits.test]
    if data.labels is not None:
        temperature = calibration.temperature if calibration is not None else 1.0
        for i, row in enumerate(rows):
            row |= _labelled(data.splits.test[i], (torch.tensor(scores[i]) / temperature).softmax(0).tolist(), data.labels)
        figures["test/ece"] = _calibration_error(rows)
    elif data.generative:
        answers = evaluate.answers
        for row, example, answer in zip(rows, data.splits.test, answers + [None] * len(rows), strict=False):
            row |= {"reference": example.completion or example.messages[-1].content, "prediction": answer}
        if answers:
            figures["test/rouge_l"] = metrics.rouge_l(answers, [str(row["reference"]) for row in rows[: len(answers)]])
    return figures, rows


def _asked(example: Example) -> str | None:
    return example.text or example.prompt or "\n".join(f"{m.role}: {m.content}" for m in example.messages[:-1])


def _labelled(example: Example, probabilities: list[float], labels: list[str]) -> dict[str, Any]:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return {
        "label": None if example.label is None else labels[example.label],
        "prediction": labels[best],
        "probability": probabilities[best],
        "probabilities": dict(zip(labels, probabilities, strict=True)),
    }


def _calibration_error(rows: list[dict[str, Any]]) -> float:
    """Of the predicted labels of rows that have a label."""
    known = [row for row in rows if row["label"] is not None]
    if not known:
        return 0.0
    right = np.array([row["label"] == row["prediction"] for row in known])
    return expected_calibration_error(np.array([row["probability"] for row in known]), right)


def answer(data: LoricaDataModule, module: LoricaModule, examples: int, max_new_tokens: int) -> list[str]:
    """Generated answers to the first test rows, in order."""
    assert isinstance(module, CausalLMModule) and isinstance(data.encoder, CausalEncoder)
    prompts = [data.encoder.prompt_ids(e) for e in data.splits.test[:examples]]
    tokenizer = data.encoder.tokenizer
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, str] = {}
    for at in range(0, len(order), GENERATION_BATCH):
        group = order[at : at + GENERATION_BATCH]
        generated = module.generate([prompts[i] for i in group], data.batching.pad_id, max_new_tokens)
        answers |= {i: tokenizer.decode(ids, skip_special_tokens=True).strip() for i, ids in zip(group, generated, strict=True)}
    return [answers[i] for i in range(len(prompts))]
