"""Cross-entropy after an output head, in tiles: there is never a tensor of all places x the vocabulary.

A tile's logits live while its losses are computed, and again, computed anew, while its gradients are: memory for one matrix product more.
The head may be anything that maps [n, H] to [n, V]: a plain layer, one with an adapter, one under training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lorica.kernels.dropout import begin_at

TILE_ELEMENTS = 1 << 25  # logits of a tile in training: 128 MiB in fp32
EVALUATION_ELEMENTS = 1 << 23  # in evaluation, which is not to take more memory than training


def head_cross_entropy(
    head: Callable[[torch.Tensor], torch.Tensor], vocabulary: int, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """-log softmax(head(hidden))[target] in fp32 [S].

    Args:
        hidden: [S, H], at the places whose next token is learnt. targets: int64 [S].
    """
    rows = tile_rows(vocabulary) if torch.is_grad_enabled() else max(1, EVALUATION_ELEMENTS // vocabulary)
    if hidden.shape[0] <= rows:
        return _losses(head, hidden, targets)
    tiles = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_losses(head, h, t) for h, t in tiles])
    random = draws(head)
    size = rows * hidden.shape[1]
    run = functools.partial(checkpoint, _tile, head, use_reentrant=False, preserve_rng_state=random)
    return torch.cat([run(h, t, i * size) for i, (h, t) in enumerate(tiles)])


def tile_rows(vocabulary: int) -> int:
    """Places of a tile in training."""
    return max(1, TILE_ELEMENTS // vocabulary)


def draws(module: Any) -> bool:
    """Whether a module draws random numbers in training: it has dropout, as a layer or as a rate that its forward reads."""
    return isinstance(module, torch.nn.Module) and any(map(_drops, module.modules()))


def _drops(module: torch.nn.Module) -> bool:
    of_config = drop_rates(getattr(module, "config", None))  # some of transformers' modules read theirs from there
    return any(rate > 0 for name, rate in {**of_config, **drop_rates(module)}.items() if "classifier" not in name)


def drop_rates(owner: Any) -> dict[str, float]:
    """Rates of dropout by their names: `p` of a dropout layer; numbers of another module (OPT's dropout, Mistral's attention_dropout)."""
    if isinstance(owner, torch.nn.modules.dropout._DropoutNd):
        return {"p": owner.p}
    return {name: rate for name, rate in getattr(owner, "__dict__", {}).items() if "drop" in name and isinstance(rate, float)}


def _losses(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def _tile(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor, place: int) -> torch.Tensor:
    """`_losses` of a tile whose first element is at a place of all."""
    begin_at(head, place)
    try:
        return _losses(head, hidden, targets)
    finally:
        begin_at(head, 0)
