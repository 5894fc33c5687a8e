"""Steps whose gradient is NaN or infinite are not taken: no such number gets into weights or into the optimiser's state."""

from __future__ import annotations

from typing import Any

import torch


class SkipSteps:
    """Watches the gradient of each step.

    The host does not wait for a GPU to tell. Fused AdamW leaves such a step out by itself when it is told on the device (torch's
    `found_inf`); other optimisers on a GPU are given zeros for such a gradient, so that weights move by what is left of the momentum
    only. On a CPU the step is left out. Under an fp16 scaler, which skips by itself, steps are only counted.

    Attributes:
        skipped: steps so far. in_a_row: of these the last ones without a good one after them.
    """

    def __init__(self) -> None:
        self.skipped = self.in_a_row = 0
        self._unread: list[tuple[int, torch.Tensor]] = []
        self._held: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def before_update(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, step: int, scaled: bool) -> None:
        """Look at a step's gradient norm.

        Args:
            step: the optimiser step under way, from 1.
        """
        bad = (~torch.isfinite(norm)).float()
        self._unread.append((step, bad))
        if scaled:
            return
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            return
        found = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if norm.is_cuda:
            for _, grad in found:
                grad.masked_fill_(bad.bool(), 0.0)
        elif bool(bad):
            self._held = found
            for p, _ in found:
                p.grad = None  # optimisers pass over weights without a gradient

    def after_update(self) -> None:
        """Give the gradients back, for they may be what layers add to."""
        for p, grad in self._held:
            p.grad = grad
        self._held = []

    def read(self) -> list[int]:
        """The steps that were skipped since the last reading. Waits for the device."""
        if not self._unread:
            return []
        flags = torch.stack([bad for _, bad in self._unread]).tolist()
        steps = [step for (step, _), bad in zip(self._unread, flags, strict=True) if bad]
        for bad in flags:
            self.in_a_row = self.in_a_row + 1 if bad else 0
        self.skipped += len(steps)
        self._unread = []
        return steps

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
