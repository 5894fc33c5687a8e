"""What safety costs, at the size of a 7B run's adapter: `python tests/faults/costs.py [folder]`.

An adapter of 160 MB (r=16 on seven kinds of layers of Mistral-7B: 40 million fp32 weights), its 8-bit optimiser state, 48,000 rows.
"""

import sys
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from lorica import durable, states
from lorica.checkpoints import DurableIO
from lorica.data.encoding import Encoded
from lorica.data.token_cache import content_hash

WEIGHTS, ROWS, TOKENS, ROUNDS = 40_000_000, 48_000, 300, 5


def seconds(work: Callable[[], object]) -> float:
    """Median of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return median(times)


def main() -> None:
    parts = 224  # matrices of adapters
    adapter = {f"layer.{i}.lora.weight": torch.randn(WEIGHTS // parts) for i in range(parts)}
    moments = {
        i: {
            "state1": torch.randint(0, 255, (WEIGHTS // parts,), dtype=torch.uint8),
            "state2": torch.zeros(WEIGHTS // parts, dtype=torch.uint8),
        }
        for i in range(parts)
    }
    rows = [Encoded(array("i", range(i, i + TOKENS)), array("i", range(TOKENS)), 0) for i in range(ROWS)]
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as scratch:
        run = Path(scratch)
        state = {"state_dict": adapter, "optimizer_states": [{"state": moments}]}

        io, waits = DurableIO(lambda: states.retain(run, 2)), []

        def save() -> None:
            begun = time.perf_counter()
            io.save_checkpoint(state, states.next_name(run, 1))
            waits.append(time.perf_counter() - begun)
            io.wait()

        saving = seconds(save)
        size = states.states(run)[-1].stat().st_size
        save_file(adapter, run / "adapter.safetensors")
        print(f"state of {size / 1e6:.0f} MB: {saving:.2f} s to write, sync and name, of which training waits {median(waits):.2f} s")
        print(f"manifest of an adapter of {WEIGHTS * 4 / 1e6:.0f} MB: {seconds(lambda: durable.sha256(run / 'adapter.safetensors')):.2f} s")
        print(f"check of the newest state before a resume: {seconds(lambda: states.newest_intact(run)):.2f} s")
        print(f"fingerprint of {ROWS:,} rows of {TOKENS} tokens: {seconds(lambda: content_hash(rows)):.2f} s")


if __name__ == "__main__":
    main()
