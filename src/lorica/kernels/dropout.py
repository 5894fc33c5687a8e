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
# numbers, whose products wrap around alike in torch and in Triton.
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
        return seeded(x, self.seed, self.p, self.start) if self.training and self.p > 0 else x


def kept(x: torch.Tensor, seed: torch.Tensor, p: float, start: int = 0) -> torch.Tensor:
    """Which elements of `x` dropout at rate p < 1 keeps, by their places from `start` on and by `seed`: true or false in its shape.

    The reference. Not to be compiled: each step of the hash reads the one before it twice, and a compiler that writes out what it reads
    doubles its code with each.
    """
    places = torch.arange(start, start + x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    return _hash(_hash(places + seed[0]) ^ seed[1]) >= _least(p)


def _least(p: float) -> int:
    """The least of the hashes, from -2^31 on, that are kept."""
    return round(p * (1 << 32)) - (1 << 31)


def _hash(h: torch.Tensor) -> torch.Tensor:
    h = (h ^ ((h >> 16) & 0xFFFF)) * _FIRST
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _SECOND
    return h ^ ((h >> 16) & 0xFFFF)


@torch.library.custom_op("lorica::seeded_dropout", mutates_args=())
def seeded(x: torch.Tensor, seed: torch.Tensor, p: float, start: int = 0, use: int = 0) -> torch.Tensor:
    """`x` with the elements that are not `kept` zero and the others divided by 1 - p, contiguous. Its gradient is the same of a gradient.

    Args:
        use: of no effect here; a compiler makes one of two equal calls, and keeps what comes of it from one use to the other.
    """
    if triton is None or not x.is_cuda:
        return torch.where(kept(x, seed, p, start), x * (1 / (1 - p)), 0)
    x = x.contiguous()
    out = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), _PROGRAM),)
    _seeded_kernel[grid](x, out, seed, x.numel(), start, _least(p), 1 / (1 - p), _FIRST, _SECOND, size=_PROGRAM)
    return out


@seeded.register_fake
def _(x, seed, p, start=0, use=0):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep_seed(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, seed, ctx.p, ctx.start, _ = inputs
    ctx.save_for_backward(seed)


def _seeded_gradient(ctx, g):  # type: ignore[no-untyped-def]
    return seeded(g, *ctx.saved_tensors, ctx.p, ctx.start, 1), None, None, None, None


seeded.register_autograd(_seeded_gradient, setup_context=_keep_seed)

if triton is not None:

    @triton.jit
    def _hashed(h, first, second):  # type: ignore[no-untyped-def]
        h = (h ^ ((h >> 16) & 0xFFFF)) * first
        h = (h ^ ((h >> 15) & 0x1FFFF)) * second
        return h ^ ((h >> 16) & 0xFFFF)

    @triton.jit
    def _seeded_kernel(x, out, seed, n, start, least, scale, first, second, size: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * size + tl.arange(0, size)
        h = _hashed(at + start + tl.load(seed), first, second)
        keep = _hashed(h ^ tl.load(seed + 1), first, second) >= least
        value = tl.load(x + at, mask=at < n).to(tl.float32) * scale
        tl.store(out + at, tl.where(keep, value, 0.0).to(out.dtype.element_ty), mask=at < n)


def seed_adapters(model: nn.Module, device: torch.device) -> torch.Tensor | None:
    """Make the dropout of every LoRA layer a `Seeded` one; their seeds, int32 [layers, 2] on the device that the model will train on, None
    where none has dropout."""
    from peft.tuners.lora.layer import LoraLayer

    found = [(m.lora_dropout, name) for m in model.modules() if isinstance(m, LoraLayer) for name in m.lora_dropout]
    drops = [(owner, name, owner[name].p) for owner, name in found if isinstance(owner[name], nn.Dropout)]
    if not drops:
        return None
    seeds = torch.zeros(len(drops), 2, dtype=torch.int32, device=device)
    for (owner, name, p), seed in zip(drops, seeds, strict=True):
        owner[name] = Seeded(p, seed).train(owner[name].training)
    return seeds


def begin_at(head: object, place: int) -> None:
    """Tell a module's seeded dropout that its next input begins at a place of a larger one."""
    for module in head.modules() if isinstance(head, nn.Module) else ():
        if isinstance(module, Seeded):
            module.start = place
