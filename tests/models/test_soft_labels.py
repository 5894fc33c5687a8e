"""The loss with a teacher is the formula, row by row; fillers count for nothing; without weight it is cross-entropy to the bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.data.encoding import IGNORE
from lorica.models.soft_labels import SoftLabels

SCORES = st.floats(-20, 20, width=32)
ROW = st.tuples(st.lists(SCORES, min_size=3, max_size=3), st.lists(SCORES, min_size=3, max_size=3), st.sampled_from([0, 1, 2, IGNORE]))


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def by_hand(ours: list[float], theirs: list[float], label: int, temperature: float, weight: float) -> float:
    """The formula of one row, without torch and without logarithms of nothing."""
    if label == IGNORE:
        return 0.0
    p, q = (softmax([v / temperature for v in values]) for values in (theirs, ours))
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-30)
    return (1 - weight) * -math.log(softmax(ours)[label]) + weight * temperature**2 * kl


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(ROW, min_size=1, max_size=7), st.floats(0.5, 10), st.floats(0, 1))
def test_it_is_the_sum_of_the_formula_over_the_rows(
    rows: list[tuple[list[float], list[float], int]], temperature: float, weight: float
) -> None:
    ours, theirs = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    labels = torch.tensor([row[2] for row in rows])
    found = SoftLabels(temperature, weight).loss_sum(ours, labels, theirs.log_softmax(-1))
    assert float(found) == pytest.approx(sum(by_hand(*row, temperature, weight) for row in rows), rel=1e-3, abs=1e-3)


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(8, 3, generator=generator) for _ in range(2))
    return logits, torch.tensor([0, 2, 1, 1, IGNORE, 0, 2, IGNORE]), teacher.log_softmax(-1)


def test_a_student_that_agrees_with_its_teacher_learns_nothing_from_it() -> None:
    _, labels, teacher = _batch()
    student = (teacher + 5.0).requires_grad_()  # a constant changes no probability
    loss = SoftLabels(3.0, 1.0).loss_sum(student, labels, teacher)
    loss.backward()
    assert student.grad is not None and abs(loss.item()) < 1e-5 and student.grad.abs().max() < 1e-5


def test_what_fills_a_batch_up_has_no_loss_and_no_gradient() -> None:
    logits, labels, teacher = _batch()
    logits.requires_grad_()
    real = labels != IGNORE
    soft = SoftLabels(2.0, 0.5)
    whole = soft.loss_sum(logits, labels, torch.where(real[:, None], teacher, 0.0))
    assert torch.equal(whole, soft.loss_sum(logits[real], labels[real], teacher[real]))
    whole.backward()
    assert logits.grad is not None and not logits.grad[~real].any() and logits.grad[real].abs().sum(-1).gt(0).all()


def test_without_weight_it_is_cross_entropy_to_the_bit() -> None:
    logits, labels, teacher = _batch()
    gradients = []
    for loss in (
        lambda x: SoftLabels(2.0, 0.0).loss_sum(x, labels, teacher),
        lambda x: F.cross_entropy(x, labels, reduction="sum"),
    ):
        x = logits.clone().requires_grad_()
        total = loss(x)
        total.backward()
        gradients.append((total, x.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_the_soft_gradient_keeps_its_size_as_the_temperature_rises() -> None:
    """What temperature^2 is for: at high temperatures the gradient is (student - teacher logits, both centred) / K."""
    logits, labels, teacher = _batch()
    x = logits.clone().requires_grad_()
    SoftLabels(100.0, 1.0).loss_sum(x, labels, teacher).backward()
    apart = (logits - logits.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    assert x.grad is not None
    real = labels != IGNORE
    torch.testing.assert_close(x.grad[real], (apart / 3)[real], rtol=0.05, atol=5e-3)
