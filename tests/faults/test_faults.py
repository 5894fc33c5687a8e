"""Each fault that a run may meet, and what it does then (docs/reliability.md lists them)."""

import csv
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica import callbacks, checkpoints, durable, states
from lorica.checkpoints import tensors
from lorica.models import fitting
from lorica.models.module import CausalLMModule, SequenceClassifierModule

Lorica = Callable[..., tuple[int, str]]
SMALL = ("data.max_train_examples=24", "data.max_validation_examples=8", "data.max_test_examples=4", "trainer.log_every_n_steps=1")
SHORT = (*SMALL, "trainer.batch_size=4", "trainer.max_epochs=1", "trainer.checkpoint_every_n_steps=1", "trainer.keep_checkpoints=9")
EVERY = ("trainer.accelerator=cpu", "trainer.precision=32-true")


def state(run: Path, step: int) -> Any:
    return torch.load(run / "checkpoints" / f"step-{step:09d}.ckpt", weights_only=True)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    return train(tmp_path_factory.mktemp("whole") / "run")


def train(run: Path, *more: str, ends: int = 0) -> Path:
    from lorica.cli import main

    with pytest.raises(SystemExit) as end:
        main("train", [*SHORT, *EVERY, *more, f"run_dir={run}"])
    assert end.value.code == ends
    return run


# ----------------------------------------------------------------------------------------------------------- NaN and Inf


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """A loss of NaN in the micro-steps that `bad` names, counted from 1."""
    inner, calls = SequenceClassifierModule.loss_sum, [0]

    def loss_sum(self: Any, batch: Any) -> torch.Tensor:
        calls[0] += 1
        loss: torch.Tensor = inner(self, batch)
        return loss * float("nan") if bad(calls[0]) else loss

    monkeypatch.setattr(SequenceClassifierModule, "loss_sum", loss_sum)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.faults)])
def test_a_step_whose_gradient_is_no_number_is_skipped_and_said(
    optimizer: str, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda micro_step: micro_step == 3)
    run = tmp_path / "run"
    code, printed = lorica("train", *SHORT, *EVERY, f"optimizer.name={optimizer}", "data.validation_fraction=0", f"run_dir={run}")
    assert code == 0 and "step 3 was skipped: its gradient is NaN or infinite; rows train.csv:" in printed, printed
    before, after, later = (state(run, step) for step in (2, 3, 4))
    for part in ("state_dict", "optimizer_states"):
        same = [torch.equal(a, b) for a, b in zip(tensors(before[part]), tensors(after[part]), strict=True)]
        assert all(same) and all(bool(t.isfinite().all()) for t in tensors(after[part]))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(after["state_dict"]), tensors(later["state_dict"]), strict=True))
    assert json.loads((run / "metrics.json").read_text())["train/skipped_steps"] == 1


@pytest.mark.faults
def test_too_many_in_a_row_end_the_run_with_good_weights_saved(tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda micro_step: micro_step >= 3)
    run = tmp_path / "run"
    code, printed = lorica("train", *SHORT, *EVERY, "trainer.max_skipped_steps=3", "data.validation_fraction=0", f"run_dir={run}")
    assert code == 1 and "trainer.max_skipped_steps=3: so many steps in a row, up to step 5," in printed, printed
    assert all(
        bool(t.isfinite().all()) for saved in states.states(run) for t in tensors(torch.load(saved, weights_only=True)["state_dict"])
    )


@pytest.mark.faults
def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    record = callbacks.RecordLoss.on_train_batch_end

    def break_at_3(self: Any, trainer: Any, pl_module: Any, *rest: Any) -> None:
        record(self, trainer, pl_module, *rest)
        if trainer.global_step == 3:
            next(p for p in pl_module.parameters() if p.requires_grad).data[0] = float("inf")

    monkeypatch.setattr(callbacks.RecordLoss, "on_train_batch_end", break_at_3)
    code, printed = lorica("train", *SHORT, *EVERY, f"run_dir={tmp_path / 'run'}")
    assert code == 1 and "holds NaN or infinity after step 3" in printed
    assert states.step_of(states.last_state(tmp_path / "run") or Path()) == 2


# -------------------------------------------------------------------------------------------------------------- full disk


@pytest.mark.faults
def test_a_disk_that_is_full_before_a_write_leaves_the_state_before(
    tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = durable.check_room

    def check(path: Path, size: int) -> None:
        if path.name == "step-000000003.ckpt":
            monkeypatch.setattr(durable, "free_bytes", lambda folder: 1234)
        room(path, size)

    monkeypatch.setattr(durable, "check_room", check)
    run = tmp_path / "run"
    code, printed = lorica("train", *SHORT, *EVERY, f"run_dir={run}")
    assert code == 1 and "the disk is full" in printed and "1,234 are free" in printed and "step-000000003.ckpt needs" in printed
    assert states.newest_intact(run) == (run / "checkpoints" / "step-000000002.ckpt", [])
    monkeypatch.undo()
    assert lorica("train", f"resume={run}")[0] == 0


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(durable.DiskFull, match=r"file needs [\d,]+ bytes, [\d,]+ are free"), durable.replacing(tmp_path / "file") as file:
        file.write(b"x" * 100_000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("file", b"before")]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_bytes(b"before")
    with pytest.raises(durable.DiskFull), durable.replaced_folder(tmp_path / "folder") as new:
        (new / "half").write_bytes(b"x")
        raise RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")  # as safetensors says it
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["file", "folder", "old"]


# ----------------------------------------------------------------------------------------------------------- out of memory


def room_for(monkeypatch: pytest.MonkeyPatch, kind: type, rows: int, after: int) -> None:
    """A GPU that holds so many rows of a micro-batch, once so many micro-batches have been run."""
    inner, calls = kind.loss_sum, [0]  # type: ignore[attr-defined]

    def loss_sum(self: Any, batch: Any) -> torch.Tensor:
        calls[0] += 1
        loss: torch.Tensor = inner(self, batch)
        if calls[0] > after and batch["input_ids"].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    monkeypatch.setattr(kind, "loss_sum", loss_sum)


@pytest.mark.faults
def test_out_of_memory_ends_in_one_line_with_the_remedy(tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(monkeypatch, SequenceClassifierModule, rows=3, after=2)
    code, printed = lorica("train", *SHORT, *EVERY, f"run_dir={tmp_path / 'run'}")
    assert code == 1 and "failed: out of memory; the same loss with less: trainer.on_oom=halve" in printed, printed
    assert states.step_of(states.last_state(tmp_path / "run") or Path()) == 2


@pytest.mark.faults
def test_halved_micro_batches_train_the_same(tmp_path: Path, tiny_mistral: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    """Met in the middle of a window: its first micro-batch is run again too. SGD, whose update is as the gradient is."""
    model = ("model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment", "trainer.tokens_per_batch=null")
    plan = (*model, "trainer.accumulate_grad_batches=2", "optimizer.name=sgd", "optimizer.lr=0.5")
    train(tmp_path / "whole", *plan)
    room_for(monkeypatch, CausalLMModule, rows=1, after=3)
    code, printed = lorica("train", *SHORT, *EVERY, *plan, "trainer.on_oom=halve", f"run_dir={tmp_path / 'run'}")
    assert code == 0 and "out of memory at step 2: micro-batches are run in 4 parts from here on" in " ".join(printed.split()), printed
    for name, value in adapter(tmp_path / "whole").items():
        assert (adapter(tmp_path / "run")[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
    for ours, theirs in zip(log_of(tmp_path / "run"), log_of(tmp_path / "whole"), strict=True):
        assert float(ours["train/loss"] or 0) == pytest.approx(float(theirs["train/loss"] or 0), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- signals


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PLACES = ("a micro-step", "a validation", "the last validation", "the end", "the test")


@pytest.mark.parametrize(
    ("signum", "where"),
    [
        pytest.param(signum, where, marks=() if s == w < 2 else pytest.mark.faults, id=f"{signum.name} in {where}")
        for w, where in enumerate(PLACES)
        for s, signum in enumerate(SIGNALS)
    ],
)
def test_a_signal_saves_and_exits_with_75_and_the_run_goes_on_to_the_same_weights(
    signum: signal.Signals, where: str, whole: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, at = {
        "a micro-step": (callbacks.SeedSteps, "on_train_batch_start", 8),
        "a validation": (callbacks.Evaluate, "on_validation_batch_end", 1),
        "the last validation": (callbacks.Evaluate, "on_validation_batch_end", 2),
        "the end": (checkpoints.Checkpoints, "on_train_end", 1),
        "the test": (callbacks.Evaluate, "on_test_epoch_start", 1),
    }[where]
    inner, calls = getattr(owner, name), [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signum)
        return inner(*args, **kwargs)

    run, plan = tmp_path / "run", ("trainer.accumulate_grad_batches=3", "trainer.max_epochs=2", "trainer.checkpoint_every_n_steps=null")
    before = signal.getsignal(signum)
    with monkeypatch.context() as m:
        m.setattr(owner, name, interrupted)
        code, printed = lorica("train", *SHORT, *EVERY, *plan, f"run_dir={run}")
    assert code == 75 and f"interrupted ({signum.name}), saved at step" in printed, printed
    assert signal.getsignal(signum) == before
    step = {"a micro-step": 3, "a validation": 2, "the last validation": 4, "the end": 4, "the test": 4}[where]
    assert states.step_of(states.last_state(run) or Path()) == step
    code, printed = lorica("train", f"resume={run}")
    assert code == 0, printed
    if not (whole.parent / "two").exists():
        train(whole.parent / "two", *plan)
    ours, theirs = adapter(run), adapter(whole.parent / "two")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert log_of(run) == log_of(whole.parent / "two")


COMPILING = """
import os, signal, time
from lorica.kernels.layers import start_compilers
noted = []
for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda signum, frame: noted.append(signum))
start_compilers()
from torch._inductor.async_compile import AsyncCompile
under_way = AsyncCompile.process_pool().submit(time.sleep, 3)
AsyncCompile.process_pool().submit(abs, -1).result(60)  # its processes are there
os.killpg(0, signal.SIGUSR1)
os.killpg(0, signal.SIGTERM)
under_way.result(60)
print(sorted(noted) == sorted([signal.SIGTERM, signal.SIGUSR1]), AsyncCompile.process_pool().submit(abs, -7).result(60))
"""


def test_a_signal_to_the_process_group_leaves_the_compiler_its_processes() -> None:
    """As schedulers send them. torch would wait for the answers of those that are gone."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILING], env=environment, capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert (done.returncode, done.stdout.split()) == (0, ["True", "7"]), done.stderr


def test_an_exit_does_not_wait_for_what_is_compiled() -> None:
    program = """
import time
from lorica.kernels.layers import start_compilers
start_compilers()
from torch._inductor.async_compile import AsyncCompile
AsyncCompile.process_pool().submit(abs, -1).result(60)
AsyncCompile.process_pool().submit(time.sleep, 60)
time.sleep(0.5)
print(time.time())
"""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and time.time() - float(done.stdout) < 20, done.stderr


def log_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------------------ data workers


def test_a_dead_data_worker_is_an_error_at_once(tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorica.data.module import LoricaDataModule

    collate, parent = LoricaDataModule._collate_train, os.getpid()

    def die(self: Any, *args: Any) -> Any:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(self, *args)

    monkeypatch.setattr(LoricaDataModule, "_collate_train", die)
    begun = time.monotonic()
    code, printed = lorica("train", *SHORT, *EVERY, "data.num_workers=1", f"run_dir={tmp_path / 'run'}")
    assert code == 1 and "DataLoader worker" in printed and time.monotonic() - begun < 60, printed


# ------------------------------------------------------------------------------------------------------------- corruption


def corrupt(file: Path, rng: random.Random) -> None:
    """Cut a file short, or flip one bit."""
    content = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def test_of_200_corruptions_all_are_found_and_none_is_used(whole: Path, tmp_path: Path) -> None:
    """States and their manifests fall back to the one before; adapters are refused, naming the file."""
    from lorica.config import ConfigError
    from lorica.models import weights

    rng = random.Random(0)
    run = tmp_path / "run"
    found = {"recovered": 0, "refused": 0}
    for _ in range(200):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole, run)
        last = states.last_state(run)
        assert last is not None
        parts = [last, states.manifest_of(last), *(run / "adapter").glob("*")]
        file = rng.choice([part for part in parts if part.name != durable.FOR_PEOPLE])
        corrupt(file, rng)
        if file.parent.name == "adapter":
            with pytest.raises(ConfigError, match=r"is damaged|is missing"):
                weights.load(run / "adapter", torch.nn.Linear(1, 1))
            found["refused"] += 1
        else:
            intact, damaged = states.newest_intact(run)
            assert intact is not None and states.step_of(intact) == states.step_of(last) - 1
            assert len(damaged) == 1 and last.name in damaged[0] and not last.exists()
            assert torch.load(intact, weights_only=True)["global_step"] == states.step_of(intact)
            found["recovered"] += 1
    assert sum(found.values()) == 200 and min(found.values()) > 20, found


def test_a_damaged_state_is_named_and_the_run_goes_on_from_the_one_before(whole: Path, tmp_path: Path, lorica: Lorica) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.json").unlink()
    for saved in states.states(run)[3:]:
        corrupt(saved, random.Random(1))
    code, printed = lorica("train", f"resume={run}")
    said = " ".join(printed.split())
    assert code == 0 and "resumed at micro-step 3" in said and "step-000000006.ckpt is damaged: its sha256 is not that of" in said, printed
    assert all(torch.equal(value, adapter(whole)[name]) for name, value in adapter(run).items())
    assert log_of(run) == log_of(whole)


@pytest.mark.faults
def test_damaged_best_weights_are_written_again_or_refused(
    whole: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.json").unlink()
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert lorica("predict", f"run={run}", "text=a text")[0] == 2
    code, printed = lorica("train", f"resume={run}")
    assert code == 0 and "adapter_model.safetensors is damaged" in printed and "written again from" in printed, printed
    assert all(torch.equal(value, adapter(whole)[name]) for name, value in adapter(run).items())
    (run / "metrics.json").unlink()
    (run / "adapter" / durable.MANIFEST).unlink()
    monkeypatch.setattr("lorica.resuming.states", SimpleNamespace(states=lambda run: []))
    code, printed = lorica("train", f"resume={run}")
    assert code == 2 and "whose state is gone" in printed, printed


@pytest.mark.faults
def test_nothing_intact_is_a_fresh_start_or_a_refusal(whole: Path, tmp_path: Path, lorica: Lorica) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.json").unlink()
    for saved in states.states(run):
        saved.write_bytes(b"")
    code, printed = lorica("train", *SHORT, *EVERY, "resume=required", f"run_dir={run}")
    assert code == 2 and "no unfinished run with an intact checkpoint" in printed and "is damaged" in printed


def test_a_state_that_names_code_is_refused(whole: Path, tmp_path: Path, lorica: Lorica) -> None:
    """Also with a right checksum."""
    run, mark = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(whole, run)
    (run / "metrics.json").unlink()
    last = states.last_state(run)
    assert last is not None

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(mark),)

    out = io.BytesIO()
    torch.save({"state_dict": Hostile()}, out)
    last.write_bytes(out.getvalue())
    states.manifest_of(last).write_text(durable.manifest({last.name: durable.sha256(last)}))
    code, printed = lorica("train", f"resume={run}")
    assert code == 2 and "is no state of this program" in printed and not mark.exists()


def test_a_manifest_can_t_name_what_is_outside_its_folder(tmp_path: Path) -> None:
    for name in ("../outside", "/etc/passwd", "a/../../b"):
        (tmp_path / durable.MANIFEST).write_text(durable.manifest({name: "0" * 64}))
        assert "outside its folder" in durable.damage(tmp_path / durable.MANIFEST)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_before_there_is_anything_to_save_is_said_to(
    signum: signal.Signals, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = fitting.prepare

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signum)
        inner(*args)

    monkeypatch.setattr(fitting, "prepare", interrupted)
    code, printed = lorica("train", *SHORT, f"run_dir={tmp_path / 'run'}")
    assert code == (130 if signum == signal.SIGINT else 75) and "before any state was saved" in printed, printed
