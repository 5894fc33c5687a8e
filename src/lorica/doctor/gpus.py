"""Driver, torch, GPU and what runs on it: what the probes told, judged. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from lorica.doctor.probing import Outcome
from lorica.doctor.verdicts import Finding, fail, ok, warn

GIB = 2**30
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
PCI = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"  # a PCI device's vendor, and how the class of graphics cards begins
WHEELS = ((13000, "cu130"), (12080, "cu128"), (12060, "cu126"))  # builds of torch: the CUDA that a driver must have, and their index
SMALLEST_7B = 5 * GIB  # 4-bit Mistral-7B takes 4.2 GiB at least (README.md)
DRIVER_PAGE = "https://www.nvidia.com/drivers"
SLOW = "lorica doctor timeout=60  (more time, where disk or machine are slow)"


class Driver:
    """The NVIDIA driver, as NVML and the kernel show it. present: a GPU is known to be there, whatever can use it."""

    def __init__(self, outcome: Outcome) -> None:
        told = outcome.facts or {}
        self.names: list[str] = told.get("gpus", [])
        self.version: str = told.get("driver", "")
        self.cuda: int = told.get("cuda", 0)
        self.energy: bool = told.get("energy", False)
        self.trouble: str = outcome.trouble or told.get("trouble", "")
        self.hung = outcome.hung
        self.loaded = bool(self.version) or KERNEL_MODULE.exists()
        self.card = _has_card()
        self.mismatch = told.get("kind") == "NVMLError_LibRmVersionMismatch"

    @property
    def present(self) -> bool:
        """Whether a GPU is there with its driver."""
        return bool(self.names) or (self.loaded and not self.version)

    @property
    def description(self) -> str:
        """`driver 580.159 (CUDA 13.0)`"""
        return f"driver {self.version} (CUDA {_dotted(self.cuda)})" if self.version else "driver unknown"


def _has_card() -> bool:
    """Whether an NVIDIA graphics card is on the bus."""
    try:
        return any(
            (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAY)
            for device in PCI.iterdir()
        )
    except OSError:
        return False


def _dotted(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def install(cuda: int) -> str:
    """How to get a torch that a driver of this CUDA (12080 for 12.8; 0 where it is not known) runs."""
    build = next((build for needs, build in WHEELS if cuda >= needs), WHEELS[0][1] if not cuda else "")
    if not build:
        return f"a driver that runs CUDA {_dotted(WHEELS[-1][0])} or newer: {DRIVER_PAGE}"
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


def _unknown(outcome: Outcome) -> Finding | None:
    """The finding where nothing was found out, which is no failure."""
    if outcome.late:
        return warn(f"not known: {outcome.trouble}", SLOW)
    return warn(outcome.trouble, "what stands above first") if outcome.untried else None


def torch(driver: Driver, outcome: Outcome) -> Finding:
    """Whether torch can be imported, and was built for the GPU and the driver that are there."""
    if driver.hung:
        return fail(f"not tried, for the NVIDIA driver does not answer: {driver.trouble}", "nvidia-smi  (does it?); then sudo reboot")
    if (unknown := _unknown(outcome)) is not None:
        return unknown
    if outcome.facts is None:
        again = install(driver.cuda) if driver.present else "pip install --force-reinstall torch"
        slow = f"{SLOW}; else " if outcome.hung else ""
        return fail(f"can't be imported: {outcome.trouble}", slow + again)
    told = outcome.facts
    version, cuda = told["version"], told["cuda"]
    build = f"{version}, built for " + (f"CUDA {cuda}" if cuda else f"ROCm {told['hip']}" if told["hip"] else "CPUs")
    versions = {"torch": version, "cuda": cuda or "", "driver": driver.version}
    if told["usable"]:
        return ok(f"{build}; {driver.description}" if cuda else build, **versions)
    if not driver.present:
        return ok(build, **versions)
    there = ", ".join(driver.names) or "an NVIDIA GPU"
    if not cuda:
        return fail(f"{build}, where {there} is there ({driver.description})", install(driver.cuda), **versions)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not any(part.strip().isdigit() or part.startswith(("GPU-", "MIG-")) for part in hidden.split(",")):
        return warn(f"{build}; CUDA_VISIBLE_DEVICES={hidden!r} hides {there}", "unset CUDA_VISIBLE_DEVICES", **versions)
    if driver.mismatch:
        return fail(f"{build}; the driver was updated while it ran: {driver.trouble}", "sudo reboot", **versions)
    if driver.cuda and driver.cuda // 1000 < int(cuda.split(".")[0]):
        newer = f"a newer driver ({DRIVER_PAGE})"
        older = install(driver.cuda)
        fix = older if older.startswith("a driver") else f"{newer}, or {older}"
        return fail(f"{build}, which {driver.description} is too old for", fix, **versions)
    why = told["trouble"] or driver.trouble or "torch finds no GPU"
    return fail(f"{build}; {there} can't be used: {why}", "nvidia-smi  (what the driver says); then sudo reboot", **versions)


def gpu(driver: Driver, outcome: Outcome) -> Finding:
    """What the GPUs are and can do."""
    if (unknown := _unknown(outcome)) is not None:
        return unknown
    if outcome.facts is None:
        return fail(f"{', '.join(driver.names) or 'it'} does not compute: {outcome.trouble}", _for_trouble(outcome.trouble))
    if outcome.facts["kind"] == "mps":
        return ok("an Apple GPU; 4-bit weights and 8-bit optimisers want an NVIDIA GPU")
    if outcome.facts["kind"] == "cpu":
        return _no_gpu(driver)
    gpus = outcome.facts["gpus"]
    first, number = gpus[0], len(gpus)
    capability = tuple(first["capability"])
    names = " and ".join(dict.fromkeys(g["name"] for g in gpus))
    free = min(g["free"] for g in gpus)
    able = [name for name, least in (("bf16", (8, 0)), ("fp8", (8, 9))) if capability >= least]
    text = (
        f"{f'{number} x ' if number > 1 else ''}{names}, compute capability {capability[0]}.{capability[1]}, "
        f"{free / GIB:.1f} of {first['total'] / GIB:.1f} GiB free{' on the fullest' if number > 1 else ''}, "
        f"{' and '.join(able) or 'neither bf16 nor fp8'}{', energy is counted' if driver.energy else ''}"
    )
    if capability < (8, 0):
        return warn(f"{text}: fp16 and padded batches are used", "a GPU from Ampere on (A100, RTX 30) is several times as fast")
    if free < SMALLEST_7B:
        return warn(f"{text}: 4-bit Mistral-7B takes 4.2 GiB at least", "nvidia-smi  (who holds the memory), or model=minilm_lora")
    return ok(text)


def _no_gpu(driver: Driver) -> Finding:
    if driver.present:
        return warn(f"torch can't use {', '.join(driver.names) or 'it'}: runs are on the CPU", "mend torch first, above")
    if driver.card:
        return warn(
            f"an NVIDIA card is there, but no driver ({driver.trouble}): runs are on the CPU",
            f"install the driver ({DRIVER_PAGE}) and restart; in a container: docker run --gpus all",
        )
    return warn(
        "none: runs are on the CPU, where 7B models take days",
        "python train.py model=minilm_lora  (minutes), or a machine with an NVIDIA GPU",
    )


def _for_trouble(trouble: str) -> str:
    if "no kernel image" in trouble:
        return f"{install(WHEELS[-1][0])}  (built for older GPUs too)"
    if "out of memory" in trouble:
        return "nvidia-smi  (who holds the memory)"
    return "nvidia-smi  (what the driver says); then sudo reboot"


def triton(driver: Driver, outcome: Outcome) -> Finding:
    """Whether Triton compiles and runs a kernel."""
    if (unknown := _unknown(outcome)) is not None:
        return unknown
    if outcome.facts is None:
        built = any(words in outcome.trouble for words in ("compiler", "fails with exit code", "Python.h"))
        cure = "apt-get install gcc python3-dev" if built else "pip install --force-reinstall triton"
        return fail(f"can't run a kernel: {outcome.trouble}", f"{cure}; then rm -r ~/.triton/cache")
    version = outcome.facts["version"]
    if outcome.facts["ran"]:
        return ok(f"{version} compiled a kernel and ran it", triton=version)
    if driver.present and version is None:
        return warn("is missing: layers are not compiled and attention is torch's", "pip install triton")
    return ok("not on a CPU", **({"triton": version} if version else {}))


def attention(compiles: Outcome, outcome: Outcome) -> Finding:
    """Whether attention of sequences laid end to end runs, and is right. compiles: what Triton's own probe told."""
    if (unknown := _unknown(outcome)) is not None:
        return unknown
    if outcome.facts is None:
        mend = "mend triton first, above" if compiles.facts is None else "model.attn_implementation=sdpa  (padded batches)"
        return fail(f"of sequences laid end to end does not run: {outcome.trouble}", mend)
    kernel = outcome.facts["kernel"]
    if kernel is None:
        return ok("of sequences laid end to end is for NVIDIA GPUs from Ampere on; not on a CPU: padded batches")
    return ok(f"of sequences laid end to end runs, in {kernel}")


def bitsandbytes(outcome: Outcome) -> Finding:
    """Whether weights get through NF4 and back, and an 8-bit optimiser takes a step."""
    if (unknown := _unknown(outcome)) is not None:
        return unknown
    if outcome.facts is None:
        if outcome.hung:
            return fail(f"does not answer: {outcome.trouble}", f"{SLOW}; else pip install --force-reinstall bitsandbytes")
        return fail(f"does not work: {outcome.trouble}", "pip install --force-reinstall bitsandbytes")
    told = outcome.facts
    versions = {"bitsandbytes": told["version"]}
    if not told["error"] < 0.2:
        return fail(
            f"{told['version']} changes weights by {told['error']:.0%} in NF4", "pip install --force-reinstall bitsandbytes", **versions
        )
    place = "GPU" if told["device"] == "cuda" else "CPU"
    optimiser = "an 8-bit optimiser took a step" if told["step"] else "its 8-bit optimisers need a GPU"
    return ok(f"{told['version']} brings weights into NF4 and back within {told['error']:.0%} on the {place}; {optimiser}", **versions)
