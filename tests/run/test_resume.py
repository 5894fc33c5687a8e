"""What a resumed run may and may not do: finish what was trained, refuse what differs, never report weights that were not trained."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica import callbacks, evaluation
from lorica.runs import Held

Lorica = Callable[..., tuple[int, str]]
SMALL = ("data.max_train_examples=24", "data.max_validation_examples=8", "data.max_test_examples=8", "trainer.log_every_n_steps=1")
SHORT = (*SMALL, "trainer.batch_size=4", "trainer.max_epochs=1")


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("power cut")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    from lorica.cli import main

    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.raises(SystemExit) as end:
        main("train", [*SHORT, f"run_dir={run}"])
    assert end.value.code == 0
    return run


def test_a_run_killed_in_its_test_pass_ends_with_all_its_figures(whole: Path, tmp_path: Path, lorica: Lorica) -> None:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, "test", _fail)
        assert lorica("train", *SHORT, f"run_dir={tmp_path / 'cut'}")[0] == 1
    code, printed = lorica("train", f"resume={tmp_path / 'cut'}")
    assert code == 0, printed
    ours, theirs = (json.loads((run / "metrics.json").read_text()) for run in (tmp_path / "cut", whole))
    assert ours.keys() == theirs.keys()
    for name in ("val/f1_macro_best", "train/best_step", "test/loss"):
        assert ours[name] == pytest.approx(theirs[name]), name
    assert ours["train/tokens_per_second"] > 0


def test_weights_that_were_never_written_are_taken_from_the_checkpoint(tmp_path: Path, lorica: Lorica) -> None:
    arguments = [*SHORT, "data.validation_fraction=0", "trainer.checkpoint_every_n_steps=3", f"run_dir={tmp_path / 'cut'}"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(callbacks.KeepBest, "write", _fail, raising=False)
        m.setattr("lorica.models.weights.save", _fail)
        assert lorica("train", *arguments)[0] == 1
    assert lorica("train", f"resume={tmp_path / 'cut'}")[0] == 0
    assert any(value.abs().max() > 0 for name, value in _weights(tmp_path / "cut").items() if "lora_B" in name)


def test_a_second_training_without_validation_keeps_its_own_weights(tmp_path: Path, lorica: Lorica) -> None:
    arguments = [*SHORT, "data.validation_fraction=0", "trainer.checkpoint_every_n_steps=null", f"run_dir={tmp_path / 'run'}"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, "test", _fail)
        assert lorica("train", *arguments)[0] == 1
    first = _weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    assert lorica("train", *arguments, "optimizer.lr=0.02")[0] == 0
    assert not all(torch.equal(first[name], value) for name, value in _weights(tmp_path / "run").items())


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off in its test pass, and the file of its rows."""
    from lorica.cli import main

    folder = tmp_path_factory.mktemp("cut")
    rows = [f"row number {i} is about {'sport' if i % 2 else 'trade'},{'AB'[i % 2]}" for i in range(60)]
    (folder / "rows.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit):
        m.setattr(evaluation, "test", _fail)
        main("train", [*SHORT, *_rows(folder / "rows.csv"), f"run_dir={folder / 'run'}"])
    assert (folder / "run" / "checkpoints").is_dir()
    return folder


def _rows(file: Path) -> list[str]:
    return ["data=classification", "data.source=files", f"data.path={file}"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed=7", "seed (0 then, 7 now)"),
        ("trainer.batch_size=3", "trainer.batch_size (4 then, 3 now)"),
        ("data.max_train_examples=20", "data.max_train_examples (24 then, 20 now)"),
        ("model.lora.r=4", "model.lora.r (8 then, 4 now)"),
        ("optimizer.lr=0.5", "optimizer.lr (0.002 then, 0.5 now)"),
        ("trainer.max_steps=2", "more than the 2 that are asked for now"),
        ("rows", "training rows (24, sha256"),
    ],
)
def test_another_plan_is_refused_and_the_run_stays_as_it_was(change: str, says: str, cut: Path, tmp_path: Path, lorica: Lorica) -> None:
    shutil.copytree(cut, tmp_path / "cut")
    run, rows = tmp_path / "cut" / "run", tmp_path / "cut" / "rows.csv"
    before = (run / "config.yaml").read_text()
    if change == "rows":
        rows.write_text(rows.read_text().replace("sport", "sports"))
        change = "logger=none"
    code, printed = lorica("train", *SHORT, *_rows(rows), change, "resume=auto", f"run_dir={run}")
    assert code == 2 and says in " ".join(printed.split()), printed
    assert (run / "config.yaml").read_text() == before and not (run / "metrics.json").exists()


def test_harmless_changes_go_on(cut: Path, tmp_path: Path, lorica: Lorica) -> None:
    shutil.copytree(cut, tmp_path / "cut")
    run, moved = tmp_path / "cut" / "run", tmp_path / "moved.csv"
    (tmp_path / "cut" / "rows.csv").rename(moved)
    cadence = ["trainer.log_every_n_steps=3", "trainer.keep_checkpoints=1", "trainer.checkpoint_every_n_steps=1"]
    code, printed = lorica(
        "train", *SHORT, *_rows(moved), "logger=wandb", *cadence, "trainer.max_epochs=2", "resume=auto", f"run_dir={run}"
    )
    assert code == 0 and "resumed at micro-step 6" in printed, printed
    assert [f.name for f in (run / "checkpoints").glob("*.ckpt")] == ["step-000000012.ckpt"]


def test_auto_says_when_it_is_fresh(tmp_path: Path, lorica: Lorica) -> None:
    code, printed = lorica("train", "debug=fast", "resume=auto", f"run_dir={tmp_path / 'run'}")
    assert code == 0 and "this one is fresh" in printed


def test_a_second_process_on_a_run_folder_is_refused(cut: Path, lorica: Lorica) -> None:
    held = Held(cut / "run")
    try:
        code, printed = lorica("train", f"resume={cut / 'run'}")
    finally:
        held.release()
    assert code == 2 and f"another process is training there (process {os.getpid()}" in printed


def test_an_earlier_starts_states_are_put_away(cut: Path, tmp_path: Path, lorica: Lorica) -> None:
    shutil.copytree(cut / "run", tmp_path / "run")
    code, printed = lorica("train", "debug=fast", f"run_dir={tmp_path / 'run'}")
    assert code == 0 and "an earlier start's states are now in" in " ".join(printed.split())
    assert list((tmp_path / "run" / "checkpoints.earlier-1").glob("step-*.ckpt"))


def test_the_same_command_names_the_run_that_it_left_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lorica: Lorica) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(evaluation, "test", _fail)
        assert lorica("train", "debug=fast", "trainer.checkpoint_every_n_steps=1")[0] == 1
    (cut,) = (p for p in (tmp_path / "outputs").glob("*/2*"))
    command = f"python train.py resume={cut.relative_to(tmp_path)}"
    assert command not in " ".join(lorica("train", "debug=fast", "trainer.checkpoint_every_n_steps=1", "seed=1")[1].split())
    held = Held(cut)
    assert command not in " ".join(lorica("train", "debug=fast", "trainer.checkpoint_every_n_steps=1")[1].split())
    held.release()
    lock, manifests = cut / ".hydra" / "lock", list((cut / "checkpoints").glob("*.sha256"))
    for hidden in ([lock], manifests):  # nothing that may be looked at, no state that is intact
        for part in hidden:
            part.rename(part.with_name(f"hidden-{part.name}"))
        assert command not in " ".join(lorica("train", "debug=fast", "trainer.checkpoint_every_n_steps=1")[1].split())
        for part in hidden:
            part.with_name(f"hidden-{part.name}").rename(part)
    code, printed = lorica("train", "debug=fast", "trainer.checkpoint_every_n_steps=1")
    assert code == 0 and f"{command} goes on with it; this one is fresh" in " ".join(printed.split())
    assert lorica("train", *command.split()[2:])[0] == 0


def test_no_step_is_logged_twice(tmp_path: Path, lorica: Lorica) -> None:
    steps = ["trainer.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=1", "trainer.checkpoint_every_n_steps=2"]
    record = callbacks.RecordLoss.on_train_batch_end

    def stop_at_5(self: callbacks.RecordLoss, trainer: Any, pl_module: Any, *rest: Any) -> None:
        record(self, trainer, pl_module, *rest)
        if trainer.global_step == 5:
            _fail()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(callbacks.RecordLoss, "on_train_batch_end", stop_at_5)
        assert lorica("train", *SMALL, *steps, f"run_dir={tmp_path / 'run'}")[0] == 1
    assert lorica("train", f"resume={tmp_path / 'run'}")[0] == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert logged == sorted(set(logged)) == list(range(1, 7))


def test_a_large_seed_trains(tmp_path: Path, lorica: Lorica) -> None:
    assert lorica("train", "debug=fast", "seed=4294967295", f"run_dir={tmp_path / 'run'}")[0] == 0
