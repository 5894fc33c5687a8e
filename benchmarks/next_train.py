"""train.py in a process that has imported what it needs, and waits to be told what to train: a line of JSON on stdin.

limit: GiB of the GPU that it may have; null: all. overrides: train.py's.
"""

from __future__ import annotations

import json
import sys

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.mistral.modeling_mistral  # noqa: F401

import lorica.train  # noqa: F401
from lorica.cli import main

if __name__ == "__main__":
    told = json.loads(sys.stdin.readline() or sys.exit(0))
    if told["limit"] is not None:
        torch.cuda.set_per_process_memory_fraction(told["limit"] * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    main("train", told["overrides"])
