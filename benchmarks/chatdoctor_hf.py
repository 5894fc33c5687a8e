"""The peer: the ChatDoctor walk-through's recipe in HF Trainer + PEFT, on the same rows as Lorica's run.

`python -m benchmarks.chatdoctor_hf MODEL ROWS.jsonl STEPS`: batch 4, r=64 on every linear layer and the head, NF4, gradient
checkpointing, paged 8-bit AdamW, left padding to the longest of the batch. Prints one JSON line: tokens/s over tokens that are
not padding, peak memory, losses.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

MAX_LENGTH, WARM = 512, 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"


class Clock(TrainerCallback):  # type: ignore[misc]
    """Device-synchronised times at the beginning of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if len(self.times) == WARM + 1:
            torch.cuda.reset_peak_memory_stats()


def main(path: str, rows: str, steps: int) -> None:
    """Train and print."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token  # as the walk-through does
    texts = [WITH_INPUT.format(**json.loads(line)) for line in Path(rows).read_text("utf-8").splitlines()[: 4 * (steps + 2)]]
    data = [dict(tokenizer(t + tokenizer.eos_token, truncation=True, max_length=MAX_LENGTH)) for t in texts]
    counts: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        out = tokenizer.pad([{k: b[k] for k in ("input_ids", "attention_mask")} for b in batch], return_tensors="pt")
        counts.append(int(out["attention_mask"].sum()))
        return {**out, "labels": out["input_ids"].clone()}

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0})
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, lora_dropout=0.05, target_modules=LINEAR, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=2.5e-4,
        warmup_steps=1,
        optim="paged_adamw_8bit",
        gradient_checkpointing=True,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    clock = Clock()
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[clock])
    trainer.train()
    torch.cuda.synchronize()
    clock.times.append(time.perf_counter())
    seconds = clock.times[-1] - clock.times[WARM]
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    row = {
        "who": "HF Trainer + PEFT",
        "tokens_per_second": sum(counts[WARM:steps]) / seconds,
        "tokens_per_step": sum(counts[WARM:steps]) / (steps - WARM),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }
    print("ROW " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
