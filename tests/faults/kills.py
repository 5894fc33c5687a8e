"""Kills training at random moments and compares what the resumed run ends with: `python tests/faults/kills.py --trials 100 --seed 0`.

Everything is imported once; each run is a fork that is killed with SIGKILL and then, in another fork, goes on. Compared with a run that
was left alone are, by sha256: the adapter, the last state's optimiser, schedule and weights, and metrics.csv without its rates.

On an NVIDIA GPU, in deterministic mode: `--gpu plain`, or `--gpu fast` for layers compiled and micro-steps captured. There each fork
imports for itself, since a process that has looked for the GPU can't be forked.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # a parent with threads of its own could not fork children that use theirs

PER_EPOCH = 4  # optimiser steps
RATES = ("train/tokens_per_second",)
LIMIT = 180.0  # seconds that a run may take


@dataclass(frozen=True)
class Job:
    """One kind of run. model: encoder or causal. gpu: plain or fast; None: on the CPU."""

    model: str
    accumulate: int
    workers: int
    gpu: str | None = None

    def __str__(self) -> str:
        return f"{self.model}-{self.accumulate}-{self.workers}"

    def arguments(self, bases: Path) -> list[str]:
        rows = 24
        return [
            *(["model=minilm_lora", "data=ag_news"] if self.model == "encoder" else ["model=tiny_mistral_qlora", "data=sentiment"]),
            f"model.base={bases / self.model}",
            "model.max_length=48",
            "model.lora.lora_dropout=0.1",
            f"data.max_train_examples={rows}",
            "data.max_validation_examples=8",
            "data.max_test_examples=4",
            f"data.num_workers={self.workers}",
            f"trainer.batch_size={rows // PER_EPOCH // self.accumulate}",
            "trainer.tokens_per_batch=null",
            f"trainer.accumulate_grad_batches={self.accumulate}",
            "trainer.max_epochs=2",
            "trainer.val_check_interval=0.5",
            "trainer.checkpoint_every_n_steps=3",
            "trainer.log_every_n_steps=2",
            "optimizer.lr=0.01",
            *(ON_CPU if self.gpu is None else (*ON_GPU, *WAYS[self.gpu])),
        ]


ON_CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "optimizer.name=adamw")
ON_GPU = ("trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "optimizer.name=adamw_8bit", "trainer.deterministic=true")
WAYS = {
    "plain": ("trainer.compile=false", "trainer.cuda_graphs=false", "trainer.resident_weights=false"),
    "fast": ("trainer.compile=true", "trainer.cuda_graphs=true"),
}
JOBS = [Job(model, accumulate, workers) for model in ("encoder", "causal") for accumulate in (1, 3) for workers in (0, 2)]
MOMENTS = ("micro-step", "epoch boundary", "mid-accumulation", "mid-validation", "mid-save", "second kill", "clock")


def build_bases(folder: Path, gpu: bool) -> None:
    """A BERT and a Mistral of random weights, small enough to be read and quantised in milliseconds; on a GPU with heads of 64."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel, MistralConfig, MistralForCausalLM

    from lorica.models.base import build_tiny_mistral

    tokenizer = AutoTokenizer.from_pretrained(build_tiny_mistral(folder / "tiny", 0))
    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    if gpu:
        sizes |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    torch.manual_seed(0)
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    causal = MistralConfig(**sizes, num_key_value_heads=2, head_dim=head, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    for name, model in (
        ("encoder", BertModel(BertConfig(**sizes, pad_token_id=3, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))),
        ("causal", MistralForCausalLM(causal)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


# ---------------------------------------------------------------------------------------------------------------- forks


def forked(work: Callable[[], int], log: Path, after: float | None = None) -> int:
    """Run `work` in a fork, killed after so many seconds where given; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.monotonic() + (LIMIT if after is None else after)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL if after is not None else -signal.SIGALRM
        time.sleep(0.005)


def train(arguments: list[str], at: tuple[str, int] | None, counts: Path | None) -> int:
    """One training in this process; killed at the n-th event of a kind, or the events counted into a file."""
    from lorica.cli import main

    seen: Counter[str] = Counter()

    def happen(kind: str) -> None:
        seen[kind] += 1
        if at == (kind, seen[kind]):
            os.kill(os.getpid(), signal.SIGKILL)

    watch(happen, next(a.removeprefix("run_dir=") for a in arguments if a.startswith("run_dir=")))
    sys.argv = ["train.py", *arguments]
    try:
        main("train", arguments)
    except SystemExit as e:
        if counts is not None:
            counts.write_text(json.dumps(seen))
        return int(e.code or 0)
    return 71


def watch(happen: Callable[[str], None], run: str) -> None:
    """Have every event of a run in a folder call `happen` with its kind: before each, and after each write."""
    from lorica import callbacks, durable, states

    def before(owner: Any, name: str, kind: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            happen(kind)
            return inner(*args, **kwargs)

        setattr(owner, name, wrapped)

    def around(owner: Any, name: str, kind: str) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            happen(kind)
            result = inner(*args, **kwargs)
            happen(kind)
            return result

        setattr(owner, name, wrapped)

    before(callbacks.SeedSteps, "on_train_batch_start", "micro-step")
    before(callbacks.Throughput, "on_train_batch_end", "micro-step")
    before(callbacks.Evaluate, "on_validation_batch_end", "mid-validation")
    around(durable.Hashing, "write", "mid-save")
    around(durable, "sync_folder", "mid-save")
    around(durable, "sha256", "mid-save")
    around(durable, "recover_folder", "mid-save")
    around(states, "retain", "mid-save")
    before(states, "newest_intact", "restore")
    original = os.replace

    def replaced(source: Any, target: Any, **kwargs: Any) -> None:
        within = str(target).startswith(run)  # not the caches, which are written once
        if within:
            happen("mid-save")
        original(source, target, **kwargs)
        if within:
            happen("mid-save")

    os.replace = replaced  # type: ignore[assignment]


# -------------------------------------------------------------------------------------------------------------- results


def result(run: Path) -> dict[str, str]:
    """sha256 of what a finished run must end with, however often it was killed."""
    import torch

    from lorica import states

    last = states.last_state(run)
    assert last is not None
    state = torch.load(last, weights_only=True)
    digest = hashlib.sha256()
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loss_account"):
        feed(digest, state[part])
    with (run / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in RATES} for row in csv.DictReader(file)]
    return {
        "adapter": hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "optimiser": digest.hexdigest(),
        "log": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }


def feed(digest: Any, node: Any) -> None:
    """Nested values into a digest, tensors by their bytes."""
    import torch

    if isinstance(node, torch.Tensor):
        digest.update(f"{node.dtype} {tuple(node.shape)}".encode())
        digest.update(node.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(node, dict):
        for key in node:
            digest.update(repr(key).encode())
            feed(digest, node[key])
    elif isinstance(node, (list, tuple)):
        for value in node:
            feed(digest, value)
    else:
        digest.update(repr(node).encode())


@dataclass
class Reference:
    """A run that was left alone: what it ends with, how often each event happened, how long it took."""

    ends: dict[str, str]
    counts: dict[str, int]
    seconds: float


def reference(job: Job, folder: Path) -> Reference:
    """Train without a kill."""
    begun, run = time.monotonic(), folder / "reference"
    folder.mkdir(parents=True)
    arguments = [*job.arguments(folder.parent / "bases"), f"run_dir={run}"]
    code = forked(lambda: train(arguments, None, folder / "counts.json"), folder / "reference.log")
    if code != 0:
        raise RuntimeError(f"{job} ended with {code}:\n{(folder / 'reference.log').read_text()[-3000:]}")
    ends: dict[str, str] = {}
    forked(lambda: (folder / "ends.json").write_text(json.dumps(result(run))) * 0, folder / "reference.log")
    ends = json.loads((folder / "ends.json").read_text())
    return Reference(ends, json.loads((folder / "counts.json").read_text()), time.monotonic() - begun)


def moment(kind: str, job: Job, counts: dict[str, int], rng: random.Random) -> tuple[str, int]:
    """A random event of a kind, as (event, n-th)."""
    micro_steps = PER_EPOCH * job.accumulate  # an epoch's; each is two events
    if kind == "epoch boundary":
        return "micro-step", 2 * micro_steps + rng.choice((0, 1))
    if kind == "mid-accumulation" and job.accumulate > 1:
        step, within = rng.randrange(2 * PER_EPOCH), rng.randrange(1, job.accumulate)
        return "micro-step", 2 * (step * job.accumulate + within) + 1
    if kind in ("mid-validation", "mid-save"):
        return kind, rng.randint(1, counts[kind])
    return "micro-step", rng.randint(1, counts["micro-step"])


def trial(number: int, kind: str, job: Job, known: Reference, folder: Path, rng: random.Random) -> str:
    """Kill, go on, compare; "" or what went wrong."""
    run, log = folder / f"run-{number}", folder / f"run-{number}.log"
    arguments = [*job.arguments(folder.parent / "bases"), f"run_dir={run}"]
    if kind == "clock":
        forked(lambda: train(arguments, None, None), log, after=rng.uniform(0.0, known.seconds))
    else:
        at = moment(rng.choice(MOMENTS[:5]) if kind == "second kill" else kind, job, known.counts, rng)
        if (code := forked(lambda: train(arguments, at, None), log)) != -signal.SIGKILL:
            return f"was to be killed at {at}, ended with {code}: {log.read_text()[-1500:]}"
    if kind == "second kill":
        at = rng.choice([("restore", 1), ("micro-step", rng.randint(1, 6)), ("mid-save", rng.randint(1, 40)), ("mid-validation", 1)])
        forked(lambda: train([*arguments, "resume=auto"], at, None), log)
    if not (run / "metrics.json").exists():  # the clock may have been too late
        code = forked(lambda: train([*arguments, "resume=auto"], None, None), log)
        if code != 0:
            return f"the resumed run ended with {code}: {log.read_text()[-1500:]}"
    with suppress(FileNotFoundError):
        (folder / "ends.json").unlink()
    forked(lambda: (folder / "ends.json").write_text(json.dumps(result(run))) * 0, log)
    ends = json.loads((folder / "ends.json").read_text())
    differing = [name for name in ends if ends[name] != known.ends[name]]
    return f"differs in {', '.join(differing)}" if differing else ""


def trials(order: list[tuple[str, Job]], rng: random.Random, folder: Path) -> Iterator[tuple[str, Job, str]]:
    """(kind, job, what went wrong) of each trial."""
    folder.mkdir(parents=True, exist_ok=True)
    if code := forked(lambda: build_bases(folder / "bases", order[0][1].gpu is not None) or 0, folder / "bases.log"):
        raise RuntimeError(f"no models ({code}): {(folder / 'bases.log').read_text()[-2000:]}")
    known: dict[Job, Reference] = {}
    for number, (kind, job) in enumerate(order):
        place = folder / str(job)
        if job not in known:
            known[job] = reference(job, place)
        yield kind, job, trial(number, kind, job, known[job], place, rng)


def import_all() -> None:
    """What a run needs, once for all forks."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    import lorica.cli
    import lorica.train  # noqa: F401


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--trials", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--few", action="store_true", help="four moments, with one kind of run")
    options.add_argument("--keep", type=Path, help="folder to work in, which stays")
    options.add_argument("--gpu", choices=tuple(WAYS), help="on the GPU, that way")
    options.add_argument("--job", choices=[str(job) for job in JOBS], help="this kind of run alone: model-accumulate-workers")
    chosen = options.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    begun, rng = time.monotonic(), random.Random(chosen.seed)
    jobs = [replace(job, gpu=chosen.gpu) for job in JOBS if chosen.job in (None, str(job))]
    every = [(kind, job) for kind in MOMENTS for job in jobs]
    rng.shuffle(every)
    few = [(kind, Job("causal", 3, 2)) for kind in ("mid-accumulation", "mid-validation", "mid-save", "second kill")]
    order = few if chosen.few else (every * chosen.trials)[: chosen.trials]
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.keep or Path(scratch)
        os.environ["LORICA_CACHE"] = str(folder / "cache")
        if chosen.gpu is None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            import_all()
        identical = 0
        for number, (kind, job, wrong) in enumerate(trials(order, rng, folder), 1):
            identical += not wrong
            what = f"{kind:17} {job.model:8} accumulate {job.accumulate} workers {job.workers} {job.gpu or 'cpu'}"
            print(f"{number:4d} {what}  {wrong or 'identical'}", flush=True)
    print(f"{identical} of {len(order)} (seed {chosen.seed}, {time.monotonic() - begun:.0f} s)")
    return 0 if identical == len(order) else 1


if __name__ == "__main__":
    sys.exit(main())
