"""The energy of training: counted while the clock runs, kept through an interruption, not known where nothing counts it."""

import sys
import types
from typing import Any

import pytest
import torch

from lorica import hardware
from lorica.callbacks import Throughput

ONE = types.SimpleNamespace(world_size=1)
BATCH = {"count": {"tokens": 10, "examples": 2}}


def _train(throughput: Throughput, steps: int) -> None:
    for k in range(steps):
        throughput.on_train_batch_start(ONE, None, BATCH, k)  # type: ignore[arg-type]
        throughput.on_train_batch_end(ONE, None, None, BATCH, k)  # type: ignore[arg-type]
    throughput.pause()


def test_joules_are_those_between_start_and_pause() -> None:
    used = iter(range(0, 1000, 10))
    throughput = Throughput(lambda: float(next(used)))
    _train(throughput, 3)  # read at the start, around the first step, and at the pause
    first = throughput.figures(ONE)["train/energy_joules"]  # type: ignore[arg-type]
    assert first == 20.0
    resumed = Throughput(lambda: float(next(used)))
    resumed.load_state_dict(throughput.state_dict())
    _train(resumed, 1)
    assert resumed.figures(ONE)["train/energy_joules"] == 30.0  # type: ignore[arg-type]


def test_what_nobody_counted_is_not_known() -> None:
    without = Throughput()
    _train(without, 2)
    assert "train/energy_joules" not in without.figures(ONE)  # type: ignore[arg-type]
    elsewhere = Throughput(lambda: 5.0)
    elsewhere.load_state_dict(without.state_dict())
    _train(elsewhere, 1)
    assert "train/energy_joules" not in elsewhere.figures(ONE)  # type: ignore[arg-type]


def test_a_gpu_is_asked_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or "handle"  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 2500  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="ab-12"))
    meter = hardware.energy_meter(torch.device("cuda", 0))
    assert meter is not None and meter() == 2.5 and asked == ["GPU-ab-12"]
    assert hardware.energy_meter(torch.device("cpu")) is None

    def no_driver() -> None:
        raise OSError("NVML Shared Library Not Found")

    nvml.nvmlInit = no_driver  # type: ignore[attr-defined]
    assert hardware.energy_meter(torch.device("cuda", 0)) is None
