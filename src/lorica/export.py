"""`lorica merge`: adapter and base as one plain transformers model. A 4-bit base is merged as its dequantised weights, which are
what the adapter was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorica.config import ConfigError, MergeConfig, TrainerConfig
from lorica.durable import replaced_folder, write_json
from lorica.runs import TASK_FILE, read_task
from lorica.screen import Screen, quiet_libraries

quiet_libraries()

import torch  # noqa: E402  (after the libraries' noise is off)

from lorica import calibration, hardware  # noqa: E402
from lorica.data import token_contract  # noqa: E402
from lorica.models.trained import load_trained  # noqa: E402


def run(config: MergeConfig) -> int:
    """Write the merged model.

    Raises:
        ConfigError: not an adapter; its base can't be had.
    """
    screen = Screen()
    source = Path(config.run).expanduser().resolve()  # outputs/latest may point elsewhere by the time of writing
    target = Path(config.output).expanduser() if config.output else source / "merged"
    check_target(target)
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
        token_contract.write(folder, token_contract.made(trained.task, trained.tokenizer))
        if trained.calibration is not None:
            calibration.write(folder, trained.calibration)
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


def check_target(folder: Path) -> None:
    """Refuse to replace a folder that an earlier merge did not write.

    Raises:
        ConfigError: it holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()) and read_task(folder).get("weights") != "merged":
        raise ConfigError("output", folder, "is a folder with other files, which would be replaced", f"output={folder / 'merged'}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError("output", folder, "is a file")


def merge(model: Any) -> Any:
    """A PEFT model on plain weights as one plain model: W + scaling * B A, computed in fp32.

    An output head that shares its weight with the embeddings and has an adapter gets a weight of its own: the adapter changed the
    head alone.
    """
    model = model.float()
    whole = model.get_base_model()
    head = whole.get_output_embeddings()
    adapted = head is not None and hasattr(head, "base_layer")
    if adapted and head.base_layer.weight is whole.get_input_embeddings().weight:
        head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone(), requires_grad=False)
        whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload(safe_merge=True)
