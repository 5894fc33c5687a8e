"""`trainer.on_oom=halve`: a micro-batch that does not fit into the GPU's memory is run in parts, one after the other.

The loss is a sum over a window's tokens divided by their number in the whole window, so that parts add up to what the whole
would have given, up to rounding and to dropout's masks.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lorica.models.module import LoricaModule


class Halving:
    """Runs a module's micro-batches, each forward and backward, in as many parts as have been found to fit.

    When one does not fit, the gradients of its window are cleared and the window is run again from its beginning in parts half as
    large; later windows, and a resumed run, keep to these.

    Args:
        split: a micro-batch into so many parts, on the device; fewer where it has not so many rows.
        seed: sets the random numbers of a micro-step. accumulate: micro-steps of a window. arithmetic: a context for forwards.
        changed: called with the number of parts when there are more.
    """

    def __init__(
        self,
        split: Callable[[dict[str, Any], int], list[dict[str, Any]]],
        seed: Callable[[int], None],
        accumulate: int,
        arithmetic: Callable[[], AbstractContextManager[Any]],
        changed: Callable[[int], None],
        parts: int = 1,
    ) -> None:
        self.split, self.seed, self.accumulate, self.arithmetic, self.changed = split, seed, accumulate, arithmetic, changed
        self.parts = parts
        self._window: list[tuple[int, dict[str, Any]]] = []
        self._accounts: tuple[Any, ...] = ()

    def run(self, module: LoricaModule, batch: dict[str, Any], micro_step: int) -> None:
        """Add a micro-batch's gradients to the window's.

        Raises:
            torch.OutOfMemoryError: single rows do not fit.
        """
        if micro_step % self.accumulate == 0:
            self._window, self._accounts = [], module.accounts()
        self._window.append((micro_step, batch))
        todo = self._window[-1:]
        while not self._fit(module, todo):
            todo = self._window
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.zero_()
            module.put_accounts(self._accounts)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.parts *= 2
            self.changed(self.parts)

    def _fit(self, module: LoricaModule, micro_batches: list[tuple[int, dict[str, Any]]]) -> bool:
        try:
            for micro_step, batch in micro_batches:
                self.seed(micro_step)
                for part in self.split(batch, self.parts) if self.parts > 1 else [batch]:
                    with self.arithmetic():
                        total = module.loss_sum(part)
                        loss = total * part["weight"] / self.accumulate
                    loss.backward()  # type: ignore[no-untyped-call]
                    module.account(total.detach(), part)
        except torch.OutOfMemoryError:
            if all(self.parts >= len(batch["rows"]) for _, batch in micro_batches):
                raise
            return False
        return True
