"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorica.config import OptimizerConfig


def effective_name(name: str, device: torch.device) -> tuple[str, str]:
    """(optimiser that the device can run, why it is another than asked for or "")."""
    if name in ("adamw_8bit", "paged_adamw_8bit") and device.type != "cuda":
        return "adamw", f"optimizer.name={name} needs an NVIDIA GPU; adamw is used"
    return name, ""


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters; biases and norms (one dimension) are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for _, p in named:
        if p.requires_grad:
            (decayed if p.ndim > 1 else plain).append(p)
    return [g for g in ({"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}) if g["params"]]


def build_optimizer(module: nn.Module, config: OptimizerConfig, name: str, fused: bool) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters.

    Args:
        name: after `effective_name`.
        fused: one kernel for all parameters; not possible under an fp16 gradient scaler with clipping.
    """
    assert config.lr is not None
    groups = parameter_groups(module.named_parameters(), config.weight_decay)
    betas = (config.betas[0], config.betas[1])
    if name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    import bitsandbytes.optim

    cls = bitsandbytes.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = cls(groups, lr=config.lr, betas=betas, eps=config.eps)
    return optimizer


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Steps from 0 to the peak learning rate."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total_steps)
    return min(total_steps, round((config.warmup_ratio or 0.0) * total_steps))


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimizerConfig, total_steps: int) -> Any:
    """transformers' schedule of that name, stepped once an optimiser step."""
    from transformers import get_scheduler

    warmup = warmup_steps(config, total_steps) if config.lr_scheduler_type != "constant" else None
    return get_scheduler(config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
