"""A RoBERTa classifier in HF Trainer, on the token ids that Lorica trains on.

`python -m benchmarks.roberta_peer tuned|notebook MODEL IDS.jsonl SETTINGS-JSON`; settings: steps, lora. `notebook` is the usual recipe
(batch 16, fp32, padded to the longest); `tuned` what Trainer can do better: batch 256, bf16, tf32, rows of like length together,
eight loader processes. Prints one JSON line: samples/s, peak memory, losses.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from benchmarks.peer_clock import GPU, WARM, Clock, report, run

PAD = 1  # RoBERTa's


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded to the longest."""
    longest = max(len(r["input_ids"]) for r in rows)
    return {
        "input_ids": torch.tensor([r["input_ids"] + [PAD] * (longest - len(r["input_ids"])) for r in rows]),
        "attention_mask": torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]),
        "labels": torch.tensor([r["label"] for r in rows]),
    }


def main(who: str, path: str, ids: str, given: str) -> None:
    """Train and print."""
    settings = json.loads(given)
    with Path(ids).open() as file:
        rows = [json.loads(line) for line in file]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=4)
    if settings["lora"]:
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = get_peft_model(model, lora)
    tuned = {"bf16": GPU, "tf32": GPU or None, "dataloader_num_workers": 8 if GPU else 0, "train_sampling_strategy": "group_by_length"}
    batch = settings.get("batch") or (256 if who == "tuned" else 16)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=settings["steps"],
        per_device_train_batch_size=batch,
        learning_rate=5e-4 if settings["lora"] else 2e-5,
        dataloader_drop_last=True,
        logging_steps=5,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **(tuned if who == "tuned" else {}),
    )
    clock = Clock()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[clock])
    seconds, figures = run(trainer, clock, settings["steps"])
    report({"samples_per_second": batch * (settings["steps"] - WARM) / seconds, **figures, "settings": {**settings, "batch": batch}})


if __name__ == "__main__":
    main(*sys.argv[1:5])
