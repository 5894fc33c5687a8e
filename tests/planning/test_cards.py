"""Cards by name, by memory, and the one at hand."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from lorica.config import ConfigError, GpuSettings
from lorica.planning.cards import CARDS, GIB, choose


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("rtx3070_8gb", "rtx3070_8gb"),
        ("RTX-4090", "rtx4090_24gb"),
        ("h200", "h200_141gb"),
        ("4090", "rtx4090_24gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090_24gb"),
        ("nvidia_l4", "l4_24gb"),
        ("Tesla T4", "t4_16gb"),
    ],
)
def test_a_card_is_found_by_its_name(typed: str, found: str) -> None:
    assert choose(GpuSettings(name=typed)) == CARDS[found]


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="gpu=rtx3070_8gb"):
        choose(GpuSettings(name="rtx3070_8g"))


def test_memory_makes_a_card_of_its_own_or_changes_one() -> None:
    assert choose(GpuSettings(memory_gib=10)).memory == 10 * GIB
    changed = choose(GpuSettings(name="h200", memory_gib=20))
    assert changed.memory == 20 * GIB and changed.capability == 9.0
    with pytest.raises(ConfigError, match="leaves nothing"):
        choose(GpuSettings(memory_gib=0.5))


def driver(**values: object) -> SimpleNamespace:
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetCount=lambda: values.get("count", 1),
        nvmlDeviceGetName=lambda h: values["name"],
        nvmlDeviceGetMemoryInfo=lambda h: SimpleNamespace(total=values["total"], used=values["used"]),
        nvmlDeviceGetCudaComputeCapability=lambda h: (8, 9),
        nvmlDeviceGetPowerManagementDefaultLimit=lambda h: 165_000,
    )


def test_the_card_at_hand_is_asked_of_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver(name="NVIDIA GeForce RTX 4060 Ti", total=16 * GIB, used=2 * GIB))
    card = choose(GpuSettings())
    assert card.capability == 8.9 and card.watts == 165 and card.teraflops == CARDS["rtx4060ti_16gb"].teraflops
    assert card.usable == 14 * GIB - card.context and card.count == 1


def test_without_a_card_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ConfigError, match="no NVIDIA GPU: name one"):
        choose(GpuSettings())
