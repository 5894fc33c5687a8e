"""`debug=resume_drill`: the user's configuration trained straight, and again with a kill and a resume; what differs first, if anything.

Both are processes of their own and train `STEPS` optimiser steps, with a state every `SAVE`. The second is killed (SIGKILL) in a
micro-step that follows from the seed, after the first state and before the last, and then goes on as `resume=` does.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorica.config import ConfigError, LoggerConfig, TrainConfig
from lorica.durable import MANIFEST, sha256, write_json
from lorica.screen import Screen, quiet_libraries

quiet_libraries()

import torch  # noqa: E402  (after the libraries' noise is off)
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402

from lorica import train  # noqa: E402
from lorica.models.module import LoricaModule  # noqa: E402

STEPS, SAVE = 12, 4
COMPARED = ("rows", "learning rate", "random numbers", "loss", "weights", "optimiser")  # in the order in which they decide each other
TAIL = 3  # lines of a failed process's output that are shown


class Trace(Callback):
    """Writes what decides each micro-step, and what came of it, to a file.

    Args:
        die_at: the micro-step at whose end this process is killed.
    """

    def __init__(self, path: Path, die_at: int | None = None) -> None:
        self.path, self.die_at = path, die_at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, LoricaModule)
        states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(pl_module.device)] if pl_module.device.type == "cuda" else [])]
        found: dict[str, Any] = {
            "micro_step": batch_idx,
            "rows": batch["rows"],
            "random numbers": digest(states),
            "loss": float(pl_module.loss_account).hex() if pl_module.loss_account is not None else None,
        }
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            optimizer = trainer.optimizers[0]
            found["learning rate"] = float(optimizer.param_groups[0]["lr"]).hex()
            found["weights"] = digest(p for _, p in sorted(pl_module.state_dict().items()))
            held = (value for group in optimizer.param_groups for p in group["params"] for _, value in sorted(optimizer.state[p].items()))
            found["optimiser"] = digest(value for value in held if isinstance(value, torch.Tensor))
        with self.path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        if batch_idx == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Of their bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def first_divergence(straight: list[dict[str, Any]], interrupted: list[dict[str, Any]]) -> tuple[int, list[str]] | None:
    """(the first micro-step that differs, what of it), or None. A micro-step that was trained twice is compared each time."""
    truth = {record["micro_step"]: record for record in straight}
    for record in sorted(interrupted, key=lambda r: int(r["micro_step"])):
        same = truth[record["micro_step"]]
        if differing := [name for name in COMPARED if record.get(name) != same.get(name)]:
            return int(record["micro_step"]), differing
    missing = set(truth) - {record["micro_step"] for record in interrupted}
    return (min(missing), ["missing"]) if missing else None


def run(config: TrainConfig) -> int:
    """Drill, and say what was found.

    Returns:
        0 where nothing differs, 1 where something does or a process failed.
    Raises:
        ConfigError: several devices; a folder that is taken; fewer steps than the drill has.
    """
    if config.trainer.devices not in (1, "1", "auto") or config.trainer.num_nodes > 1:
        raise ConfigError("trainer.devices", config.trainer.devices, "debug=resume_drill runs on one device", "trainer.devices=1")
    name = f"{config.data.name}-{config.model.name}"
    folder = Path(config.run_dir or Path("outputs") / "drills" / f"{name}-{time.strftime('%Y-%m-%d_%H-%M-%S')}").resolve()
    if folder.exists():
        raise ConfigError("run_dir", folder, "is there already", "another run_dir")
    folder.mkdir(parents=True)
    screen = Screen(folder / "drill.log")
    short = _shortened(config)
    micro_steps = STEPS * config.trainer.accumulate_grad_batches
    die_at = random.Random(config.seed).randrange(SAVE * config.trainer.accumulate_grad_batches, micro_steps - 1)
    screen.facts(
        "lorica train, resume drill", [("folder", str(folder)), ("steps", f"{STEPS}, a state every {SAVE}; killed in micro-step {die_at}")]
    )
    runs = (
        ("straight", short, "straight", None, 0),
        ("killed", short, "interrupted", die_at, -signal.SIGKILL),
        ("resumed", replace(short, resume="required"), "interrupted", None, 0),
    )
    for title, of_run, place, die, expected in runs:
        code = _process(replace(of_run, run_dir=str(folder / place)), folder / f"{place}.jsonl", die, folder / f"{title}.log")
        screen.print(f"  {title:<10} {'as expected' if code == expected else f'ended with {code}'}")
        if code != expected:
            for line in (folder / f"{title}.log").read_text("utf-8", "replace").splitlines()[-TAIL:]:
                screen.print(f"    {line}")
            return 1
    return _compare(folder, screen, die_at, config.trainer.accumulate_grad_batches)


def _shortened(config: TrainConfig) -> TrainConfig:
    """The same training, cut off; tests and answers, which come after it, are few."""
    few: dict[str, Any] = {"max_test_examples": 8, "max_generated_examples": 0}
    data = replace(config.data, **{k: v for k, v in few.items() if hasattr(config.data, k)})
    epochs = config.trainer.max_epochs
    trainer = replace(
        config.trainer,
        devices=1,
        fit=False,  # all three count the same micro-steps
        max_steps=STEPS,
        max_epochs=-1 if epochs > 0 else epochs,
        checkpoint_every_n_steps=SAVE,
        log_every_n_steps=1,
    )
    return replace(config, drill=None, resume=None, data=data, trainer=trainer, logger=LoggerConfig(name="csv"))


def _process(config: TrainConfig, trace: Path, die_at: int | None, log: Path) -> int:
    """Train in a process of its own; its exit code, or minus the signal that ended it."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(config, trace, die_at, log))
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    assert process.exitcode is not None
    return process.exitcode


def _train(config: TrainConfig, trace: Path, die_at: int | None, log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        code = train.run(config, [Trace(trace, die_at)])
    except ConfigError as e:
        print(e)
        code = 2
    sys.stdout.flush()
    os._exit(code)


def _compare(folder: Path, screen: Screen, die_at: int, accumulate: int) -> int:
    traces = [[json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in ("straight", "interrupted")]
    found = first_divergence(*traces)
    weights = [next(iter((folder / name).glob(f"*/{MANIFEST}"))) for name in ("straight", "interrupted")]
    kept_same = sha256(weights[0]) == sha256(weights[1])
    again = len(traces[1]) - len(traces[0])
    write_json(
        folder / "resume_drill.json",
        {
            "killed_in_micro_step": die_at,
            "trained_again": again,
            "first_divergence": None if found is None else {"micro_step": found[0], "differs": found[1]},
            "kept_weights_identical": kept_same,
        },
    )
    if found is not None:
        step, differing = found
        equal = ", ".join(name for name in COMPARED[: COMPARED.index(differing[0])]) if differing[0] in COMPARED else ""
        screen.print(
            f"first divergence in micro-step {step} (step {step // accumulate + 1}): {', '.join(differing)}"
            + (f"; {equal} of it and all before it are identical" if equal else "")
        )
    elif not kept_same:
        screen.print("the steps are identical, the kept weights differ")
    else:
        screen.print(f"identical: {', '.join(COMPARED)} of all {len(traces[0])} micro-steps ({again} trained twice), and the kept weights")
    return 0 if found is None and kept_same else 1
