"""`debug=accumulation`: whether N micro-batches have the gradient of one large batch, measured on the user's own configuration.

Beside it stands what stock Lightning would train on: the mean over each micro-batch's tokens, divided by accumulate_grad_batches. It
weighs a token by how many others its micro-batch has, which is another gradient wherever micro-batches differ (pytorch-lightning#20350).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lorica.data.module import LoricaDataModule
from lorica.kernels.loss import drop_rates
from lorica.models.module import LoricaModule

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative differences that are no more than rounding


@dataclass(frozen=True)
class Window:
    """One optimiser step, measured.

    ours, stock: relative differences of the gradient's norm from that of all rows as one batch. loss: of the step, relative likewise.
    whole: the rows fitted into memory as one batch; otherwise they were taken one by one.
    """

    name: str
    micro_batches: int
    rows: int
    supervised: int
    ours: float
    stock: float
    loss: float
    whole: bool


def measure(module: LoricaModule, data: LoricaDataModule, arithmetic: Callable[[], AbstractContextManager[Any]]) -> list[Window]:
    """The first step, and the last of the first epoch where rows may be too few for whole micro-batches. Dropout is off meanwhile.

    Args:
        arithmetic: a context for forwards (autocast), made anew for each use.
    """
    steps = {"first step": 0, "last step of the first epoch": data.plan.epoch_ends[0] - 1}
    module.train()
    with _without_dropout(module):
        return [_window(name, step, module, data, arithmetic) for name, step in steps.items() if step < data.plan.steps]


def _window(
    name: str, step: int, module: LoricaModule, data: LoricaDataModule, arithmetic: Callable[[], AbstractContextManager[Any]]
) -> Window:
    accumulate, ranks = data.plan.accumulate, data.plan.world_size
    micro = [data.training_batch(k, rank) for k in range(step * accumulate, (step + 1) * accumulate) for rank in range(ranks)]
    rows = data.plan.window_rows(step)
    supervised = sum(b["count"]["supervised"] for b in micro)

    def gradient(batches: list[dict[str, Any]], weigh: Callable[[dict[str, Any]], float]) -> tuple[torch.Tensor, float]:
        module.zero_grad()
        loss = 0.0
        for batch in batches:
            with arithmetic():
                total = module.loss_sum({k: v.to(module.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
            (total * weigh(batch)).backward()
            loss += float(total.detach()) * weigh(batch)
        found = [p.grad.detach().double().flatten().cpu() for p in module.parameters() if p.grad is not None]
        module.zero_grad()
        return torch.cat(found), loss

    ours, loss = gradient(micro, lambda b: b["weight"] / accumulate / ranks)
    stock, _ = gradient(micro, lambda b: 1 / b["count"]["supervised"] / accumulate / ranks if b["count"]["supervised"] else 0.0)
    whole = True
    try:
        truth, of_truth = gradient([data.batch_of(rows)], lambda b: 1 / supervised)
    except torch.cuda.OutOfMemoryError:
        whole = False
    if not whole:  # not above: what the failed batch holds is held by the exception, too
        truth, of_truth = gradient([data.batch_of([row]) for row in rows], lambda b: 1 / supervised)
    return Window(
        name,
        len(micro),
        len(rows),
        supervised,
        float((ours - truth).norm() / truth.norm()),
        float((stock - truth).norm() / truth.norm()),
        abs(loss - of_truth) / abs(of_truth),
        whole,
    )


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """No dropout inside: its masks would be others for other batches."""
    owners = {id(owner): owner for m in module.modules() for owner in (m, getattr(m, "config", None))}
    rates = [(owner, name, rate) for owner in owners.values() for name, rate in drop_rates(owner).items()]
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def report(windows: list[Window], dtype: torch.dtype) -> tuple[dict[str, Any], list[tuple[str, str]], bool]:
    """(for accumulation.json, rows for the screen, whether the differences are rounding).

    Args:
        dtype: that the forward computes in.
    """
    bound = ROUNDING[dtype]
    exact = all(max(w.ours, w.loss) <= bound for w in windows)
    found = {"rounding": bound, "exact": exact, "windows": [asdict(w) for w in windows]}
    lines = []
    for w in windows:
        beside = "one batch" if w.whole else "one row at a time"
        cut = f"{w.micro_batches} micro-batch{'es' * (w.micro_batches > 1)}"
        lines += [
            (
                w.name,
                f"{w.rows} rows in {cut}, {w.supervised:,} learnt tokens or texts, beside {beside}",
            ),
            ("  Lorica", f"gradient {w.ours:.1e}  loss {w.loss:.1e}"),
            ("  mean of means", f"gradient {w.stock:.1e}  (stock Lightning)"),
        ]
    return found, lines, exact
