"""What looks at rows only, before a model is known, does not wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lorica.data.readers import SAMPLES
from lorica.data.registry import MODULES

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "lightning", "transformers")
LABELLED = ("ag_news", "sentiment", "classification")
SETS = {name: [f"data={name}", "data.source=sample"] for name in ("ag_news", "sentiment", "healthcare_qa", "chat")}
SETS["classification"] = ["data=classification", f"data.path={SAMPLES / 'sentiment'}"]
SETS["instruction"] = [
    "data=instruction",
    f"data.path={SAMPLES / 'healthcare_qa'}",
    *(f"data.{key}_column={column}" for key, column in (("prompt", "instruction"), ("input", "input"), ("completion", "output"))),
]


def test_rows_are_read_converted_and_split_without_torch() -> None:
    assert set(SETS) == set(MODULES)
    program = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "src")!r})
from lorica.composition import compose
from lorica.data import batching, encoding, templates, token_cache
from lorica.data.registry import build_rows
for name, args in json.loads(sys.argv[1]).items():
    model = "minilm_lora" if name in {LABELLED!r} else "tiny_mistral_qlora"
    rows = build_rows(compose("train", [f"model={{model}}", *args]).data)
    rows.load()
    assert rows.splits.train and (rows.labels is not None) == (name in {LABELLED!r}), name
    print(name, [heavy for heavy in {HEAVY!r} if heavy in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program, json.dumps(SETS)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} []" for name in SETS]
