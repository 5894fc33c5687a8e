"""The Lightning modules: the window-exact loss, its account, optimisers, and a state of trainable weights only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule

from lorica.config import OptimizerConfig
from lorica.models.captured import CapturedSteps
from lorica.models.causal_lm import CausalLM
from lorica.models.forward import Forward
from lorica.models.halving import Halving
from lorica.models.optimizers import build_optimizer, build_schedule, effective_name
from lorica.models.sequence_classifier import SequenceClassifier
from lorica.models.skipping import SkipSteps


class LoricaModule(Forward, LightningModule):
    """A model under training.

    Args:
        model: transformers' model, with PEFT's adapters or whole.
        total_steps: optimiser steps of the run, for the schedule.
        fused: see `optimizers.build_optimizer`.
    """

    strict_loading = False  # a checkpoint holds the trainable weights; the others are the base's

    def __init__(self, model: Any, optimizer: OptimizerConfig, total_steps: int, fused: bool = True) -> None:
        super().__init__(model)
        self.optimizer_config, self.total_steps, self.fused = optimizer, total_steps, fused
        self.loss_account: torch.Tensor | None = None  # summed loss since it was last read, on the device
        self.supervised_account = 0
        self.left_out: torch.Tensor | None = None  # of these, tokens whose loss was no number; on the device
        self.capture: Callable[[], CapturedSteps | None] | None = None  # called when training starts
        self.captured: CapturedSteps | None = None
        self.captured_peak = 0  # bytes in use at most while steps were captured and replayed
        self.roomy = False  # see `effective_name`
        self.joined = False  # the trained weights lie end to end, and so do their gradients
        self.skipping = SkipSteps()
        self.halving: Halving | None = None  # runs micro-batches in parts where they don't fit
        self._to_run: tuple[dict[str, Any], int] | None = None  # a micro-batch whose forward is left to `backward`

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        """One micro-batch's share of its window's loss.

        The batch's weight is ranks x accumulate / supervised tokens of the window: Lightning divides by `accumulate` and DDP by
        the ranks, which leaves (sum over the window) / (its supervised tokens), exactly (pytorch-lightning#20350).
        """
        if self.halving is not None or (self.captured is not None and self.captured.covers(batch)):
            self._to_run = batch, batch_idx
            return torch.zeros((), device=self.device)  # the loss is known when `backward` has run both
        total = self.loss_sum(batch)
        self.account(total.detach(), batch)
        loss: torch.Tensor = total * batch["weight"]
        return loss

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of a micro-step; a captured one, or one that may have to be split, is run here, forward and all."""
        if self._to_run is None:
            loss.backward(*args, **kwargs)
            return
        (batch, number), self._to_run = self._to_run, None
        if self.captured is not None and self.captured.covers(batch):
            self.account(self.captured.replay(batch), batch)
        else:
            assert self.halving is not None
            self.halving.run(self, batch, number)

    def accounts(self) -> tuple[Any, ...]:
        """What was counted since the last reading, to be put back when a window is run again."""
        return self.loss_account, self.left_out, self.supervised_account

    def put_accounts(self, accounts: tuple[Any, ...]) -> None:
        """See `accounts`."""
        self.loss_account, self.left_out, self.supervised_account = accounts

    def account(self, total: torch.Tensor, batch: dict[str, Any]) -> None:
        """Count a micro-batch's summed loss."""
        finite = torch.isfinite(total)
        own = torch.where(finite, total, 0.0) * (batch["weight"] > 0)  # a rank without rows in this micro-step runs one for company
        lost = (~finite).float() * batch["count"]["supervised"]
        self.loss_account = own if self.loss_account is None else self.loss_account + own
        self.left_out = lost if self.left_out is None else self.left_out + lost
        self.supervised_account += batch["count"]["supervised"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """In place where gradients lie end to end, or are what captured steps add to. Lightning calls it before training and validation."""
        super().zero_grad(set_to_none and not self._fixed_gradients)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self._fixed_gradients)

    @property
    def _fixed_gradients(self) -> bool:
        return self.joined or self.captured is not None

    def on_train_start(self) -> None:
        """Capture what is to be captured: not before, since Lightning frees cuBLAS's workspaces when it sets up a fit."""
        if self.capture is not None:
            self.captured = self.capture()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.evaluate(batch)

    def read_loss(self) -> float:
        """Mean loss a supervised token since the last reading, over all ranks; what was no number is left out. Waits for the device."""
        total, supervised = self._accounts()
        self.loss_account, self.left_out, self.supervised_account = None, None, 0
        return float(total / max(1.0, supervised))

    def _accounts(self) -> list[float]:
        """(summed loss, supervised tokens) since the last reading, over all ranks."""
        precise = torch.float32 if self.device.type == "mps" else torch.float64  # Apple GPUs have no fp64
        total = self.loss_account if self.loss_account is not None else torch.zeros((), device=self.device)
        supervised = torch.tensor(float(self.supervised_account), device=self.device, dtype=precise)
        both = torch.stack([total.to(precise), supervised - self.left_out if self.left_out is not None else supervised])
        summed: list[float] = self.trainer.strategy.reduce(both, reduce_op="sum").tolist()  # type: ignore[union-attr]
        return summed

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The loss since the last record goes with the state, so that the next record is of the same steps; of all ranks."""
        checkpoint["loss_account"] = self._accounts()
        checkpoint["skipped_steps"] = self.skipping.state_dict()
        checkpoint["parts"] = self.halving.parts if self.halving is not None else 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipping.load_state_dict(checkpoint["skipped_steps"])
        total, supervised = checkpoint["loss_account"]
        if supervised and self.trainer.is_global_zero:
            self.loss_account, self.supervised_account = torch.tensor(total, dtype=torch.float32, device=self.device), int(supervised)

    def on_train_end(self) -> None:
        """Let go of what only training needs, or the test would find less memory than training had."""
        if self.captured is not None:
            self.captured_peak = self.captured.peak()
        self.captured = self.capture = None
        self.trainer.strategy.optimizers, self.trainer.strategy.lr_scheduler_configs = [], []
        for p in self.parameters():
            p.grad = None

    def cpu(self) -> Self:
        """Stays where it is: Lightning calls it when a fit ends, and gigabytes of frozen weights would go to host memory and back."""
        return self

    def joins(self) -> bool:
        """Whether the trained weights are to lie end to end: on one GPU. Several ranks reduce gradients by layers."""
        return self.device.type == "cuda" and self.trainer.world_size == 1

    def configure_optimizers(self) -> Any:
        name, _ = effective_name(str(self.optimizer_config.name), self.device, self.roomy)
        self.joined = self.joins()
        optimizer = build_optimizer(self, self.optimizer_config, name, self.fused, self.joined)
        schedule = build_schedule(optimizer, self.optimizer_config, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the norm, and see whether it is a number.

        Lightning refuses to clip for fused optimisers under autocast; without a gradient scaler there is no reason to.
        """
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.skipping.before_update(optimizer, norm, self.trainer.global_step + 1, scaled)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.skipping.after_update()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trainable weights only: the frozen base is loaded from its own files."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state_dict: Any, strict: bool = False, assign: bool = False) -> Any:
        """Put trainable weights back.

        Raises:
            KeyError: when the state is not that of this model's trainable weights.
        """
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            raise KeyError(f"the checkpoint's weights are not this model's: {sorted(own.keys() ^ state_dict.keys())[:3]}")
        with torch.no_grad():
            for name, value in state_dict.items():
                own[name].copy_(value)
        return torch.nn.modules.module._IncompatibleKeys([], [])


class CausalLMModule(CausalLM, LoricaModule):
    """A causal language model under training."""


class SequenceClassifierModule(SequenceClassifier, LoricaModule):
    """A sequence classifier under training."""
