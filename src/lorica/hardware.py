"""The device at hand: what Lightning is told, which arithmetic it can do, how much memory was used."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lorica import launch
from lorica.config import ConfigError, TrainerConfig

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Machine:
    """Where a run happens. precision is resolved: never auto."""

    accelerator: str
    devices: Any
    device: torch.device
    rank: int
    world_size: int
    precision: str
    notes: list[str] = field(default_factory=list)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of frozen weights and matrix products."""
        return DTYPES[self.precision]

    @property
    def description(self) -> str:
        """For the summary."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return f"{self.world_size} x {name}" if self.world_size > 1 else name
        return f"{self.device.type}, {torch.get_num_threads()} threads" + (f", {self.world_size} processes" if self.world_size > 1 else "")

    def strategy(self, asked: str) -> Any:
        """Lightning's strategy: DDP without buffer broadcasts (ranks may have different numbers of evaluation batches)."""
        if self.world_size == 1:
            return "auto"
        from lightning.pytorch.strategies import DDPStrategy

        return DDPStrategy(
            broadcast_buffers=False, find_unused_parameters=asked == "ddp_find_unused_parameters_true", gradient_as_bucket_view=True
        )


def choose(trainer: TrainerConfig, precision: str | None = None) -> Machine:
    """Resolve accelerator, devices and precision.

    Args:
        precision: what `auto` was when the run began, for a run that goes on.
    Raises:
        ConfigError: the machine lacks what is asked for.
    """
    kind = accelerator_kind(trainer.accelerator)
    devices, numbers = _devices(trainer.devices, kind)
    if kind == "cuda":
        device = torch.device("cuda", numbers[launch.local_rank() % len(numbers)])
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        device = torch.device(kind)
    world = len(numbers) * trainer.num_nodes
    rank = launch.rank() if world > 1 else 0
    launch.check_world(len(numbers), trainer.num_nodes)
    asked = precision if precision is not None and trainer.precision == "auto" else trainer.precision
    resolved, notes = _precision(asked, device)
    return Machine(kind, devices, device, rank, world, resolved, notes)


def accelerator_kind(asked: str) -> str:
    """cpu, cuda or mps.

    Raises:
        ConfigError: the machine has no such device.
    """
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available()
    if asked in ("gpu", "cuda") and not (cuda or (mps and asked == "gpu")):
        raise ConfigError("trainer.accelerator", asked, "this machine has no usable GPU", "trainer.accelerator=auto")
    if asked == "mps" and not mps:
        raise ConfigError("trainer.accelerator", asked, "this machine has no Apple GPU", "trainer.accelerator=auto")
    return "cpu" if asked == "cpu" or not (cuda or mps) else "cuda" if cuda else "mps"


def device_numbers(asked: Any, kind: str) -> list[int]:
    """The numbers of the devices that are asked for, on this machine.

    Raises:
        ConfigError: it has fewer.
    """
    return _devices(asked, kind)[1]


def _devices(asked: Any, kind: str) -> tuple[Any, list[int]]:
    """(what Lightning is told, the devices' numbers on this machine)."""
    have = torch.cuda.device_count() if kind == "cuda" else 1
    if isinstance(asked, list):
        numbers = [int(d) for d in asked]
    elif asked == "auto":
        numbers = [0]
    else:
        numbers = list(range(have if asked == -1 else int(asked)))
    if kind == "cuda" and (max(numbers) >= have):
        raise ConfigError("trainer.devices", asked, f"this machine has {have} GPU{'s' if have > 1 else ''}", f"trainer.devices={have}")
    return (numbers if kind == "cuda" else len(numbers)), numbers


def _precision(asked: str, device: torch.device) -> tuple[str, list[str]]:
    """(Lightning's precision, what to tell the user): what was asked for where the device has it, else the nearest and why."""
    if device.type == "cuda":
        if asked in ("auto", "bf16-mixed") and torch.cuda.get_device_capability(device) < (8, 0):
            return "16-mixed", [
                f"{torch.cuda.get_device_name(device)} has no bf16: 16-mixed (fp16 arithmetic with a gradient scaler) is used"
            ]
        return ("bf16-mixed" if asked == "auto" else asked), []
    if asked == "16-mixed":
        return "32-true", [f"trainer.precision=16-mixed needs a GPU; 32-true is used on the {device.type}"]
    if asked == "auto":
        if device.type == "cpu" and launch.decided_once(_bf16_faster_on_cpu, "cpu", "LORICA_CPU_BF16"):
            return "bf16-mixed", ["bf16 matrix products are faster than fp32 on this CPU (measured)"]
        return "32-true", []
    return asked, []


def _bf16_faster_on_cpu() -> bool:
    """Time a transformer-sized product in both types, where the CPU has bf16 instructions (AMX, avx512_bf16)."""
    import time

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1700, 768, dtype=dtype), torch.randn(1536, 768, dtype=dtype)
        for _ in range(3):
            torch.nn.functional.linear(a, b)
        begun = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(a, b)
        seconds[dtype] = time.perf_counter() - begun
    return seconds[torch.bfloat16] < 0.6 * seconds[torch.float32]


def check_fp8(machine: Machine) -> None:
    """Refuse FP8 where there are no products in it.

    Raises:
        ConfigError: no NVIDIA GPU of compute capability 8.9 (Ada), 9 (Hopper) or later, or another precision than bf16.
    """
    able = machine.device.type == "cuda" and torch.cuda.get_device_capability(machine.device) >= (8, 9)
    if not able or machine.precision != "bf16-mixed":
        lacking = f"precision {machine.precision}" if able else machine.description
        raise ConfigError(
            "trainer.fp8",
            True,
            f"needs bf16-mixed on an NVIDIA GPU of the Ada, Hopper or Blackwell kind; here: {lacking}",
            "trainer.fp8=false",
        )


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may have on a GPU: what is free and what it holds already, within its share if one was set."""
    free, total = torch.cuda.mem_get_info(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return min(free + torch.cuda.memory_reserved(device), int(share * total))


def reset_peak_memory() -> None:
    """Forget the peak before training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """What tells the joules that a GPU has used since its driver was loaded (NVML, Volta and later); None where nothing does."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, a slice of a GPU, a GPU that does not count: each with an error of its own
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000


def reserved_memory_gib(device: torch.device) -> float | None:
    """Peak of what torch's allocator held on the GPU, free pieces and all, since `reset_peak_memory`; None elsewhere."""
    return float(torch.cuda.max_memory_reserved(device)) / 2**30 if device.type == "cuda" else None


def allocator_retries(device: torch.device) -> int:
    """How often torch had to give back free pieces to get another: each time it waits for the GPU."""
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else 0


def grow_segments() -> None:
    """Let torch's allocator grow the pieces that it asks a GPU for, unless the user has set how it works (PYTORCH_ALLOC_CONF).

    Where memory is short, pieces of other sizes would be given back and asked for again at every step.
    """
    if torch.cuda.is_available() and not (os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")):
        forget()
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def forget() -> None:
    """Give back what models that are gone have left; Lightning's modules refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory_gib(device: torch.device, captured: int = 0) -> float:
    """Peak of what was allocated on the GPU since `reset_peak_memory`; on a CPU the process's largest resident size.

    Args:
        captured: bytes that captured steps had in use at most, which the allocator does not see.
    """
    if device.type == "cuda":
        return float(max(torch.cuda.max_memory_allocated(device), captured)) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
