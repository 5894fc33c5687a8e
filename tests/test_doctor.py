"""`lorica doctor` names what is broken in an environment, with what mends it; one that is sound exits with 0."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorica import durable, hub
from lorica.doctor import gpus, outside, places, probing, software, verdicts
from lorica.doctor.runner import line
from lorica.doctor.verdicts import FAIL, OK, WARN, Finding, Verdict

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "Zx9Qw7" * 6
KEY = "deadbeef" * 5
OWN = "an-odd-token-of-no-known-format"
GIB = 2**30


def told(finding: Finding, verdict: str, found: str, fix: str) -> None:
    """The verdict, words of the finding and words of the fix."""
    assert finding.verdict == verdict, finding
    assert found in finding.found, finding.found
    assert fix in finding.fix and bool(finding.fix) == (verdict != OK), finding.fix


# ---------------------------------------------------------------------------------------- what the probing process meets

TORCH = """
class _Cuda:
    def is_available(self): return USABLE
    def init(self): raise RuntimeError("driver initialization failed")
    def device_count(self): return 1
    def mem_get_info(self, i): return FREE, 80 * 2**30
    def get_device_capability(self, *a): return CAPABILITY
    def get_device_name(self, i): return "NVIDIA Test"
class _Number:
    def cuda(self): raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
from types import SimpleNamespace as _S
__version__, version, cuda = "9.9", _S(cuda=CUDA, hip=None), _Cuda()
backends = _S(mps=_S(is_available=lambda: False))
bfloat16 = float16 = None
optim = _S(Optimizer=type("Optimizer", (), {"add_param_group": None}))
def randn(*shape): return _Number()
"""
NVML = """
class NVMLError(Exception): pass
class NVMLError_LibRmVersionMismatch(NVMLError): pass
class NVMLError_LibraryNotFound(NVMLError): pass
def nvmlInit(): INIT
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(i): return i
def nvmlSystemGetDriverVersion(): return "550.54"
def nvmlSystemGetCudaDriverVersion_v2(): return DRIVER_CUDA
def nvmlDeviceGetName(h): return "NVIDIA L4"
def nvmlDeviceGetTotalEnergyConsumption(h): return 5
"""


@pytest.fixture
def shadow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module of that name before the installed one; capitals in its text stand for values."""
    folder = tmp_path / "shadows"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def put(name: str, text: str, **values: Any) -> None:
        for word, value in values.items():
            text = re.sub(rf"\b{word}\b", value if word == "INIT" else repr(value), text)
        (folder / f"{name}.py").write_text(textwrap.dedent(text))

    return put


@pytest.fixture
def probe() -> Iterator[Callable[..., probing.Outcome]]:
    """Outcomes of a probing process, which ends with the test."""
    running: list[probing.Probing] = []

    def outcome(name: str, seconds: float = 60.0) -> probing.Outcome:
        if not running:
            running.append(probing.Probing(time.monotonic() + seconds))
        return running[0].outcome(name)

    yield outcome
    for one in running:
        one.close()


Probe = Callable[..., probing.Outcome]
Shadow = Callable[..., None]
NO_DRIVER = probing.Outcome({"trouble": "NVML Shared Library Not Found"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.abort()", "ends the process that tries it (SIGABRT)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "(SIGSEGV)"),
    ],
    ids=["missing", "library", "aborts", "segfaults"],
)
def test_torch_that_can_not_be_imported(text: str, found: str, shadow: Shadow, probe: Probe) -> None:
    shadow("torch", text)
    told(gpus.torch(gpus.Driver(probe("driver")), probe("torch")), FAIL, found, "pip install --force-reinstall torch")
    told(gpus.bitsandbytes(probe("bitsandbytes")), WARN, "not tried, for torch", "above first")


def test_torch_that_hangs(shadow: Shadow, probe: Probe) -> None:
    shadow("torch", "import time; time.sleep(100)")
    begun = time.monotonic()
    told(gpus.torch(gpus.Driver(NO_DRIVER), probe("torch", 1.5)), FAIL, "did not come to an end after", "timeout=60")
    told(gpus.triton(gpus.Driver(NO_DRIVER), probe("triton")), WARN, "not tried, for torch had not", "above")
    assert time.monotonic() - begun < 4


def test_torch_that_is_slow_to_load_is_not_called_broken(shadow: Shadow, probe: Probe) -> None:
    shadow("torch", "while True: pass")
    told(gpus.torch(gpus.Driver(NO_DRIVER), probe("torch", 2.0)), WARN, "not known: it was still at work after 2 s", "timeout=60")


def test_a_torch_for_cpus_beside_a_gpu(shadow: Shadow, probe: Probe) -> None:
    shadow("torch", TORCH, USABLE=False, CUDA=None, FREE=0, CAPABILITY=(0, 0))
    shadow("pynvml", NVML, INIT="pass", DRIVER_CUDA=13000)
    driver = gpus.Driver(probe("driver"))
    told(gpus.torch(driver, probe("torch")), FAIL, "built for CPUs, where NVIDIA L4 is there", "https://download.pytorch.org/whl/cu130")
    told(gpus.gpu(driver, probe("gpu")), WARN, "torch can't use NVIDIA L4", "mend torch first")


@pytest.mark.parametrize(
    ("driver_cuda", "fix"),
    [(12040, "a driver that runs CUDA 12.6 or newer: https://www.nvidia.com/drivers"), (12080, "whl/cu128")],
)
def test_a_driver_too_old_for_torch(driver_cuda: int, fix: str, shadow: Shadow, probe: Probe) -> None:
    shadow("torch", TORCH, USABLE=False, CUDA="13.0", FREE=0, CAPABILITY=(0, 0))
    shadow("pynvml", NVML, INIT="pass", DRIVER_CUDA=driver_cuda)
    finding = gpus.torch(gpus.Driver(probe("driver")), probe("torch"))
    told(finding, FAIL, "built for CUDA 13.0, which driver 550.54 (CUDA 12.", fix)
    assert finding.versions == {"torch": "9.9", "cuda": "13.0", "driver": "550.54"}


def test_a_driver_updated_under_a_running_kernel(shadow: Shadow, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow("torch", TORCH, USABLE=False, CUDA="13.0", FREE=0, CAPABILITY=(0, 0))
    shadow("pynvml", NVML, INIT="raise NVMLError_LibRmVersionMismatch('Driver/library version mismatch')", DRIVER_CUDA=0)
    monkeypatch.setattr(gpus, "KERNEL_MODULE", tmp_path)
    told(gpus.torch(gpus.Driver(probe("driver")), probe("torch")), FAIL, "Driver/library version mismatch", "sudo reboot")


def test_a_driver_that_hangs_or_crashes(shadow: Shadow, probe: Probe) -> None:
    shadow("torch", TORCH, USABLE=False, CUDA=None, FREE=0, CAPABILITY=(0, 0))
    shadow("pynvml", NVML, INIT="__import__('os').abort()", DRIVER_CUDA=0)
    driver = gpus.Driver(probe("driver"))
    told(gpus.torch(driver, probe("torch")), OK, "built for CPUs", "")
    assert "SIGABRT" in driver.trouble
    shadow("pynvml", NVML, INIT="__import__('time').sleep(100)", DRIVER_CUDA=0)
    late = probing.Probing(time.monotonic() + 1.5)
    told(gpus.torch(gpus.Driver(late.outcome("driver")), late.outcome("torch")), FAIL, "the NVIDIA driver does not answer", "sudo reboot")


def test_a_gpu_hidden_by_the_environment(shadow: Shadow, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow("torch", TORCH, USABLE=False, CUDA="13.0", FREE=0, CAPABILITY=(0, 0))
    shadow("pynvml", NVML, INIT="pass", DRIVER_CUDA=13000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told(gpus.torch(gpus.Driver(probe("driver")), probe("torch")), WARN, "hides NVIDIA L4", "unset CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    told(gpus.torch(gpus.Driver(probe("driver")), probe("torch")), FAIL, "driver initialization failed", "nvidia-smi")


def test_a_card_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "vendor").write_text("0x10de\n")
    (tmp_path / "0000:01:00.0" / "class").write_text("0x030200\n")
    monkeypatch.setattr(gpus, "PCI", tmp_path)
    monkeypatch.setattr(gpus, "KERNEL_MODULE", tmp_path / "none")
    told(gpus.gpu(gpus.Driver(NO_DRIVER), probing.Outcome({"kind": "cpu"})), WARN, "no driver (NVML", "docker run --gpus all")


def test_a_gpu_that_torch_has_no_kernels_for(shadow: Shadow, probe: Probe) -> None:
    shadow("torch", TORCH, USABLE=True, CUDA="13.0", FREE=10 * GIB, CAPABILITY=(6, 1))
    shadow("pynvml", NVML, INIT="pass", DRIVER_CUDA=13000)
    told(gpus.gpu(gpus.Driver(probe("driver")), probe("gpu")), FAIL, "no kernel image", "whl/cu126")


def test_triton_that_ends_the_process_keeps_nothing_from_those_after_it(shadow: Shadow, probe: Probe) -> None:
    shadow("torch", TORCH, USABLE=True, CUDA="13.0", FREE=10 * GIB, CAPABILITY=(9, 0))
    shadow("triton", "import os; os.abort()")
    shadow("bitsandbytes", "raise ImportError('no libbitsandbytes')")
    told(gpus.triton(gpus.Driver(NO_DRIVER), probe("triton")), FAIL, "(SIGABRT)", "pip install --force-reinstall triton")
    told(gpus.bitsandbytes(probe("bitsandbytes")), FAIL, "no libbitsandbytes", "pip install --force-reinstall bitsandbytes")


@pytest.mark.parametrize(
    ("trouble", "fix"),
    [("RuntimeError: Failed to find C compiler", "apt-get install gcc"), ("gcc fails with exit code 1", "python3-dev")],
)
def test_triton_that_compiles_nothing(trouble: str, fix: str) -> None:
    told(gpus.triton(gpus.Driver(NO_DRIVER), probing.Outcome(None, trouble)), FAIL, trouble, fix)


def test_triton_that_is_missing_on_a_gpu() -> None:
    driver = gpus.Driver(probing.Outcome({"gpus": ["NVIDIA L4"], "driver": "1", "cuda": 13000}))
    told(gpus.triton(driver, probing.Outcome({"version": None, "ran": False})), WARN, "missing", "pip install triton")


def test_attention_that_is_wrong() -> None:
    runs, wrong = probing.Outcome({"version": "3.6", "ran": True}), probing.Outcome(None, "ArithmeticError: it gives other values")
    told(gpus.attention(runs, wrong), FAIL, "other values", "model.attn_implementation=sdpa")
    told(gpus.attention(probing.Outcome(None, "no compiler"), wrong), FAIL, "does not run", "mend triton first")


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("raise ModuleNotFoundError(\"No module named 'bitsandbytes'\")", "No module named", "pip install --force-reinstall bitsandbytes"),
        ("import os; os.abort()", "(SIGABRT)", "pip install --force-reinstall bitsandbytes"),
        ("import time; time.sleep(100)", "did not come to an end after", "timeout=60"),
    ],
    ids=["missing", "aborts", "hangs"],
)
def test_bitsandbytes_that_is_broken(text: str, found: str, fix: str, shadow: Shadow, probe: Probe) -> None:
    shadow("torch", TORCH, USABLE=False, CUDA=None, FREE=0, CAPABILITY=(0, 0))
    shadow("bitsandbytes", text)
    told(gpus.bitsandbytes(probe("bitsandbytes", 2.0 if "sleep" in text else 60.0)), FAIL, found, fix)
    assert probe("torch").facts is not None


def test_bitsandbytes_that_quantises_wrongly() -> None:
    wrong = probing.Outcome({"version": "0.1", "device": "cuda", "error": 0.9, "step": True})
    told(gpus.bitsandbytes(wrong), FAIL, "changes weights by 90%", "pip install --force-reinstall bitsandbytes")


@pytest.mark.parametrize(
    ("capability", "free", "verdict", "found", "fix"),
    [
        ((7, 5), 15, WARN, "neither bf16 nor fp8, energy is counted: fp16 and padded batches", "Ampere"),
        ((8, 0), 70, OK, "70.0 of 80.0 GiB free, bf16, energy", ""),
        ((9, 0), 70, OK, "compute capability 9.0, 70.0 of 80.0 GiB free, bf16 and fp8", ""),
        ((9, 0), 2, WARN, "4-bit Mistral-7B takes 4.2 GiB", "nvidia-smi"),
    ],
)
def test_what_a_gpu_can_do(capability: tuple[int, int], free: int, verdict: str, found: str, fix: str) -> None:
    driver = gpus.Driver(probing.Outcome({"gpus": ["NVIDIA L4"], "driver": "580.1", "cuda": 13000, "energy": True}))
    one = {"name": "NVIDIA L4", "capability": list(capability), "free": free * GIB, "total": 80 * GIB}
    told(gpus.gpu(driver, probing.Outcome({"kind": "cuda", "gpus": [one]})), verdict, found, fix)


def test_a_sound_gpu_is_all_well() -> None:
    driver = gpus.Driver(probing.Outcome({"gpus": ["NVIDIA L4"], "driver": "580.1", "cuda": 13000, "energy": True}))
    facts = {"version": "2.13", "cuda": "13.0", "hip": None, "usable": True, "trouble": ""}
    told(gpus.torch(driver, probing.Outcome(facts)), OK, "built for CUDA 13.0; driver 580.1 (CUDA 13.0)", "")
    told(gpus.triton(driver, probing.Outcome({"version": "3.6", "ran": True})), OK, "compiled a kernel and ran it", "")
    told(gpus.attention(probing.Outcome({"ran": True}), probing.Outcome({"kernel": "Lorica's Triton kernel"})), OK, "Lorica's Triton", "")


# -------------------------------------------------------------------------------------------------------------- software


def _distributions(folder: Path, without: str = "", other: tuple[str, str] = ("", "")) -> str:
    """A folder with the installed packages' metadata, one missing or of another version."""
    folder.mkdir()
    for path in sys.path:
        for info in Path(path or ".").glob("*.dist-info"):
            name = info.name.split("-")[0].lower()
            if name not in (without, other[0]) and not (folder / info.name).exists():
                (folder / info.name).symlink_to(info)
    if other[0]:
        changed = folder / f"{other[0]}-{other[1]}.dist-info"
        changed.mkdir()
        (changed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {other[0]}\nVersion: {other[1]}\n")
    return str(folder)


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import packaging.requirements
    import packaging.specifiers  # noqa: F401

    monkeypatch.setattr(sys, "path", [_distributions(tmp_path / "site", without="bitsandbytes")])
    told(software.packages(), FAIL, "bitsandbytes is missing", "pip install 'bitsandbytes>=")


def test_a_package_of_the_wrong_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import packaging.requirements
    import packaging.specifiers  # noqa: F401

    monkeypatch.setattr(sys, "path", [_distributions(tmp_path / "site", other=("torch", "2.5.0"))])
    finding = software.packages()
    told(finding, FAIL, "torch 2.5.0 is not >=2.", "pip install 'torch>=2.")
    assert finding.versions["torch"] == "2.5.0" and "transformers" in finding.versions


@pytest.mark.parametrize(("version", "verdict"), [("3.10.13", FAIL), ("3.11.0", OK)])
def test_a_python_that_is_too_old(version: str, verdict: str) -> None:
    fix = "make setup PYTHON=" if verdict == FAIL else ""
    told(software.python(version), verdict, version, fix)


@pytest.mark.parametrize(("gpu", "verdict", "found"), [(True, FAIL, "Triton can't build"), (False, WARN, "runs uncompiled")])
def test_a_path_without_a_compiler(gpu: bool, verdict: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    told(software.compiler(gpu), verdict, found, "apt-get install gcc g++")
    monkeypatch.setenv("CC", "nowhere-cc")
    told(software.compiler(gpu), verdict, "CC=nowhere-cc is no program", "unset CC")


# ---------------------------------------------------------------------------------------------------------------- places


def test_outputs_that_are_a_file(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    told(places.outputs(tmp_path / "outputs"), FAIL, "it is a file, not a folder", f"mv {tmp_path / 'outputs'}")


@pytest.mark.parametrize("folder", ["/proc/doctor", "/dev/null/outputs"])
def test_outputs_that_can_not_be_made(folder: str) -> None:
    told(places.outputs(Path(folder)), FAIL, f"{folder} can't be written", "run_dir=")


def test_outputs_leave_no_trace(tmp_path: Path) -> None:
    told(places.outputs(tmp_path / "a" / "outputs"), OK, "can be written", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "outputs").mkdir()
    told(places.outputs(tmp_path / "outputs"), OK, "can be written", "")
    assert list((tmp_path / "outputs").iterdir()) == []


LOOK = """
import dataclasses, json, sys
from pathlib import Path
from lorica.doctor import places
print(json.dumps(dataclasses.asdict(places.outputs(Path(sys.argv[1])))))
"""


def _mounted(folder: Path, options: str) -> Finding:
    """What is found of outputs on a disk of its own, mounted for one process alone."""
    folder.mkdir()
    script = f'mount -t tmpfs -o {options} doctor "$0" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, str(folder), sys.executable, "-c", LOOK, str(folder / "outputs")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr[-200:]}")
    return Finding(**json.loads(done.stdout))


def test_outputs_on_a_full_disk(tmp_path: Path) -> None:
    told(_mounted(tmp_path / "disk", "size=16k"), FAIL, "the disk is full", "make room: du -sh")


def test_outputs_on_a_read_only_disk(tmp_path: Path) -> None:
    told(_mounted(tmp_path / "disk", "ro"), FAIL, "Read-only file system", "not mounted read-only")


@pytest.mark.parametrize(("free", "verdict", "found"), [(10**8, FAIL, "QLoRA run keeps"), (10**9, WARN, "a merged 7B model")])
def test_outputs_with_little_room(free: int, verdict: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda folder: free)
    told(places.outputs(tmp_path), verdict, found, "make room")


def test_caches_that_can_not_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "file" / "own"))
    told(places.hub_cache(True), WARN, "nothing can be downloaded", "HF_HOME=")
    told(places.own_cache(), WARN, "tokenises and compiles again", "LORICA_CACHE=")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 10**8)
    told(places.hub_cache(True), WARN, "a 7B model takes 15 GB", "HF_HOME=")
    told(places.hub_cache(False), OK, "0.1 GB free", "")
    told(places.own_cache(), WARN, "may not fit", "rm -r")


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(places, "CGROUP", tmp_path)
    for free, verdict in ((GIB // 2, FAIL), (2 * GIB, WARN), (30 * GIB, OK)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free, total=64 * GIB))
        told(places.memory(), verdict, "of 64.0 GiB free", "" if verdict == OK else "end other programs")
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    told(places.memory(), FAIL, "0.5 of 4.0 GiB free (the container's limit)", "give the container more memory")


# --------------------------------------------------------------------------------------------------------------- outside


class Service(BaseHTTPRequestHandler):
    """The hub and W&B in one. codes: answers by the end of the path, other than 200. silent: ends of paths never answered."""

    codes: dict[str, int]
    silent: set[str]
    gated = False

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        who = {"name": "somebody", "auth": {"accessToken": {"role": "read"}}}
        self._answer(json.dumps(who if self.path.endswith("whoami-v2") else {}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
        self._answer(json.dumps({"data": {"viewer": {"username": "somebody"} if known else None}}).encode())

    def _answer(self, body: bytes) -> None:
        end = self.path.rsplit("/", 1)[-1]
        while end in type(self).silent:
            time.sleep(0.1)
        self.send_response(code := type(self).codes.get(end, 200))
        if code in (401, 403, 404) and end == "auth-check":
            self.send_header("X-Error-Code", "GatedRepo" if type(self).gated else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Service]]:
    """A sound service, that this process takes for the hub and for W&B, with a token and a key."""
    from huggingface_hub import constants

    kind = type("OneService", (Service,), {"codes": {}, "silent": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    kind.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    for module in ("huggingface_hub.constants", "huggingface_hub.hf_api"):
        monkeypatch.setattr(f"{module}.ENDPOINT", kind.address, raising=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_MODE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    environment = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "NO_PROXY": "127.0.0.1", "HOME": str(tmp_path)}
    for name, value in (*environment.items(), ("WANDB_BASE_URL", kind.address)):  # type: ignore[attr-defined]
        monkeypatch.setenv(name, value)
    yield kind
    kind.silent.clear()
    server.shutdown()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for long."""
    monkeypatch.setattr(outside, "SECONDS", 0.5)
    monkeypatch.setattr(outside.wandb_login, "ANSWER_SECONDS", 0.5)


def asked(base: str = "me/gated", wanted: bool = True) -> outside.Hub:
    return outside.Hub(base, None, wanted)


def test_a_sound_hub(service: type[Service]) -> None:
    one = asked()
    told(one.reached(), OK, "answers", "")
    told(one.token(), OK, "of somebody, may read, from HF_TOKEN", "")
    told(one.base(), OK, "me/gated may be downloaded", "")
    told(outside.wandb(), OK, "as somebody, by WANDB_API_KEY", "")


@pytest.mark.parametrize(
    ("address", "found", "fix"),
    [
        ("http://127.0.0.1:9", "Connection refused", "a network"),
        ("http://hub.invalid", "its name is not known", "HF_HUB_OFFLINE=1"),
    ],
)
def test_no_hub(address: str, found: str, fix: str, service: type[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    one = asked()
    told(one.reached(), WARN, found, fix)
    told(one.token(), OK, "not tried: the hub can't be asked", "")
    told(one.base(), FAIL, "is not in the cache, and the hub can't be asked", "model=minilm_lora")
    told(asked(wanted=False).base(), WARN, "can't be asked", "model=minilm_lora")


def test_a_hub_that_is_silent(service: type[Service], hasty: None) -> None:
    service.silent.add("")
    begun = time.monotonic()
    told(asked().reached(), WARN, "no answer within 0.5 s", "a network")
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(("code", "found", "fix"), [(500, "error 500", "status.huggingface.co"), (407, "proxy asks", "HTTPS_PROXY=")])
def test_a_hub_that_errs(code: int, found: str, fix: str, service: type[Service]) -> None:
    service.codes[""] = code
    told(asked().reached(), WARN, found, fix)


def test_a_certificate_that_is_not_trusted(service: type[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answer", lambda url, seconds: "its certificate is not trusted here (self-signed certificate)")
    told(asked().reached(), WARN, "certificate", "SSL_CERT_FILE=")


def test_an_expired_token(service: type[Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service.codes["whoami-v2"] = 401
    one = asked()
    told(one.token(), FAIL, "refused by the hub (401), from HF_TOKEN", "https://huggingface.co/settings/tokens")
    told(one.base(), FAIL, "the hub refuses the token", "mend the token first")
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "no-token").write_text(OWN)
    finding = asked().token()
    told(finding, FAIL, f"from {tmp_path / 'no-token'}", "then hf auth login")
    assert OWN not in repr(finding) and verdicts.clean(f"header {OWN}") == "header ***"


def test_a_token_that_nobody_answers_for(service: type[Service], hasty: None) -> None:
    service.silent.add("whoami-v2")
    told(asked().token(), WARN, "TimeoutError: no answer within 0.5 s", "later again")
    service.silent.clear()
    service.codes["whoami-v2"] = 503
    told(asked().token(), WARN, "answers 503", "later again")


def test_no_token(service: type[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    told(asked().token(), WARN, "gated and private repositories can't be read", "hf auth login")


def test_a_gated_base(service: type[Service]) -> None:
    service.codes["auth-check"], service.gated = 403, True
    told(asked().base(), FAIL, "me/gated is gated", "accept them at https://huggingface.co/me/gated")
    service.gated = False
    service.codes["auth-check"] = 404
    told(asked("me/mising").base(), FAIL, "is not on the hub, or is private", "check the name")
    service.codes["auth-check"] = 502
    told(asked().base(), WARN, "answers 502", "later again")


def test_offline_by_choice(service: type[Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one = asked()
    told(one.reached(), OK, "HF_HUB_OFFLINE is set", "")
    told(one.token(), OK, "not tried: HF_HUB_OFFLINE is set", "")
    told(one.base(), FAIL, "HF_HUB_OFFLINE is set", "HF_HUB_OFFLINE=0")
    snapshot = tmp_path / "hub" / "models--me--gated" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_text("")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    told(asked().base(), OK, "is in the hub's cache", "")


def test_a_base_that_is_a_folder(service: type[Service], tmp_path: Path) -> None:
    told(asked(str(tmp_path)).base(), FAIL, "has no config.json", "base=")
    (tmp_path / "config.json").write_text("{}")
    told(asked(str(tmp_path)).base(), OK, "is a folder here", "")
    assert not asked(str(tmp_path)).missing and not asked(hub.TINY).missing and asked().missing


def test_w_and_b_without_a_login(service: type[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    told(outside.wandb(), WARN, "not logged in", f"wandb login --host {service.address}")  # type: ignore[attr-defined]


def test_w_and_b_that_refuses_the_key(service: type[Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service.codes["graphql"] = 401
    told(outside.wandb(), WARN, "refuses the key from WANDB_API_KEY", "--relogin, and unset WANDB_API_KEY")
    service.codes.clear()
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text(f"machine {service.address.split('//')[1]} login user password {'0' * 40}\n")  # type: ignore[attr-defined]
    (tmp_path / ".netrc").chmod(0o600)
    told(outside.wandb(), WARN, "refuses the key from ~/.netrc", "--relogin")


def test_w_and_b_that_is_silent_or_gone(service: type[Service], hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    service.silent.add("graphql")
    told(outside.wandb(), WARN, "does not say whose the key is", "logger.mode=offline")
    service.silent.add("")
    told(outside.wandb(), WARN, "no answer within 0.5 s", "a network")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    told(outside.wandb(), WARN, "Connection refused", "wandb sync")
    monkeypatch.setenv("WANDB_MODE", "offline")
    told(outside.wandb(), OK, "WANDB_MODE=offline", "")


def test_w_and_b_that_is_not_installed(service: type[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "find_spec", lambda name: None)
    told(outside.wandb(), WARN, "the package is missing", "pip install wandb")


# ------------------------------------------------------------------------------------------------------- the whole verb


def test_a_check_that_fails_itself_is_a_verdict_too() -> None:
    def broken() -> Finding:
        raise ValueError(f"Illegal header Bearer {TOKEN}")

    verdict = verdicts.Check("hub", broken).verdict(time.monotonic() + 5)
    assert verdict.verdict == FAIL and verdict.fix and "ValueError: Illegal header" in verdict.found and TOKEN not in repr(verdict)

    def slow() -> Finding:
        time.sleep(0.5)
        return verdicts.ok("late")

    verdict = verdicts.Check("slow", slow).verdict(time.monotonic() + 0.1)
    assert verdict.verdict == FAIL and "did not come to an end" in verdict.found and "timeout=60" in verdict.fix


def test_lines_are_as_wide_as_the_terminal_and_fixes_can_be_copied() -> None:
    fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    lines = line(Verdict("torch", FAIL, "a finding of many words " * 8, fix, 0.1, {}), 60).splitlines()
    assert lines[0].startswith("  FAIL  torch") and max(len(one) for one in lines[:-1]) <= 60
    assert lines[-1].strip() == f"fix: {fix}" and len({len(one) - len(one.lstrip()) for one in lines[1:]}) == 1


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, str, float]:
    """(exit code, stdout, stderr, seconds) of the verb in a folder of its own."""
    shadows = environment.pop("shadows", "")
    path = os.pathsep.join(filter(None, [shadows, str(ROOT / "src")]))
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lorica", "doctor", *arguments],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - begun


SECRETS = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "HTTPS_PROXY": f"http://me:{OWN}@127.0.0.1:9"}


@pytest.mark.alone
def test_a_sound_machine_exits_with_0_within_ten_seconds(service: type[Service], tmp_path: Path) -> None:
    code, out, err, seconds = run(tmp_path, HF_ENDPOINT=service.address, HF_HOME=str(tmp_path), **SECRETS)  # type: ignore[attr-defined]
    assert code == 0 and " 0 fail" in out and seconds < 10, (seconds, out, err)
    assert not [secret for secret in (TOKEN, KEY, OWN) if secret in out + err]


def test_a_sound_machine_is_told_as_json_without_its_secrets(service: type[Service], tmp_path: Path) -> None:
    code, out, err, _ = run(tmp_path, "--json", "timeout=60", HF_ENDPOINT=service.address, HF_HOME=str(tmp_path), **SECRETS)  # type: ignore[attr-defined]
    assert code == 0, out + err
    assert not [secret for secret in (TOKEN, KEY, OWN) if secret in out + err]
    checks = {one["name"]: one for one in json.loads(out)}
    assert all(set(one) == {"name", "verdict", "found", "fix", "seconds", "versions"} for one in checks.values())
    assert [one for one in checks.values() if bool(one["fix"]) == (one["verdict"] == OK)] == []
    assert checks["torch"]["versions"]["torch"] and checks["packages"]["versions"]["transformers"]
    assert checks["hub token"]["verdict"] == OK and checks["bitsandbytes"]["verdict"] == OK
    assert not (tmp_path / "outputs").exists()


def test_a_machine_with_much_broken_names_it_all_and_exits_with_1(service: type[Service], shadow: Shadow, tmp_path: Path) -> None:
    shadow("torch", TORCH, USABLE=False, CUDA=None, FREE=0, CAPABILITY=(0, 0))
    shadow("pynvml", NVML, INIT="pass", DRIVER_CUDA=13000)
    shadow("bitsandbytes", "import os; os.abort()")
    service.codes["whoami-v2"] = 401
    (tmp_path / "outputs").write_text("")
    environment = {"HF_ENDPOINT": service.address, "HF_HOME": str(tmp_path), "shadows": str(tmp_path / "shadows")}  # type: ignore[attr-defined]
    code, out, err, seconds = run(tmp_path, "model=mistral_qlora", "timeout=30", **environment)
    failed = set(re.findall(r"^  FAIL  (\w+(?: \w+)?)  ", out, re.MULTILINE))
    assert code == 1 and failed >= {"torch", "bitsandbytes", "outputs", "hub token", "base"}, out + err
    assert out.count("fix: ") >= 5 and TOKEN not in out + err and seconds < 20


def test_without_hydra_it_says_so_all_the_same(shadow: Shadow, tmp_path: Path) -> None:
    shadow("torch", "raise ImportError('no torch')")
    (tmp_path / "shadows" / "hydra").mkdir()
    (tmp_path / "shadows" / "hydra" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'hydra'\")")
    code, out, err, _ = run(tmp_path, "timeout=30", shadows=str(tmp_path / "shadows"))
    assert code == 1 and "keys can't be read (No module named 'hydra')" in err and "FAIL  torch" in out and "  base  " not in out, out + err


def test_flags_and_keys_that_are_wrong(lorica: Callable[..., tuple[int, str]]) -> None:
    code, said = lorica("train", "--json")
    assert code == 2 and "--json: is a flag of doctor" in said
    code, said = lorica("doctor", "model=mistral_qlor")
    assert code == 2 and "mistral_qlora" in said
    code, said = lorica("doctor", "timeot=3")
    assert code == 2 and "timeout=3" in said
    code, said = lorica("doctor", "--help")
    assert code == 0 and "[--json]" in said
