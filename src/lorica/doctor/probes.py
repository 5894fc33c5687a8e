"""The process that tries what may hang or crash: `python -m lorica.doctor.probes NAME ...`, a line of JSON for each begin and each end."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

QUANTISED = (64, 256)  # a weight of 16,384 numbers: 8-bit optimisers keep those below 4,096 in 32 bits


def driver() -> dict[str, Any]:
    """What NVML tells: `driver`, the newest `cuda` it runs (as 12040), names of `gpus`, `energy` (whether it is counted); or `trouble`."""
    try:
        import pynvml
    except ImportError:
        return {"trouble": "nvidia-ml-py is missing"}
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        told: dict[str, Any] = {
            "driver": str(pynvml.nvmlSystemGetDriverVersion()),
            "cuda": int(pynvml.nvmlSystemGetCudaDriverVersion_v2()),
            "gpus": [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles],
        }
    except pynvml.NVMLError as e:
        return {"trouble": str(e), "kind": type(e).__name__}
    try:
        told["energy"] = bool(handles) and pynvml.nvmlDeviceGetTotalEnergyConsumption(handles[0]) >= 0
    except pynvml.NVMLError:
        told["energy"] = False
    return told


def torch() -> dict[str, Any]:
    """`version`, `cuda` and `hip` that it was built for (or null), whether a GPU is `usable`, and the `trouble` with CUDA where none is."""
    import torch

    usable = torch.cuda.is_available()
    trouble = ""
    if not usable and torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as e:
            trouble = str(e).split("\n")[0]
    return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "usable": usable, "trouble": trouble}


def gpu() -> dict[str, Any]:
    """`kind` (cpu, mps, cuda); with CUDA `gpus`: name, capability, free and total bytes of each. The first has multiplied matrices."""
    import torch

    if not torch.cuda.is_available():
        return {"kind": "mps" if torch.backends.mps.is_available() else "cpu"}
    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        capability = torch.cuda.get_device_capability(i)
        gpus.append({"name": torch.cuda.get_device_name(i), "capability": capability, "free": free, "total": total})
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    product = (a.cuda().to(dtype) @ b.cuda().to(dtype)).float().cpu()
    if not (product - a @ b).norm() < 0.05 * (a @ b).norm():
        raise ArithmeticError("a product of two matrices on it is wrong")
    return {"kind": "cuda", "gpus": gpus}


def triton() -> dict[str, Any]:
    """`version`, and whether a kernel was compiled anew and `ran`, which needs a GPU."""
    import torch

    try:
        import triton
    except ImportError:
        return {"version": None, "ran": False}
    if not torch.cuda.is_available():
        return {"version": triton.__version__, "ran": False}
    kept = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["TRITON_CACHE_DIR"] = fresh
        try:
            from lorica.doctor.addition import add

            x = torch.arange(128.0, device="cuda")
            if not torch.equal(add(x, x), 2 * x):
                raise ArithmeticError("a kernel that adds two vectors adds them wrongly")
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if kept is not None:
                os.environ["TRITON_CACHE_DIR"] = kept
    return {"version": triton.__version__, "ran": True}


def bitsandbytes() -> dict[str, Any]:
    """`version`, `device`, mean relative `error` of a weight in NF4, and whether an 8-bit optimiser took a `step`, which needs a GPU."""
    import torch

    _without_compiler()
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.nn.Parameter(torch.randn(QUANTISED, device=device))
    back = dequantize_4bit(*quantize_4bit(weight.detach(), quant_type="nf4"))
    error = float((back - weight).detach().abs().mean() / weight.detach().abs().mean())
    step = False
    if device == "cuda":
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        bitsandbytes.optim.AdamW8bit([weight], lr=1e-2).step()
        moved = float((weight.detach() - before).abs().mean())
        if not 5e-3 < moved < 2e-2:
            raise ArithmeticError(f"the first step of an 8-bit optimiser moves weights by {moved:.1e} where 1e-02 was asked for")
        step = True
    return {"version": bitsandbytes.__version__, "device": device, "error": error, "step": step}


def attention() -> dict[str, Any]:
    """The `kernel` that attention of two sequences laid end to end ran in; null: batches are padded here."""
    import types

    import torch

    if not torch.cuda.is_available():
        return {"kernel": None}
    _without_compiler()
    from lorica.kernels import attention, varlen

    device = torch.device("cuda")
    if not attention.varlen_available(device):
        return {"kernel": None}
    ends = torch.tensor([0, 40, 96], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(1, 2, 96, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    causal: Any = types.SimpleNamespace(is_causal=True)
    out = attention.varlen_attention(causal, q, k, v, None, cu_seq_lens_q=ends, max_length_q=56)[0].transpose(1, 2).float().cpu()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    parts = [[x[:, :, a:b].float().cpu() for x in (q, k, v)] for a, b in ((0, 40), (40, 96))]
    plain = torch.cat([sdpa(q_part, k_part, v_part, is_causal=True) for q_part, k_part, v_part in parts], dim=2)
    if not (out - plain).norm() < 0.05 * plain.norm():
        raise ArithmeticError("it gives other values than plain attention")
    return {"kernel": "Lorica's Triton kernel" if varlen.covers(q[0].transpose(0, 1), 56, None) else "torch's kernel"}


def _without_compiler() -> None:
    """Keep torch's compiler out: what is imported next marks functions for it or against it, and it takes seconds to load for nothing."""
    import torch

    def plain(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else plain

    torch.compile = torch._disable_dynamo = plain  # type: ignore[assignment]
    marked: Any = torch.optim.Optimizer.add_param_group
    torch.optim.Optimizer.add_param_group = getattr(marked, "__wrapped__", marked)  # type: ignore[method-assign]


NAMED: dict[str, Callable[[], dict[str, Any]]] = {
    "driver": driver,
    "torch": torch,
    "gpu": gpu,
    "triton": triton,
    "bitsandbytes": bitsandbytes,
    "attention": attention,
}


def main(names: list[str]) -> None:
    """Try each; what libraries print goes to stderr."""
    from lorica.doctor.verdicts import said

    with os.fdopen(os.dup(1), "w", buffering=1) as told:
        os.dup2(2, 1)
        for name in names:
            told.write(json.dumps({"begin": name}) + "\n")
            try:
                end: dict[str, Any] = {"facts": NAMED[name]()}
            except Exception as e:
                end = {"trouble": said(e)}
            told.write(json.dumps({"name": name, **end}) + "\n")
        told.flush()
        os._exit(0)  # what a library would still do at its end is no concern here


if __name__ == "__main__":
    main(sys.argv[1:])
