"""A student learns its teacher's probabilities: they are asked once, belong to their rows and labels, and say what a run goes on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorica import caches, distillation, evaluation
from lorica.config import ClassificationDataConfig, ConfigError, DistillationConfig
from lorica.data.examples import Example
from lorica.data.registry import build_data
from lorica.screen import Screen

Lorica = Callable[..., tuple[int, str]]
LABELS = ["negative", "neutral", "positive"]
LIMITS = ("data=sentiment", "data.max_validation_examples=8", "data.max_test_examples=16", "data.min_label_examples=0")
SHORT = ("data.max_train_examples=24", "trainer.batch_size=4", "trainer.max_steps=6", "trainer.log_every_n_steps=1")
CPU = torch.device("cpu")
ROWS = [
    Example(f"file:{i}", text=text, label=i % 3, prompt="not the teacher's") for i, text in enumerate(("bad", "so so", "good, really", "x"))
]


def trained(folder: Path, *overrides: str) -> Path:
    from lorica.cli import main

    with pytest.raises(SystemExit) as end:
        main("train", [*LIMITS, "data.max_train_examples=24", "trainer.batch_size=4", *overrides, f"run_dir={folder}"])
    assert end.value.code == 0
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier after eight steps."""
    return trained(tmp_path_factory.mktemp("runs") / "teacher", "trainer.max_steps=8")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> Path:
    """A causal teacher, in 4 bits, after two steps."""
    model = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}"]
    return trained(tmp_path_factory.mktemp("runs") / "causal", *model, "trainer.max_steps=2")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "cache"))
    return caches.folder("teacher")


def found(run: Path, labels: Sequence[str] = LABELS) -> distillation.Teacher:
    return distillation.find(DistillationConfig(teacher=str(run)), labels)


def never(*_: object, **__: object) -> Any:
    raise AssertionError("the teacher is loaded")


# ------------------------------------------------------------------------------------------------------------ the asking


@pytest.mark.parametrize("kind", ["teacher", "causal"])
def test_scores_are_what_predict_says_before_calibration(
    kind: str, request: pytest.FixtureRequest, cache: Path, lorica: Lorica, tmp_path: Path
) -> None:
    run: Path = request.getfixturevalue(kind)
    lesson = distillation.ask(found(run), ROWS, LABELS, CPU, Screen())
    assert lesson.scores.shape == (4, 3) and lesson.scores.dtype == torch.float32 and lesson.found == 0
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f'"{e.text}"\n' for e in ROWS))
    assert not (run / "adapter" / "calibration.json").exists(), "or predict's would be tempered"
    assert lorica("predict", f"run={run}", f"input={tmp_path / 'rows.csv'}", f"output={tmp_path / 'out.jsonl'}")[0] == 0
    said = [json.loads(line)["probabilities"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, answer in zip(lesson.scores.exp().tolist(), said, strict=True):
        assert row == pytest.approx([answer[name] for name in LABELS], abs=1e-5)
    assert lesson.right == np.mean([max(a, key=a.__getitem__) == LABELS[e.label or 0] for a, e in zip(said, ROWS, strict=True)])


def test_labels_in_another_order_get_their_own_scores(teacher: Path, cache: Path) -> None:
    straight = distillation.ask(found(teacher), ROWS, LABELS, CPU, Screen()).scores
    turned = distillation.ask(found(teacher, LABELS[::-1]), ROWS, LABELS[::-1], CPU, Screen())
    assert turned.found == 4 and torch.equal(turned.scores, straight.flip(1))
    assert not torch.equal(straight, straight.flip(1))


def test_the_second_time_the_teacher_is_not_loaded(teacher: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = distillation.ask(found(teacher), ROWS, LABELS, CPU, Screen())
    monkeypatch.setattr(distillation, "load_trained", never)
    again = distillation.ask(found(teacher), ROWS, LABELS, CPU, Screen())
    assert torch.equal(first.scores, again.scores) and (again.found, again.seconds) == (4, 0.0)
    changed = [*ROWS[:3], Example("file:3", text="y", label=0)]
    with pytest.raises(AssertionError, match="is loaded"):
        distillation.ask(found(teacher), changed, LABELS, CPU, Screen())


def test_a_key_is_of_teacher_rows_order_and_device(teacher: Path, causal: Path) -> None:
    texts = [e.text for e in ROWS]
    keys = [
        distillation.key_of(found(teacher), "cpu", texts),
        distillation.key_of(found(teacher), "cpu", texts[::-1]),
        distillation.key_of(found(teacher), "cpu", [*texts[:3], "X"]),
        distillation.key_of(found(teacher), "cpu", texts[:3]),
        distillation.key_of(found(teacher), "cuda", texts),
        distillation.key_of(found(causal), "cpu", texts),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == distillation.key_of(found(teacher), "cpu", texts)


def test_what_was_asked_before_a_kill_is_not_asked_again(teacher: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "FEWER_ROWS", 2)
    whole = distillation.ask(found(teacher), ROWS, LABELS, CPU, Screen()).scores
    files = sorted(cache.iterdir())
    assert len(files) == 2
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-40])  # torn: asked again too
    assert distillation.ask(found(teacher), ROWS, LABELS, CPU, Screen()).found == 0
    next(cache.iterdir()).unlink()
    again = distillation.ask(found(teacher), ROWS, LABELS, CPU, Screen())
    assert again.found == 2 and torch.equal(again.scores, whole)


def test_scores_that_are_no_numbers_are_refused_and_not_kept(teacher: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation.Predictor, "log_probabilities", lambda self, items, done: np.full((len(items), 3), np.nan, np.float32))
    with pytest.raises(ConfigError, match="no numbers"):
        distillation.ask(found(teacher), ROWS, LABELS, CPU, Screen())
    assert not cache.exists() or not list(cache.iterdir())


# -------------------------------------------------------------------------------------------------------- which teacher


def test_a_teacher_of_other_labels_is_refused(teacher: Path) -> None:
    with pytest.raises(ConfigError, match=r"its labels are negative, neutral, positive; the data's are good, bad") as e:
        found(teacher, ["good", "bad"])
    assert e.value.where == "distillation.teacher" and e.value.fix


def test_an_unfinished_or_damaged_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(teacher, tmp_path / "copy")
    before = found(copy).digest
    assert before == found(teacher).digest, "where it lies does not matter"
    (copy / "metrics.json").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        found(copy)
    assert found(copy / "adapter").digest == before
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ConfigError, match="is damaged"):
        found(copy / "adapter")
    with pytest.raises(ConfigError, match="has no adapter or model") as e:
        found(tmp_path)
    assert e.value.where == "distillation.teacher"


def test_test_rows_that_the_teacher_may_have_seen_are_said(teacher: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((teacher / "config.yaml").read_text())["data"]
    data = build_data(ClassificationDataConfig(**settings), 0)
    data.load()
    assert distillation.doubt(found(teacher), data) == ""
    data.config.max_train_examples, data.seed = 5, 1  # the same rows are held out whatever is trained on
    assert distillation.doubt(found(teacher), data) == ""
    data.config.test_fraction = 0.3
    assert distillation.doubt(found(teacher), data) == "", "the rows themselves are those that the teacher was tested on"
    predictions = (teacher / "predictions.jsonl").read_text().splitlines(keepends=True)
    copy = shutil.copytree(teacher, tmp_path / "copy")
    (copy / "predictions.jsonl").write_text("".join(predictions[3:]))
    said = distillation.doubt(found(copy), data)
    assert "data.test_fraction" in said and "3 of the 16 test rows" in said
    (copy / "config.yaml").unlink()
    assert "is not known" in distillation.doubt(found(copy), data)


# -------------------------------------------------------------------------------------------------------------- training


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_a_distilled_run_learns_from_it_and_is_as_complete_as_another(
    teacher: Path, cache: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with a teacher are the same run, whether it is asked or read; without weight it is as if there were none."""
    runs, printed = {}, {}
    for name, taught in (
        ("alone", ["distillation.teacher=null"]),
        ("asked", [f"distillation.teacher={teacher}"]),
        ("read", [f"distillation.teacher={teacher}"]),
        ("weightless", [f"distillation.teacher={teacher}", "distillation.weight=0"]),
    ):
        with monkeypatch.context() as m:
            if name in ("read", "weightless"):
                m.setattr(distillation, "load_trained", never)
            code, printed[name] = lorica(
                "train", "experiment=distill_sentiment", *LIMITS[1:], *SHORT, *taught, f"run_dir={tmp_path / name}"
            )
        assert code == 0, printed[name]
        runs[name] = _weights(tmp_path / name)
    same = {(a, b): all(torch.equal(runs[a][k], runs[b][k]) for k in runs[a]) for a in runs for b in runs}
    assert same["asked", "read"] and same["alone", "weightless"] and not same["alone", "asked"]
    assert "asked about 24 training rows" in printed["asked"] and "24 from the cache" in printed["read"]
    assert "the teacher is not asked" in printed["weightless"] and "teacher" not in printed["alone"]
    names = {name: {p.name for p in (tmp_path / name).iterdir()} for name in runs}
    assert names["asked"] == names["alone"]
    metrics = {name: json.loads((tmp_path / name / "metrics.json").read_text()) for name in runs}
    assert set(metrics["asked"]) - set(metrics["alone"]) == {"time/teacher_seconds"}
    assert set(metrics["alone"]) <= set(metrics["asked"])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "accumulate"), [(1, 12), (4, 3), (12, 1)])
def test_a_step_of_twelve_rows_has_one_gradient(
    size: int, accumulate: int, causal: Path, cache: Path, tmp_path: Path, lorica: Lorica
) -> None:
    """30 rows: two steps of 12, and a last one of 6."""
    batches = [f"trainer.batch_size={size}", f"trainer.accumulate_grad_batches={accumulate}", "trainer.group_by_length=false"]
    soft = [f"distillation.teacher={causal}", "distillation.weight=0.7", "distillation.temperature=4", "data.max_train_examples=30"]
    code, printed = lorica(
        "train", "debug=accumulation", *LIMITS, *soft, *batches, "trainer.accelerator=cpu", f"run_dir={tmp_path / 'run'}"
    )
    assert code == 0 and "equal: in" in printed, printed
    windows = json.loads((tmp_path / "run" / "accumulation.json").read_text())["windows"]
    assert [w["rows"] for w in windows] == [12, 6]
    assert all(max(w["ours"], w["loss"]) < 1e-5 for w in windows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("distillation.temperature=3", "distillation.temperature (2.0 then, 3.0 now)"),
        ("distillation.weight=0.9", "distillation.weight (0.5 then, 0.9 now)"),
        ("distillation.teacher=null", "teacher (sha256"),
        ("another teacher", "teacher (sha256"),
        ("a moved teacher", ""),
    ],
)
def test_a_run_goes_on_with_the_same_teacher_only(
    change: str, says: str, teacher: Path, causal: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    arguments = [*LIMITS, *SHORT, f"distillation.teacher={teacher}", f"run_dir={run}"]

    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("power cut")

    with monkeypatch.context() as m:
        m.setattr(evaluation, "test", fail)
        assert lorica("train", *arguments)[0] == 1
    if change == "another teacher":
        change = f"distillation.teacher={causal}"
    elif change == "a moved teacher":
        change = f"distillation.teacher={shutil.copytree(teacher, tmp_path / 'moved')}"
    code, printed = lorica("train", *arguments, change, "resume=required")
    assert (code == 2 and says in " ".join(printed.split())) if says else code == 0, printed
