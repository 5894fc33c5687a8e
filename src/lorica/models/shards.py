"""Safetensors files written tensor by tensor: no more than one of a file's tensors is in memory.

A file is 8 bytes with the length of its header, little-endian; the header, JSON of each tensor's type, shape and place; the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

INDEX = "model.safetensors.index.json"
TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Kind = tuple[torch.dtype, tuple[int, ...]]  # of a tensor


def size(kind: Kind) -> int:
    """Bytes of a tensor."""
    dtype, shape = kind
    return math.prod(shape) * dtype.itemsize


def write_file(path: Path, kinds: Mapping[str, Kind], tensor: Callable[[str], torch.Tensor]) -> None:
    """Write one file, tensors in the order of `kinds`; one is written while the next is made.

    Args:
        tensor: gives each when it is its turn, in the type and shape announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind in kinds.items():
        header[name] = {"dtype": TYPES[kind[0]], "shape": list(kind[1]), "data_offsets": [end, end + size(kind)]}
        end += size(kind)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, ThreadPoolExecutor(1, "write") as thread:
        last = thread.submit(file.write, len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in kinds.items():
            value = tensor(name).cpu().contiguous()
            assert (value.dtype, tuple(value.shape)) == (dtype, shape), name
            last.result()
            last = thread.submit(file.write, value.reshape(-1).view(torch.uint8).numpy().data)
            del value  # what is written next is made beside this one, and no third
        last.result()


def write_shards(folder: Path, shards: Sequence[Mapping[str, Kind]], tensor: Callable[[str], torch.Tensor]) -> None:
    """Write model.safetensors, or several files with their index, as `from_pretrained` reads them."""
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], tensor)
        return
    places: dict[str, str] = {}
    for i, kinds in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, kinds, tensor)
        places |= dict.fromkeys(kinds, name)
    total = sum(size(kind) for kinds in shards for kind in kinds.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
