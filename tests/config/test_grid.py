"""A grid plans every combination once and refuses it before anything runs; each run is a process with its own folder; what is done
stays done, what failed runs again, and the table puts the best validation figure first."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lorica import cells, cli, composition
from lorica.cells import Cell
from lorica.config import ConfigError, NotApplicable
from lorica.grid import plan_cells, run_grid

Metrics = dict[str, float]


def compose(cell: list[str]) -> Any:
    return composition.compose("train", cell)


def varied(overrides: list[str]) -> list[tuple[str, ...]]:
    return [cell.varied for cell in plan_cells(overrides, compose)[0]]


# -------------------------------------------------------------------------------------------------------------- planning


def test_every_combination_is_planned_once_in_order() -> None:
    cells, dropped = plan_cells(["seed=1,2", "data=sentiment", "model.lora.r=4,8"], compose)
    assert [c.varied for c in cells] == [
        ("seed=1", "model.lora.r=4"),
        ("seed=1", "model.lora.r=8"),
        ("seed=2", "model.lora.r=4"),
        ("seed=2", "model.lora.r=8"),
    ]
    assert cells[0].overrides == ("seed=1", "data=sentiment", "model.lora.r=4")
    assert dropped == []


def test_a_teacher_behind_a_link_that_the_grid_will_move_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    for line in (f"distillation.teacher={tmp_path / 'latest'}", f"distillation.teacher=null,{tmp_path / 'latest'}"):
        with pytest.raises(ConfigError, match="points elsewhere") as e:
            plan_cells(["data=sentiment", "seed=1,2", line], compose)
        assert e.value.fix == f"distillation.teacher={tmp_path / 'run'}"
    assert len(plan_cells(["data=sentiment", "seed=1,2", e.value.fix], compose)[0]) == 2


def test_a_swept_key_of_a_group_that_is_given_before_it_applies() -> None:
    given = ["model=mistral_lora", "data=sentiment", "model.quantization={bnb_4bit_quant_type: nf4}"]
    cells, dropped = plan_cells([*given, "model.quantization.bnb_4bit_use_double_quant=true,false"], compose)
    assert dropped == []
    assert [compose(list(c.overrides)).model.quantization.bnb_4bit_use_double_quant for c in cells] == [True, False]


def test_a_key_that_a_model_has_no_use_for_is_left_out_and_said() -> None:
    cells, dropped = plan_cells(["model=roberta_lora,roberta_full", "data=ag_news", "model.lora.r=8,16"], compose)
    assert [c.varied for c in cells] == [
        ("model=roberta_lora", "model.lora.r=8"),
        ("model=roberta_lora", "model.lora.r=16"),
        ("model=roberta_full",),
    ]
    assert dropped == ["model.lora.r does not apply to model=roberta_full"]


def test_several_useless_keys_are_left_out_of_one_cell() -> None:
    assert varied(["model=minilm_lora,minilm_full", "model.lora.r=4,8", "model.lora.lora_alpha=8,16"])[-1] == ("model=minilm_full",)
    cells, dropped = plan_cells(["logger=csv,wandb", "+logger.project=a,b"], compose)
    assert [c.varied for c in cells] == [("logger=csv",), ("logger=wandb", "+logger.project=a"), ("logger=wandb", "+logger.project=b")]
    assert dropped == ["logger.project does not apply to logger=csv"]


def test_hydras_ways_of_writing_several_values() -> None:
    assert varied(["seed=range(1,4)"]) == [("seed=1",), ("seed=2",), ("seed=3",)]
    assert varied(["seed=choice(5,7)"]) == [("seed=5",), ("seed=7",)]
    assert varied(["model.lora.target_modules=[query],[query,key]"]) == [
        ("model.lora.target_modules=[query]",),
        ("model.lora.target_modules=[query,key]",),
    ]
    texts = varied(['data.prompt_template="A {text}: ","B, {text}: "'])
    assert [compose(list(v)).data.prompt_template for v in texts] == ["A {text}: ", "B, {text}: "]
    assert varied(["seed=1"]) == [()]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.lora.r=8,0"], "model.lora.r=0: must be at least 1"),
        (["model=roberta_lora,robert_full"], "model=robert_full: must be one of"),
        (["model=roberta_lora,mistral_qlora", "data=chat,sentiment"], "model=roberta_lora: is a classifier, and data=chat"),
        (["seed=1,2", "optimizer.lr=abc"], "optimizer.lr=abc: must be a number"),
        (["seed=1,2", "data.path={x"], "data.path={x: can't be read"),
        (["seed=1,2", "~data.path"], "~data.path: keys can't be removed"),
        (["seed=1,2", "run_dir=x"], "run_dir=x: a grid sets it"),
        (["seed=1,2", "~run_dir"], "run_dir"),
        (["run_dir=x,y"], "run_dir=x,y: a grid sets it"),
        (["seed=1,2", "resume=required"], "resume=required: a grid sets it"),
        (["seed=1,2", "logger=wandb", "logger.run_name=x"], "logger.run_name=x: a grid sets it"),
    ],
)
def test_a_bad_cell_is_refused_before_anything_runs(
    overrides: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cells, "_call", lambda *a: pytest.fail("ran"))
    with pytest.raises(ConfigError) as e:
        run_grid(overrides, compose)
    assert says in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_useless_key_that_is_not_swept_is_refused() -> None:
    with pytest.raises(NotApplicable, match=r"model\.lora\.r=8: model\.lora is null"):
        plan_cells(["model=roberta_lora,roberta_full", "model.lora.r=8"], compose)


def test_cells_have_names_of_their_own_that_are_folder_names() -> None:
    cells, _ = plan_cells(["model=roberta_lora,roberta_full", "model.lora.r=8,16"], compose)
    assert [c.name for c in cells] == ["roberta_lora,r=8", "roberta_lora,r=16", "roberta_full"]
    values = ["a/b", "a_b", "a b", "a:b", "../../b", "x" * 200, "x" * 200 + "y", 'é"', "[a,b]"]
    names = [Cell((), (f"data.path={v}",)).name for v in values]
    assert len({n.lower() for n in names}) == len(values)
    assert all("/" not in n and len(n.encode()) <= 255 for n in names)
    assert Cell(("seed=1",), ()).name == "only"


# --------------------------------------------------------------------------------------------------------------- running


class Runs:
    """Stands for the process of a cell: writes what a run of `lorica train` writes, or fails."""

    def __init__(self, metrics: Callable[[Any], Metrics | int]) -> None:
        self.metrics = metrics  # of a cell's configuration: its figures, or the exit code of a failure
        self.commands: list[list[str]] = []
        self.configs: list[Any] = []
        self.stderr: list[str] = []  # of a failure

    def __call__(self, command: list[str], env: dict[str, str]) -> tuple[int, list[str]]:
        assert command[:4] == [sys.executable, "-m", "lorica", "train"]
        assert str(Path(cells.__file__).parents[1]) in env["PYTHONPATH"].split(":")
        overrides, flags = cli._split(command[4:])
        config = composition.compose("train", overrides, flags["config_dir"])
        self.commands.append(command)
        self.configs.append(config)
        result = self.metrics(config)
        folder = Path(config.run_dir)
        if isinstance(result, int):
            return result, self.stderr
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(result | {"train/seconds": 3.0, "memory/peak_gib": 0.5}), "utf-8")
        return 0, []

    @property
    def seeds(self) -> list[int]:
        return [c.seed for c in self.configs]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Metrics | int]], Runs]:
    def stub(metrics: Callable[[Any], Metrics | int]) -> Runs:
        runs = Runs(metrics)
        monkeypatch.setattr(cells, "_call", runs)
        return runs

    return stub


def table(shown: str) -> list[str]:
    """First column of the rows of the closing table."""
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows
    return rows


def records(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("outputs/grids/*/grid.json")
    return list(json.loads(file.read_text("utf-8"))["cells"])


def test_each_cell_is_a_process_with_its_own_folder(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = start(lambda config: {"val/loss_best": 1.0})
    assert run_grid(["seed=1,2", "model=minilm_full"], compose) == 0
    assert [(c.seed, c.model.name, c.resume) for c in runs.configs] == [(1, "minilm_full", "auto"), (2, "minilm_full", "auto")]
    folders = [Path(c.run_dir) for c in runs.configs]
    assert [f.name for f in folders] == ["seed=1", "seed=2"] and folders[0].parent == folders[1].parent
    assert folders[0].parent.parent == Path("outputs/grids")
    assert {r["cell"]: r["run"] for r in records(here)} == {"seed=1": str(folders[0]), "seed=2": str(folders[1])}
    assert "failed" not in capsys.readouterr().out


def test_rows_are_looked_at_before_any_run_and_not_for_those_that_are_done(
    start: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = start(lambda config: {"val/loss_best": 1.0})
    (here / "rows.csv").write_text("text,label\nfine,good\npoor,bad\n")
    grid = ["seed=1,2", "data=classification", "data.path=rows.csv"]
    with pytest.raises(ConfigError, match=r"data\.label_column=stars: the train file has no such column"):
        run_grid([*grid, "data.label_column=stars"], compose)
    assert runs.seeds == []
    assert run_grid(grid, compose) == 0
    (here / "rows.csv").write_text("other\nfine\n")
    assert run_grid(grid, compose) == 0
    assert runs.seeds == [1, 2] and capsys.readouterr().out.count("done before") == 2


def test_a_dropped_key_is_said_before_the_runs(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = start(lambda config: {"val/loss_best": 1.0})
    assert run_grid(["model=minilm_lora,minilm_full", "model.lora.r=4,8"], compose) == 0
    shown = capsys.readouterr().out
    assert shown.index("note: model.lora.r does not apply to model=minilm_full") < shown.index("3 runs") < shown.index("[1/3]")
    assert [c.model.lora and c.model.lora.r for c in runs.configs] == [4, 8, None]


def test_a_failed_cell_is_recorded_and_only_it_runs_again(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = start(lambda config: 1 if config.seed == 2 else {"val/loss_best": float(config.seed)})
    assert run_grid(["seed=1,2,3"], compose) == 1
    assert runs.seeds == [1, 2, 3]
    failed = here / runs.configs[1].run_dir / "failed.json"
    assert json.loads(failed.read_text("utf-8")) == {"exit_code": 1, "overrides": ["seed=2"], "stderr": []}
    assert [r["failed"] for r in records(here)] == [False, True, False]
    shown = capsys.readouterr().out
    assert table(shown) == ["seed=1", "seed=3", "seed=2"] and "1 of 3 failed" in shown

    again = start(lambda config: {"val/loss_best": 0.5})
    assert run_grid(["seed=1,2,3"], compose) == 0
    assert again.seeds == [2] and again.configs[0].run_dir == runs.configs[1].run_dir
    assert not failed.exists()
    assert [r["failed"] for r in records(here)] == [False, False, False]
    shown = capsys.readouterr().out
    assert table(shown) == ["seed=2", "seed=1", "seed=3"] and shown.count("done before") == 2


def test_the_order_of_the_overrides_does_not_make_another_grid(start: Any, here: Path) -> None:
    start(lambda config: {"val/loss_best": 1.0})
    assert run_grid(["seed=1,2", "data=sentiment"], compose) == 0
    again = start(lambda config: pytest.fail("ran again"))
    assert run_grid(["data=sentiment", "seed=1,2"], compose) == 0
    assert again.commands == []


def test_another_config_dir_is_another_grid(start: Any, here: Path) -> None:
    for name in ("a", "b"):
        (here / name).mkdir()
        runs = start(lambda config: {"val/loss_best": 1.0})
        assert run_grid(["seed=1,2"], compose, str(here / name)) == 0
        assert runs.seeds == [1, 2]


def test_the_order_of_two_values_for_one_key_makes_another_grid(start: Any, here: Path) -> None:
    for typed, limit in ((["trainer.max_steps=1", "trainer.max_steps=2"], 2), (["trainer.max_steps=2", "trainer.max_steps=1"], 1)):
        runs = start(lambda config: {"val/loss_best": 1.0})
        assert run_grid(["seed=1", *typed], compose) == 0
        assert [c.trainer.max_steps for c in runs.configs] == [limit]


def test_a_killed_cell_is_a_failure(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(lambda config: -9)
    assert run_grid(["seed=1"], compose) == 1
    assert records(here)[0]["failed"] is True
    assert "only: killed by SIGKILL" in capsys.readouterr().out


def test_a_refused_cell_says_why_at_the_end_and_in_its_folder(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = start(lambda config: 2 if config.seed == 2 else {"val/loss_best": 1.0})
    runs.stderr = ["a warning", "lorica: data.path=x.csv: 3 rows can't be used", "  try: mend them", "HF_TOKEN=hf_0123456789abcdefghij"]
    assert run_grid(["seed=1,2"], compose) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 failed:\n  seed=2: data.path=x.csv: 3 rows can't be used\n      try: mend them" in shown and "train.log" not in shown
    kept = json.loads((here / runs.configs[1].run_dir / "failed.json").read_text("utf-8"))["stderr"]
    assert kept[:3] == runs.stderr[:3] and "hf_0" not in kept[3]


def test_a_run_that_broke_down_points_to_its_log(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks_down(config: Any) -> int:
        Path(config.run_dir).mkdir(parents=True)
        (Path(config.run_dir) / "train.log").write_text("Traceback", "utf-8")
        return 1

    runs = start(breaks_down)
    assert run_grid(["seed=1"], compose) == 1
    assert f"only: {runs.configs[0].run_dir}/train.log says why" in capsys.readouterr().out


def test_a_process_that_dies_before_its_log_shows_its_last_line(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = start(lambda config: 1)
    runs.stderr = ["Traceback", "ImportError: no torch"]
    assert run_grid(["seed=1"], compose) == 1
    assert "only: ended with exit code 1: ImportError: no torch" in capsys.readouterr().out


def test_stderr_of_a_process_is_shown_and_its_end_kept(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys; [print(f'line {i} \\u00fc', file=sys.stderr) for i in range(50)]; print('out'); sys.exit(3)"
    code, last = cells._call([sys.executable, "-c", program], {"PYTHONIOENCODING": "utf-8"})
    shown = capfd.readouterr()
    assert (code, len(last), last[-1], shown.out) == (3, cells.KEPT_LINES, "line 49 ü", "out\n")
    assert shown.err.splitlines() == [f"line {i} ü" for i in range(50)]
    begun = time.perf_counter()
    orphan = (
        "import subprocess, sys; print('so', file=sys.stderr); subprocess.Popen(['sleep', '8'], stdout=subprocess.DEVNULL); sys.exit(2)"
    )
    assert cells._call([sys.executable, "-c", orphan], dict(os.environ)) == (2, ["so"])
    assert time.perf_counter() - begun < 7.5


def test_an_interrupt_ends_the_grid_and_the_next_call_goes_on(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = start(lambda config: 130 if config.seed == 2 else {"val/loss_best": 1.0})
    assert run_grid(["seed=1,2,3"], compose) == 130
    assert runs.seeds == [1, 2] and "goes on with the runs that are not done" in capsys.readouterr().out
    again = start(lambda config: {"val/loss_best": 1.0})
    assert run_grid(["seed=1,2,3"], compose) == 0
    assert again.seeds == [2, 3]


@pytest.mark.parametrize(
    ("monitor", "order"),
    [("val/loss", ["seed=2", "seed=3", "seed=1"]), ("val/accuracy", ["seed=1", "seed=3", "seed=2"])],
)
def test_the_table_puts_the_best_validation_figure_first(
    monitor: str, order: list[str], start: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {1: 0.9, 2: 0.2, 3: 0.5}
    # the test figures are the other way round: they must not choose
    start(lambda config: {f"{monitor}_best": figures[config.seed], "test/accuracy": 1 - figures[config.seed], "test/loss": 1.0})
    assert run_grid(["seed=1,2,3"], compose) == 0
    shown = capsys.readouterr().out
    assert table(shown) == order
    assert monitor in shown and [r["monitor"] for r in records(here)] == [monitor] * 3


def test_a_figure_that_is_not_a_number_comes_last(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(lambda config: {"val/loss_best": None if config.seed == 1 else 0.3})
    assert run_grid(["seed=1,2"], compose) == 0
    assert table(capsys.readouterr().out) == ["seed=2", "seed=1"]


def test_a_run_without_validation_is_in_the_table(start: Any, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(lambda config: {"test/loss": 0.3})
    assert run_grid(["seed=1,2"], compose) == 0
    assert table(capsys.readouterr().out) == ["seed=1", "seed=2"]


def test_runs_on_wandb_share_a_group_and_have_the_cells_names(start: Any, here: Path) -> None:
    runs = start(lambda config: {"val/loss_best": 1.0})
    assert run_grid(["logger=wandb", "seed=1,2"], compose) == 0
    assert [c.logger.run_name for c in runs.configs] == ["seed=1", "seed=2"]
    assert len({c.logger.group for c in runs.configs}) == 1 and runs.configs[0].logger.group.startswith("grid-")
    named = start(lambda config: {"val/loss_best": 1.0})
    assert run_grid(["logger=wandb", "seed=1,2", "logger.group=mine"], compose) == 0
    assert [c.logger.group for c in named.configs] == ["mine", "mine"]


def test_names_that_need_quotes_reach_the_run_as_they_are(start: Any, here: Path) -> None:
    runs = start(lambda config: {"val/loss_best": 1.0})
    assert run_grid(['data.prompt_template="Größe, {text}: ","Was? {text} = "', "logger=wandb"], compose) == 0
    assert [c.data.prompt_template for c in runs.configs] == ["Größe, {text}: ", "Was? {text} = "]
    assert [Path(c.run_dir).name for c in runs.configs] == [c.logger.run_name for c in runs.configs]
    assert [r["failed"] for r in records(here)] == [False, False]


def test_the_config_dir_is_passed_on(start: Any, here: Path) -> None:
    (here / "more" / "data").mkdir(parents=True)
    (here / "more" / "data" / "tweets.yaml").write_text("defaults: [sentiment]\nname: tweets\n", "utf-8")
    runs = start(lambda config: {"val/loss_best": 1.0})
    with pytest.raises(SystemExit) as end:
        cli.main("train", ["-m", "--config-dir", "more", "data=tweets,sentiment"])
    assert end.value.code == 0
    assert all(command[4:6] == ["--config-dir", str(here / "more")] for command in runs.commands)
    assert [c.data.name for c in runs.configs] == ["tweets", "sentiment"]


def test_what_a_cell_is_called_with_is_hydras_grammar(start: Any, here: Path) -> None:
    runs = start(lambda config: {"val/loss_best": 1.0})
    run_grid(["model.lora.target_modules=[query],[query,key]", "data.labels=[a,b,c,d]"], compose)
    parser = OverridesParser.create()
    for command in runs.commands:
        for override in command[4:]:
            assert not parser.parse_override(override).is_sweep_override()
    assert [c.model.lora.target_modules for c in runs.configs] == [["query"], ["query", "key"]]
