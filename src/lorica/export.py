"""`lorica merge`: adapter and base as one plain transformers model. A 4-bit base is merged as its dequantised weights, which are
what the adapter was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorica.config import ConfigError, MergeConfig, TrainerConfig
from lorica.runs import TASK_FILE, replaced_folder, write_json
from lorica.screen import Screen, quiet_libraries

quiet_libraries()

import torch  # noqa: E402  (after the libraries' noise is off)

from lorica import hardware  # noqa: E402
from lorica.models.trained import load_trained  # noqa: E402


def run(config: MergeConfig) -> int:
    """Write the merged model.

    Raises:
        ConfigError: not an adapter; its base can't be had.
    """
    screen = Screen()
    source = Path(config.run).expanduser()
    target = Path(config.output).expanduser() if config.output else source / "merged"
    machine = hardware.choose(TrainerConfig(accelerator=config.accelerator, devices=1))
    trained = load_trained(source, machine.device, config.base, dequantize=True)
    if trained.adapter is None:
        raise ConfigError("run", config.run, "is a whole model already; there is nothing to merge", "use it as it is")
    quantized = bool(trained.task.get("quantization"))
    kept = torch.bfloat16 if quantized else getattr(torch, trained.task.get("dtype") or "float32")
    dtype = kept if config.dtype == "auto" else getattr(torch, config.dtype)
    merged = merge(trained.model).to(dtype)
    with replaced_folder(target) as folder:
        merged.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        write_json(
            folder / TASK_FILE,
            {
                **trained.task,
                "weights": "merged",
                "quantization": None,
                "dtype": str(dtype).removeprefix("torch."),
                "merged_from": str(trained.adapter),
            },
        )
    how = "onto the dequantised 4-bit base" if quantized else "into its base"
    screen.print(f"merged {how}, {str(dtype).removeprefix('torch.')}: {target}")
    kind = "text-generation" if trained.task["task"] == "causal_lm" else "text-classification"
    screen.print(f"next   python -c \"from transformers import pipeline; print(pipeline('{kind}', '{target}')('...'))\"")
    return 0


def merge(model: Any) -> Any:
    """A PEFT model on plain weights as one plain model: W + scaling * B A, computed in fp32."""
    return model.float().merge_and_unload(safe_merge=True)
