"""Parameter groups, optimisers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lorica.config import OptimizerConfig

BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit states
LONGEST = 1 << 30  # elements of a joined parameter: bitsandbytes counts them in 32 bits
SMALL = 4096  # elements below which it keeps 32-bit states


def effective_name(name: str, device: torch.device, roomy: bool = False) -> tuple[str, str]:
    """(optimiser that the device can run, why it is another than asked for or "").

    Args:
        roomy: its memory is not short: paged states, for which the host waits at each step, are not needed.
    """
    if name == "paged_adamw_8bit" and device.type == "cuda" and roomy:
        return "adamw_8bit", f"optimizer.name={name}: the GPU has room, so its states stay there (adamw_8bit, the same numbers)"
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


def end_to_end(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The same weights as a few long parameters, of which the given ones become views, gradients too: one kernel updates, clips or
    clears them all, where hundreds of adapters would take hundreds.

    Each begins at a multiple of BLOCK elements, so that 8-bit states are the same as those of single weights; those that are too
    small for 8 bits (bitsandbytes' min_8bit_size) stay alone. Gradients must be cleared in place from then on.
    """
    alone = [p for p in parameters if p.numel() < SMALL]
    long: list[nn.Parameter] = []
    for dtype in sorted({p.dtype for p in parameters if p.numel() >= SMALL}, key=str):
        group: list[nn.Parameter] = []
        for p in [p for p in parameters if p.numel() >= SMALL and p.dtype == dtype]:
            if group and sum(q.numel() for q in group) + p.numel() > LONGEST:
                long.append(_joined(group))
                group = []
            group.append(p)
        long.append(_joined(group))
    return long + alone


def _joined(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    begins = np.cumsum([0, *(-(-p.numel() // BLOCK) * BLOCK for p in parameters)]).tolist()
    whole = nn.Parameter(torch.zeros(begins[-1], dtype=parameters[0].dtype, device=parameters[0].device))
    places = [slice(begin, begin + p.numel()) for p, begin in zip(parameters, begins[:-1], strict=True)]
    for p, place in zip(parameters, places, strict=True):
        p.data = whole.data[place].view_as(p).copy_(p.data)
    whole.grad = torch.zeros_like(whole)  # not before the old weights are gone
    for p, place in zip(parameters, places, strict=True):
        p.grad = whole.grad[place].view_as(p)
    return whole


def build_optimizer(module: nn.Module, config: OptimizerConfig, name: str, fused: bool, joined: bool) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters.

    Args:
        name: after `effective_name`.
        fused: one kernel for all parameters; not possible under an fp16 gradient scaler with clipping.
        joined: lay the weights `end_to_end`.
    """
    assert config.lr is not None
    groups = parameter_groups(module.named_parameters(), config.weight_decay)
    if joined:
        groups = [{**g, "params": end_to_end(g["params"])} for g in groups]
    betas = (config.betas[0], config.betas[1])
    if name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    import bitsandbytes.optim

    cls = bitsandbytes.optim.PagedAdamW8bit if name == "paged_adamw_8bit" else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = cls(groups, lr=config.lr, betas=betas, eps=config.eps)
    return optimizer


def state_bytes(module: nn.Module, name: str) -> int:
    """Bytes that the optimiser will keep for a module's trainable weights: two moments each."""
    each = {"sgd": 0, "adamw": 8}.get(name, 2)
    return each * sum(p.numel() for p in module.parameters() if p.requires_grad)


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
