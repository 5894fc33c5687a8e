"""QLoRA of Mistral-7B through train.py beside HF Trainer, TRL and Unsloth: one GPU, one process after another, rounds in turn.

`python -m benchmarks.qlora OUT.json --model DIR [--cases 5k,512] [--who lorica,hf,trl,unsloth] [--rounds 3] [--steps N]`

DIR is built with random weights where there is none. Rows: documents of about 300 tokens, 45 % of each a prompt that is not
learnt; the peers get the token ids and labels that Lorica makes of them. Peers that are not installed are left out. The share of
the limit is by `benchmarks.limit`: the machine's measured matrix products over (4 N, with checkpointing 6 N, + 4 H V s) FLOPs a
token, N the linear layers' weights, H V the head's, s the share of learnt tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import limit, random_text
from benchmarks.side_by_side import OURS, Measurement, Report, add_options, call, chosen, machine, measure, peer, train, versions

WARM = 10  # steps of ours that are left out
ROWS = 3000  # about a million tokens: an epoch is longer than any case
LENGTH = 516  # of the rows that max_length cuts to exactly 512


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        overrides: for train.py. steps: of ours. peers: settings of each (see `benchmarks.qlora_peer`). peer_steps: theirs.
        rows: the data, mixed lengths or all 512. beside: the case whose peers this one is compared with, where it has none of its own.
    """

    overrides: tuple[str, ...]
    steps: int
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    peer_steps: int = 0
    rows: str = "mixed"
    beside: str = ""


def tokens(n: int, *more: str, checkpointing: bool = False) -> tuple[str, ...]:
    """Overrides for micro-batches of n tokens."""
    return (f"trainer.tokens_per_batch={n}", f"trainer.gradient_checkpointing={str(checkpointing).lower()}", *more)


def packed(n: int, batch: int, accumulate: int = 1, checkpointing: bool = False) -> dict[str, dict[str, Any]]:
    """Rows of n packed tokens for those that pack; for HF Trainer padded batches that hold about as many."""
    row = {"pack": n, "checkpointing": checkpointing}
    return {"hf": {"batch": batch, "accumulate": accumulate, "checkpointing": checkpointing}, "trl": row, "unsloth": row}


def one_row(checkpointing: bool = False) -> dict[str, dict[str, Any]]:
    """One document a step: nothing to pack."""
    return {who: {"batch": 1, "checkpointing": checkpointing} for who in ("hf", "trl", "unsloth")}


FP8, DEQUANTISED, SHORT = "trainer.fp8=true", "trainer.resident_weights=false", "model.max_length=512"
GRAPHS = "trainer.cuda_graphs=true"  # for steps that are too large to be captured unasked
OFF_CARD = "trainer.offload_embeddings=true"
SMALLEST = ("trainer.tokens_per_batch=512", "trainer.gradient_checkpointing=offload", OFF_CARD, SHORT)
CASES = {
    "5k": Case(tokens(5120), 50, packed(5120, 16), 20),
    # HF Trainer's 48 rows go in three micro-batches: padded to their longest all at once they don't fit without checkpointing
    "16k": Case(tokens(16384, GRAPHS), 40, packed(16384, 16, accumulate=3), 12),
    "5k-ckpt": Case(tokens(5120, OFF_CARD, checkpointing=True), 50, packed(5120, 16, checkpointing=True), 20),
    "16k-fp8": Case(tokens(16384, FP8, GRAPHS), 40, beside="16k"),
    "16k-dequantised": Case(tokens(16384, DEQUANTISED, GRAPHS), 40, beside="16k"),
    "2k": Case(tokens(2048), 80, packed(2048, 6), 30),
    "512": Case(tokens(512, SHORT), 150, one_row(), 50, rows="512"),
    "512-ckpt": Case(tokens(512, SHORT, checkpointing=True), 150, one_row(checkpointing=True), 50, rows="512"),
    "512-smallest": Case(SMALLEST, 150, rows="512", beside="512-ckpt"),
}
PEERS = {"hf": "peft", "trl": "trl", "unsloth": "unsloth"}  # the package without which it is left out


def recipe(model: Path, rows: Path, *more: str) -> list[str]:
    """The overrides of every run of ours."""
    return [
        "model=mistral_qlora",
        f"model.base={model}",
        "model.use_chat_template=false",
        "model.lora.lora_alpha=16",
        "data=instruction",
        "data.source=files",
        f"data.path={rows}",
        "data.input_column=null",
        "data.max_validation_examples=16",
        "data.max_test_examples=16",
        "data.max_generated_examples=0",
        "trainer.max_epochs=-1",
        "trainer.compile=true",  # as longer runs do by themselves
        *more,
    ]


def prepare(model: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Write the rows and, as Lorica encodes them, their ids, unless they are there; the facts of them."""
    facts = folder / f"{kind}.json"
    if not facts.is_file():
        from lorica.composition import compose
        from lorica.data.encoding import CausalEncoder
        from lorica.data.registry import build_data
        from lorica.models.base import find_base, load_tokenizer

        tokenizer = load_tokenizer(find_base(str(model), None))
        random_text.write_instructions(folder / kind, tokenizer, ROWS, LENGTH if kind == "512" else None)
        config = compose("train", recipe(model, folder / kind, "trainer.max_steps=1", *([SHORT] if kind == "512" else [])))
        data = build_data(config.data, config.seed)
        data.load()
        data.encode(CausalEncoder(tokenizer, config.model.max_length, config.model.use_chat_template))
        with (folder / f"{kind}-ids.jsonl").open("w") as file:
            for row in data.train_rows:
                file.write(json.dumps({"input_ids": row.ids.tolist(), "labels": row.labels.tolist()}) + "\n")
        count, learnt = sum(len(r.ids) for r in data.train_rows), sum(r.supervised for r in data.train_rows)
        n = len(data.train_rows)
        facts.write_text(json.dumps({"rows": n, "tokens": count, "mean_tokens": count / n, "learnt_share": learnt / count}) + "\n")
    found: dict[str, Any] = json.loads(facts.read_text())
    return found


def measurements(options: argparse.Namespace, cases: list[str], who: list[str]) -> list[Measurement]:
    """Ours of each case, then the peers of it or of the case it is beside; each peer once."""
    found: list[Measurement] = []
    seen: set[tuple[str, str]] = set()
    for name in cases:
        case, base = CASES[name], CASES[name].beside or name
        if OURS in who:
            steps = f"trainer.max_steps={options.steps or case.steps}"
            overrides = [*recipe(options.model, options.rows / case.rows, *case.overrides, steps), *options.extra]
            found.append((OURS, name, partial(train, overrides, options.timeout, WARM)))
        theirs = CASES[base]
        for rival, settings in theirs.peers.items():
            if rival not in who or not find_spec(PEERS[rival]) or (rival, base) in seen:
                continue
            seen.add((rival, base))
            given = json.dumps({**settings, "steps": options.steps or theirs.peer_steps})
            arguments = (rival, str(options.model), str(options.rows / f"{theirs.rows}-ids.jsonl"), given)
            found.append((rival, base, partial(peer, "benchmarks.qlora_peer", *arguments, timeout=options.timeout)))
    return found


def main() -> None:
    """All cases, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Mistral; built with random weights where there is none")
    parser.add_argument("--rows", type=Path, help="folder for the rows; beside the model without it")
    parser.add_argument("--cases", help=", ".join(CASES))
    parser.add_argument("--who", help=", ".join((OURS, *PEERS)))
    parser.add_argument("--steps", type=int, help="of every run, in place of the case's own")
    add_options(parser, rounds=3, timeout=200)
    options = parser.parse_args()
    cases, who = chosen(options.cases, CASES, "cases"), chosen(options.who, (OURS, *PEERS), "who")
    options.model = options.model.expanduser().resolve()
    options.rows = options.rows.resolve() if options.rows else options.model.with_name(f"{options.model.name}-rows")
    if not (options.model / "config.json").is_file():
        call([sys.executable, "-m", "benchmarks.random_mistral", str(options.model)], 900)
    rows = {kind: prepare(options.model, options.rows, kind) for kind in sorted({CASES[c].rows for c in cases})}
    rate = limit.gemm_rate()
    limits: dict[str, float] = {}
    for name, case in CASES.items():
        if rate and case.rows in rows:
            checkpointing = "trainer.gradient_checkpointing=true" in case.overrides
            learnt = rows[case.rows]["learnt_share"]
            limits[name] = rate / limit.flops_per_token(options.model, checkpointing=checkpointing, learnt=learnt)
    facts = {
        "what": "QLoRA, r=16 on seven linear kinds, NF4 with double quantisation, bf16, paged_adamw_8bit",
        **machine(),
        "versions": versions(),
        "rows": rows,
        "gemm_tflops": rate and rate / 1e12,
        "limits_tokens_per_second": limits,
    }
    print(json.dumps(facts), flush=True)
    beside = {name: case.beside for name, case in CASES.items() if case.beside}
    report = Report(options.out, "tokens_per_second", facts, limits, beside)
    measure(measurements(options, cases, who), options.rounds, report)


if __name__ == "__main__":
    main()
