"""Dropout with masks that a CPU draws fast.

torch draws a CPU's dropout masks one number at a time on one thread: a fifth of a small encoder's training step. Here each element
takes 16 bits of numpy's SFC64, which is seeded by a draw from torch's generator: the same `torch.manual_seed` gives the same masks,
also where a checkpointed layer is run again. The drop rate is rounded to 1/65,536 and the kept values are scaled by exactly that rate.
On other devices torch's own dropout is used.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

LEVELS = 1 << 16


def covers(x: torch.Tensor) -> bool:
    """Whether masks for `x` are drawn here."""
    return x.device.type == "cpu" and x.is_floating_point()


def mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """0 with probability p, else 1 / (1 - p): of the shape and type of `x`, contiguous."""
    dropped = round(p * LEVELS)
    if dropped >= LEVELS:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    seed = int(torch.randint(1 << 62, ()))
    words = np.random.SFC64(seed).random_raw(-(-x.numel() // 4))
    draws = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
    return (draws >= dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


def _forward(module: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    if module.training and module.p > 0 and covers(x):
        return x * mask(x, module.p)
    return nn.functional.dropout(x, module.p, module.training)


def install(model: nn.Module) -> int:
    """Give every dropout layer of the model this forward; return how many there are."""
    layers = [m for m in model.modules() if type(m) is nn.Dropout and not m.inplace]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)
