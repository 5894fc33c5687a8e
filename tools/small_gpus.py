"""`make docs`: writes the tables of docs/small-gpus.md from `lorica plan`'s own figures. Nothing is measured here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from lorica.composition import compose
from lorica.planning import runner
from lorica.planning.cards import CARDS, GIB
from lorica.planning.shapes import find_shape

LABELS = 4
# The column's title -> (card, what is typed on it).
COLUMNS = {
    "8 GB: RTX 3070": ("rtx3070_8gb", "trainer=gpu_8gb"),
    "12 GB: RTX 4070": ("rtx4070_12gb", "trainer=gpu"),
    "16 GB: Colab's T4": ("colab_t4", "trainer=gpu_16gb_t4"),
    "16 GB: RTX 4080": ("rtx4080_16gb", "trainer=gpu"),
    "24 GB: RTX 4090": ("rtx4090_24gb", "trainer=gpu"),
}
MISTRAL = "model=mistral_qlora data=healthcare_qa"
RUNS = {
    "RoBERTa-base, LoRA, 512 tokens": "model=roberta_lora data=ag_news",
    "RoBERTa-base, every weight, 512": "model=roberta_full data=ag_news",
    "Qwen2.5-1.5B, 16-bit LoRA, 1,024": "model=mistral_lora data=healthcare_qa model.base=Qwen/Qwen2.5-1.5B",
    "Mistral-7B, 4-bit, 1,024": MISTRAL,
    "the same, `model.train_layers=last_8`": f"{MISTRAL} model.train_layers=last_8",
    "Mistral-7B, 4-bit, 4,096": f"{MISTRAL} model.max_length=4096 trainer.tokens_per_batch=4096",
    "Llama-3.1-8B, 4-bit, 1,024": f"{MISTRAL} model.base=meta-llama/Llama-3.1-8B",
    "Qwen2.5-14B, 4-bit, 1,024": f"{MISTRAL} model.base=Qwen/Qwen2.5-14B",
    "Mistral-7B, 16-bit LoRA, 1,024": "model=mistral_lora data=healthcare_qa",
}
FIXED = "trainer.fit=false"
KEPT = f"{FIXED} trainer.gradient_checkpointing=false"
LEVERS = {
    "nothing: 4,096 tokens a micro-batch, every activation kept": (KEPT, "—"),
    "`trainer.gradient_checkpointing=true`": (
        f"{FIXED} trainer.gradient_checkpointing=true",
        "time: layers run twice; null does it for as few as needed",
    ),
    "`trainer.gradient_checkpointing=offload`": (
        f"{FIXED} trainer.gradient_checkpointing=offload",
        "the same, and copies to host memory and back",
    ),
    "`trainer.tokens_per_batch=1024 trainer.accumulate_grad_batches=4`": (
        f"{KEPT} trainer.tokens_per_batch=1024 trainer.accumulate_grad_batches=4",
        "shorter products; the loss is that of the large batch",
    ),
    "`trainer.offload_embeddings=true`": (f"{KEPT} trainer.offload_embeddings=true", "rows are read over the bus, about 1 %"),
    "`model.train_layers=last_8`": (f"{KEPT} model.train_layers=last_8", "learning: the first 24 layers stay as they are"),
    "`model.lora.r=8`": (f"{KEPT} model.lora.r=8", "learning: half the adapters' weights"),
    "`trainer=gpu_8gb`": ("trainer=gpu_8gb", "what its keys cost; what is free keeps activations"),
}


def planned(typed: str, card: str) -> runner.Plan:
    """The plan of rows that are all as long as `model.max_length` lets them be."""
    config = compose("train", typed.split())
    return runner.make(config, CARDS[card], find_shape(config.model, LABELS), None)


def cell(plan: runner.Plan) -> str:
    """GiB at the peak, layers that are computed again, tokens a second; or no."""
    if not plan.fit.fits:
        return "no"
    job = plan.fit.job
    again = f", {job.recomputed} of {job.learning} again" if job.recomputed else ""
    return f"{plan.fit.peak / GIB:.1f}{again}{', offload' if job.offload else ''}; {float(f'{plan.pace.tokens:.2g}'):,.0f}/s"


def fits() -> str:
    """What fits on which card."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    lines.append(f"| | {' | '.join(f'`{trainer}`' for _, trainer in COLUMNS.values())} |")
    for name, typed in RUNS.items():
        cells = []
        for card, trainer in COLUMNS.values():
            cells.append(cell(planned(f"{trainer} {typed}", card)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def levers() -> str:
    """What each setting saves by itself, and what it costs."""
    lines = ["| set | GiB at the peak | tokens/s | what it costs |", "|---|---|---|---|"]
    for name, (typed, price) in LEVERS.items():
        plan = planned(f"{MISTRAL} {typed}", "rtx3070_8gb")
        lines.append(f"| {name} | {plan.fit.peak / GIB:.1f} | {float(f'{plan.pace.tokens:.2g}'):,.0f} | {price} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as the code gives them now."""
    for name, table in (("fits", fits()), ("levers", levers())):
        text = re.sub(rf"(<!-- {name} -->\n).*?(?=<!-- end -->)", lambda found, table=table: f"{found[1]}{table}\n", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text("utf-8")), "utf-8")
