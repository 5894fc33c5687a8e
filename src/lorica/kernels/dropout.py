"""Dropout with masks that are cheap to have, on a CPU and on a GPU. The same `torch.manual_seed` gives the same masks.

torch draws a CPU's dropout masks one number at a time on one thread: a fifth of a small encoder's training step. Here each element
takes 16 bits of numpy's SFC64, which is seeded by a draw from torch's generator, also where a checkpointed layer is run again. The
drop rate is rounded to 1/65,536 and the kept values are scaled by exactly that rate.

On an NVIDIA GPU an adapter's mask is a hash of each element's place and of two numbers, drawn anew for each micro-step (`Seeded`).
Nothing is kept of it: backward, and a layer that is computed again, compute it again, compiled and captured as all else. Elsewhere
torch's own dropout is used.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without
    triton = None

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


# ------------------------------------------------------------------------------------------------------- masks that follow from a seed

# Two rounds of a 32-bit integer hash with little bias (lowbias32 of github.com/skeeto/hash-prospector), a seed before each. As signed
# numbers, whose products wrap around alike in torch and in Triton; nothing is multiplied before a seed was added, for a compiler would
# reckon with places as with indices, which don't wrap.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_PROGRAM = 1024  # elements


class Seeded(nn.Module):
    """Dropout by a mask that follows from a seed.

    Args:
        p: the rate. seed: int32 [2] on the device, which someone sets before each use in training.

    Attributes:
        start: the place of an input's first element, where inputs are tiles of a larger one.
    """

    def __init__(self, p: float, seed: torch.Tensor) -> None:
        super().__init__()
        self.p, self.seed, self.start = p, seed, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(kept(x, self.seed, self.p, self.start), x / (1 - self.p), 0) if self.training and self.p > 0 else x


def kept(x: torch.Tensor, seed: torch.Tensor, p: float, start: int = 0) -> torch.Tensor:
    """Which elements of `x` dropout at rate p < 1 keeps, by their places from `start` on and by `seed`: true or false in its shape."""
    least = round(p * (1 << 32)) - (1 << 31)  # of the hashes that are kept
    if triton is not None and x.is_cuda and not torch.compiler.is_compiling():
        out = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        grid = (triton.cdiv(x.numel(), _PROGRAM),)
        _kept_kernel[grid](out, seed, x.numel(), start, least, _FIRST, _SECOND, size=_PROGRAM)
        return out
    places = torch.arange(start, start + x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    return _hash(_hash(places + seed[0]) ^ seed[1]) >= least


def _hash(h: torch.Tensor) -> torch.Tensor:
    h = (h ^ ((h >> 16) & 0xFFFF)) * _FIRST
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _SECOND
    return h ^ ((h >> 16) & 0xFFFF)


if triton is not None:

    @triton.jit
    def _hashed(h, first, second):  # type: ignore[no-untyped-def]
        h = (h ^ ((h >> 16) & 0xFFFF)) * first
        h = (h ^ ((h >> 15) & 0x1FFFF)) * second
        return h ^ ((h >> 16) & 0xFFFF)

    @triton.jit
    def _kept_kernel(out, seed, n, start, least, first, second, size: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * size + tl.arange(0, size)
        h = _hashed(at + start + tl.load(seed), first, second)
        tl.store(out + at, _hashed(h ^ tl.load(seed + 1), first, second) >= least, mask=at < n)


def seed_adapters(model: nn.Module) -> torch.Tensor | None:
    """Make the dropout of every LoRA layer a `Seeded` one; their seeds, int32 [layers, 2], None where none has dropout."""
    from peft.tuners.lora.layer import LoraLayer

    found = [(m.lora_dropout, name) for m in model.modules() if isinstance(m, LoraLayer) for name in m.lora_dropout]
    drops = [(owner, name, owner[name].p) for owner, name in found if isinstance(owner[name], nn.Dropout)]
    if not drops:
        return None
    seeds = torch.zeros(len(drops), 2, dtype=torch.int32, device=next(model.parameters()).device)
    for (owner, name, p), seed in zip(drops, seeds, strict=True):
        owner[name] = Seeded(p, seed).train(owner[name].training)
    return seeds


def begin_at(head: object, place: int) -> None:
    """Tell a module's seeded dropout that its next input begins at a place of a larger one."""
    for module in head.modules() if isinstance(head, nn.Module) else ():
        if isinstance(module, Seeded):
            module.start = place
