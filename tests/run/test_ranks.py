"""Two processes train what one does: started by us, or all at once by torchrun."""

import contextlib
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorica import states
from lorica.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("data.max_train_examples=48", "data.max_validation_examples=15", "data.max_test_examples=9", "trainer.max_epochs=1")
MODEL = ("model=tiny_mistral_qlora", "data=sentiment", "optimizer.name=sgd", "optimizer.lr=0.2")
PLAIN = (*MODEL, "trainer.log_every_n_steps=1", "trainer.accelerator=cpu")
BATCHES = ("trainer.batch_size=4", "trainer.group_by_length=false")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _here(arguments: list[str]) -> tuple[int, str]:
    """Train in this process, which has torch already: (exit code, what was printed)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        main("train", arguments)
    return int(end.value.code or 0), said.getvalue()


def _train(folder: Path, *arguments: str, processes: int = 1, outside: bool = False) -> dict[str, Any]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={_free_port()}"]
    devices = [f"trainer.devices={processes}", *(["trainer.strategy=ddp"] if processes > 1 else [])]
    command = [sys.executable, *(torchrun if outside else []), str(ROOT / "train.py"), *SMALL, *PLAIN, *devices, *arguments]
    if processes == 1:
        code, printed = _here([*command[2:], f"run_dir={folder}"])
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command += [] if outside else [f"run_dir={folder}"]
        done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=300)
        code, printed = done.returncode, done.stdout + done.stderr[-3000:]
    assert code == 0 and printed.count("next ") == 1, printed[-6000:]
    run = folder.parent / "outputs" / "latest" if outside else folder
    figures: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 9
    with (run / "metrics.csv").open() as file:
        figures["losses"] = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    return figures


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process trains: 8 rows a step as 2 x 4."""
    return _train(tmp_path_factory.mktemp("ranks") / "one", *BATCHES, "trainer.accumulate_grad_batches=2")


@pytest.mark.slow
@pytest.mark.parametrize("outside", [False, True], ids=["ours", "torchrun"])
def test_two_processes_train_what_one_does(one: dict[str, Any], tmp_path: Path, outside: bool) -> None:
    """8 rows a step as 4 on each of two: the same figures up to rounding."""
    two = _train(tmp_path / "two", *BATCHES, processes=2, outside=outside)
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4) and len(set(one["losses"])) == 6
    assert two["test/loss"] == pytest.approx(one["test/loss"], rel=1e-4) and two["test/accuracy"] == one["test/accuracy"]


@pytest.mark.slow
def test_a_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}", str(ROOT / "train.py")]
    done = subprocess.run([*command, *SMALL, *PLAIN], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "trainer.devices=1: 2 processes were started from outside" in done.stderr


def _ends(run: Path) -> tuple[bytes, list[dict[str, str]]]:
    """The adapter's bytes, and the log without its rates."""
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if "per_second" not in k} for row in csv.DictReader(file)]
    return (run / "adapter" / "adapter_model.safetensors").read_bytes(), rows


@pytest.mark.faults
def test_two_processes_that_are_stopped_and_killed_go_on_to_the_same_bits(tmp_path: Path) -> None:
    """Rank 0 is asked to stop, and all stop after the same step; what goes on is killed with all its ranks, and goes on again."""
    more = (*BATCHES, "model.lora.lora_dropout=0.1", "trainer.checkpoint_every_n_steps=1", "trainer.max_epochs=3", "resume=auto")
    _train(tmp_path / "straight", *more, processes=2)
    run = tmp_path / "stopped"
    two = ("trainer.devices=2", "trainer.strategy=ddp")
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *PLAIN, *two, *more, f"run_dir={run}"]

    def broken_off(after: int, how: signal.Signals, group: bool) -> tuple[int, str]:
        """Start or go on, and end it once a state of that step or a later one is there."""
        with (tmp_path / "log").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
            deadline = time.monotonic() + 150
            while (last := states.last_state(run)) is None or states.step_of(last) < after:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.02)
            (os.killpg if group else os.kill)(process.pid, how)
            return process.wait(60), (tmp_path / "log").read_text()

    code, said = broken_off(3, signal.SIGTERM, group=False)
    assert code == 75, said[-3000:]
    code, said = broken_off(8, signal.SIGKILL, group=True)
    assert code == -signal.SIGKILL and not (run / "metrics.json").exists()
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert _ends(run) == _ends(tmp_path / "straight")


@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_processes_ends_without_taking_threads_down(processes: int) -> None:
    """What was to be done at the exit is done, destructors of torch's threads are not run: now and then one of them aborted."""
    program = f"""
import atexit, sys, weakref
sys.path.insert(0, {str(ROOT / "src")!r})
from lorica import cli, launch
class Kept: pass
kept = Kept()
weakref.finalize(kept, print, "at the exit")
launch.torch.distributed.is_initialized = lambda: True
launch.torch.distributed.get_world_size = lambda: {processes}
class TakenDown:
    def __del__(self): sys.stdout.write("taken down\\n")
sys.modules["left"] = TakenDown()
cli.run = lambda verb, args: 75
cli.main("train", [])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines() == ["at the exit", *(["taken down"] if processes == 1 else [])]
