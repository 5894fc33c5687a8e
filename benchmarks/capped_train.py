"""train.py in a process that may have so many GiB of the GPU: `python -m benchmarks.capped_train GIB override ...`."""

from __future__ import annotations

import sys

import torch

from lorica.cli import main

if __name__ == "__main__":
    torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]) * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    main("train", sys.argv[2:])
