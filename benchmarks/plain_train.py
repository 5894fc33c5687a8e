"""train.py on the plain path, to compare with: transformers' model, PEFT's own LoRA layers and bitsandbytes' own 4-bit weights, nothing
compiled, padded batches, logits at every position. Lorica's are the rows of each step, the optimiser and the schedule."""

from __future__ import annotations

import sys

from lorica.cli import main
from lorica.kernels import lora_linear
from lorica.models.module import CausalLMModule

SETTINGS = (
    "model.attn_implementation=sdpa",
    "trainer.compile=false",
    "trainer.resident_weights=false",
    "trainer.cuda_graphs=false",
    "trainer.gradient_checkpointing=false",
)


def whole_logits(self: CausalLMModule) -> bool:
    """As for architectures whose head is followed by more: the model's own forward."""
    return True


if __name__ == "__main__":
    lora_linear.install = lambda model: 0
    CausalLMModule._scales_logits = whole_logits  # type: ignore[method-assign]
    main("train", [*sys.argv[1:], *SETTINGS])
