"""QLoRA in another trainer, on the token ids that Lorica trains on.

`python -m benchmarks.qlora_peer hf|trl|unsloth MODEL IDS.jsonl SETTINGS-JSON`; settings: steps, checkpointing, batch (rows, padded
to the longest), accumulate, pack (tokens of a packed row; null: not packed). r=16 on the seven linear kinds, NF4 with double
quantisation, bf16, paged 8-bit AdamW. Prints one JSON line: tokens/s over tokens that are not padding, peak memory, losses.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # padded batches of uneven sizes fragment memory
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
os.environ["WANDB_MODE"] = "disabled"
if sys.argv[1:2] == ["unsloth"]:
    import unsloth  # noqa: F401  (patches the others, so it comes first)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.peer_clock import GPU, WARM, Clock, Counted, report, run

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPARE = 8  # steps' worth of rows beyond those that are trained: packing leaves gaps
LONGEST = 1024


def read_rows(path: str, settings: dict[str, Any]) -> list[dict[str, list[int]]]:
    """As many rows as the steps need."""
    rows: list[dict[str, list[int]]] = []
    have, steps = 0, settings["steps"] + SPARE
    need = steps * (settings["pack"] or settings["batch"] * settings["accumulate"])  # tokens where they are packed, else rows
    with Path(path).open() as file:
        for line in file:
            rows.append(json.loads(line))
            have += len(rows[-1]["input_ids"]) if settings["pack"] else 1
            if have >= need:
                break
    return rows


def load_plain(path: str) -> Any:
    """The base in NF4; in fp32 on a CPU, where it is only tried out."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if GPU else torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=nf4,
        dtype=torch.bfloat16 if GPU else torch.float32,
        device_map={"": 0 if GPU else "cpu"},
        attn_implementation="sdpa",
    )


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What every peer's arguments have."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": settings["steps"],
        "per_device_train_batch_size": 1 if settings["pack"] else settings["batch"],
        "gradient_accumulation_steps": settings["accumulate"],
        "learning_rate": 2e-4,
        "warmup_steps": 1,
        "optim": "paged_adamw_8bit" if GPU else "adamw_torch",
        "bf16": GPU,
        "gradient_checkpointing": settings["checkpointing"],
        "dataloader_drop_last": True,
        "logging_steps": 5,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def lora() -> dict[str, Any]:
    """r=16, alpha 16, no dropout, on the linear layers."""
    return {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": LINEAR, "bias": "none"}


def pad(pad_id: int) -> Any:
    """A collator that pads to the longest of a batch."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in rows)

        def column(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([v + [filler] * (longest - len(v)) for v in values])

        ids = [r["input_ids"] for r in rows]
        return {
            "input_ids": column(ids, pad_id),
            "labels": column([r["labels"] for r in rows], -100),
            "attention_mask": column([[1] * len(i) for i in ids], 0),
        }

    return collate


def hf(path: str, rows: list[dict[str, Any]], settings: dict[str, Any], clock: Clock) -> tuple[Any, Counted]:
    """HF Trainer + PEFT, with Liger where it is installed."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    model = prepare_model_for_kbit_training(load_plain(path), use_gradient_checkpointing=settings["checkpointing"])
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(**lora(), task_type="CAUSAL_LM"))
    count = Counted(pad(0))
    args = TrainingArguments(**arguments(settings), remove_unused_columns=False, use_liger_kernel=settings["liger"])
    return Trainer(model=model, args=args, train_dataset=rows, data_collator=count, callbacks=[clock]), count


def sft(who: str, path: str, rows: list[dict[str, Any]], settings: dict[str, Any], clock: Clock) -> tuple[Any, Counted]:
    """TRL's SFTTrainer, with Liger where it is installed; or the same class as Unsloth patches it, on Unsloth's model."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    pack = settings["pack"]
    args: dict[str, Any] = {**arguments(settings), "max_length": pack or LONGEST, "packing": bool(pack)}
    if who == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            path, max_seq_length=pack or LONGEST, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        checkpointing = "unsloth" if settings["checkpointing"] else False
        model = FastLanguageModel.get_peft_model(model, **lora(), use_gradient_checkpointing=checkpointing)
        more: dict[str, Any] = {}
    else:
        from peft import LoraConfig

        model, tokenizer = load_plain(path), AutoTokenizer.from_pretrained(path)
        args |= {"use_liger_kernel": settings["liger"], "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        more = {"peft_config": LoraConfig(**lora(), task_type="CAUSAL_LM")}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**args), train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock], **more
    )
    count = trainer.data_collator = Counted(trainer.data_collator)
    return trainer, count


def main(who: str, path: str, ids: str, given: str) -> None:
    """Train and print."""
    settings: dict[str, Any] = {"checkpointing": False, "batch": 1, "accumulate": 1, "pack": None}
    settings |= {"liger": GPU and bool(find_spec("liger_kernel")), **json.loads(given)}
    rows, clock, steps = read_rows(ids, settings), Clock(), settings["steps"]
    trainer, count = hf(path, rows, settings, clock) if who == "hf" else sft(who, path, rows, settings, clock)
    seconds, figures = run(trainer, clock, steps)
    tokens = sum(count.counts[WARM * settings["accumulate"] : steps * settings["accumulate"]])
    report({"tokens_per_second": tokens / seconds, "tokens_per_step": tokens / (steps - WARM), **figures, "settings": settings})


if __name__ == "__main__":
    main(*sys.argv[1:5])
