"""The peer: HF Trainer + PEFT on the rows that Lorica trains on, batch 16 padded to its longest, fp32, on whatever device there is.

`python -m benchmarks.encoder_hf PATH EXAMPLES BATCH LR`: MiniLM with the LoRA of conf/model/minilm_lora.yaml, one epoch of AG News.
Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

from lorica.composition import compose
from lorica.data.registry import build_data
from lorica.models.base import find_base


def main(path: str, examples: int, batch: int, lr: float) -> None:
    """Train for one epoch, test on every test row."""
    config = compose(
        "train", ["model=minilm_lora", "data=ag_news", "data.source=files", f"data.path={path}", f"data.max_train_examples={examples}"]
    )
    data = build_data(config.data, 0)
    data.load()
    folder = find_base(config.model.base, None).path
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(rows: list) -> list[dict]:  # type: ignore[type-arg]
        return [
            {**tokenizer(e.text, truncation=True, max_length=config.model.max_length, return_token_type_ids=False), "labels": e.label}
            for e in rows
        ]

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    lora = config.model.lora
    model = get_peft_model(model, LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=64,
        learning_rate=lr,
        lr_scheduler_type="linear",
        logging_steps=1000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encode(data.splits.train),
        eval_dataset=encode(data.splits.test),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    row = {"who": "HF Trainer + PEFT", "samples_per_second": len(data.splits.train) / seconds, "seconds": seconds}
    row |= {"accuracy": trainer.evaluate()["eval_accuracy"]} if "--no-test" not in sys.argv else {}
    print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
