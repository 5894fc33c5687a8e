"""The command line itself: its help, completions and exit codes, what it looks at before a verb is imported, how one is imported."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorica
from lorica import cli, composition, help_screen, options
from lorica.config import ConfigError, TrainConfig
from lorica.runs import to_yaml

OPTIONS = options.group_options()


def compose(*args: str) -> TrainConfig:
    config = composition.compose("train", args)
    assert isinstance(config, TrainConfig)
    return config


# --------------------------------------------------------------------------------------------------------- what is shown


def test_cfg_job_shows_a_configuration_that_composes_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main("train", ["experiment=chatdoctor", "--cfg", "job"])
    assert end.value.code == 0
    folder = tmp_path / "shown"
    folder.mkdir()
    (folder / "config.yaml").write_text(capsys.readouterr().out, "utf-8")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-000003.ckpt").touch()
    assert dataclasses.replace(compose(f"resume={folder}"), resume=None, run_dir=None) == compose("experiment=chatdoctor")


def test_help_names_every_group_option_and_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in composition.VERBS:
        with pytest.raises(SystemExit) as end:
            cli.main(verb, ["--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        for key in options.schema_keys(composition.VERBS[verb]):
            if not key.startswith(("model.quantization.", "data.", "logger.")):
                line = next(line for line in shown.splitlines() if line.startswith(f"  {key}="))
                assert f"  {meanings(composition.VERBS[verb])[key]}" in line
        for group, names in OPTIONS.items() if verb == "train" else ():
            assert f"{group}: {', '.join(names)}" in shown


def meanings(schema: type, prefix: str = "") -> dict[str, str]:
    """What the schema says of each key."""
    found = {}
    for f, inner in options.fields_of(schema):
        found |= meanings(inner, f"{prefix}{f.name}.") if inner else {f"{prefix}{f.name}": f.metadata["meaning"]}
    return found


def test_help_shows_keys_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main("train", ["--help", "data=sentiment", "model.lora.r=4", "data.labels=[bad,good]", "model.quantization=null"])
    lines = capsys.readouterr().out.splitlines()
    assert "  model.lora.r=4                                rank of the update; at least 1" in lines
    assert any(line.startswith("  data.labels=[bad,good]  ") for line in lines)
    shown = [line.split()[0] for line in lines if line.startswith(("  model.", "  trainer.", "  optimizer."))]
    assert dataclasses.asdict(compose("data=sentiment", *shown, "data.labels=[bad,good]")) == dataclasses.asdict(
        compose("data=sentiment", "model.lora.r=4", "data.labels=[bad,good]")
    )


def test_help_on_a_terminal_breaks_lines_at_words() -> None:
    keys = [("model.lora.r=8", "rank " * 40), ("data.license=" + "long " * 12, "of the rows")]
    for width in (60, 100, 160):
        lines = list(help_screen.laid_out(iter(keys), width))
        assert all(len(part) <= width for part in "\n".join(lines).splitlines() if "license" not in part)
        assert "\n".join(lines).split() == " ".join(f"{key} {meaning}" for key, meaning in keys).split()
    assert len("\n".join(help_screen.laid_out(iter(keys), None)).splitlines()) == 2


def test_the_program_without_a_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for args, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as end:
            cli.main(None, args)
        assert end.value.code == code
        assert "train, predict, merge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train.py model=rob", "model=roberta_full model=roberta_lora model=roberta_qlora"),
        ("train.py see", "seed="),
        ("train.py data=sentiment trainer.max_", "trainer.max_epochs= trainer.max_skipped_steps= trainer.max_steps="),
        ("train.py logger=wandb logger.pro", "logger.project="),
        ("predict.py te", "text= text_column="),
    ],
)
def test_the_shell_completes_options_and_keys(typed: str, offered: str) -> None:
    script = Path(__file__).resolve().parents[2] / typed.split()[0]
    environment = {**os.environ, "COMP_LINE": f"python {typed}", "COMP_POINT": str(len(f"python {typed}"))}
    done = subprocess.run([sys.executable, str(script), "-sc", "query=bash"], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, offered), done.stderr


# ---------------------------------------------------------------------------------------------------- before and after a verb


def test_a_run_goes_on_where_its_files_are_elsewhere_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.csv").write_text("text,label\nfine,good\npoor,bad\n" * 20)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-000003.ckpt").touch()
    (run / "config.yaml").write_text(to_yaml(compose("data=classification", "data.path=old.csv")), "utf-8")
    (tmp_path / "old.csv").rename(tmp_path / "new.csv")
    (tmp_path / "verb.py").write_text("def run(config):\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.RUNNERS, "train", "verb")
    for more, code in (["data.path=new.csv"], 7), (["data.path=new.csv", "optimizer.lr=1"], 2):
        with pytest.raises(SystemExit) as end:
            cli.main("train", [f"resume={run}", *more])
        assert end.value.code == code


def test_a_report_of_fewer_rows_than_a_step_takes_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.csv").write_text("text,label\nfine,good\npoor,bad\n")
    (tmp_path / "verb.py").write_text("def run(config):\n    return 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.RUNNERS, "train", "verb")
    for more, code in (["data.report_only=true"], 7), ([], 2):
        with pytest.raises(SystemExit) as end:
            cli.main("train", ["data=classification", f"data.path={tmp_path / 'small.csv'}", "trainer.batch_size=16", *more])
        assert end.value.code == code


def test_a_verb_is_imported_without_looking_for_garbage_and_run_with_it(tmp_path: Path) -> None:
    (tmp_path / "verb.py").write_text(
        "import gc\nAT_IMPORT = gc.isenabled()\ndef run(config):\n    print(AT_IMPORT, gc.isenabled())\n    return 0\n"
    )
    (tmp_path / "program.py").write_text(
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(before < gc.get_freeze_count(), gc.isenabled()))\n"  # the last to be called, when all is frozen
        f"sys.path.insert(0, {str(Path(cli.__file__).parents[1])!r})\n"
        "from lorica import cli\n"
        "cli.RUNNERS['train'], before = 'verb', gc.get_freeze_count()\n"
        "cli.main('train', [])\n"
    )
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["False", "True", "True", "True"], done.stderr


def test_a_reader_that_stops_early_sees_no_traceback() -> None:
    script = Path(__file__).resolve().parents[2] / "train.py"
    with subprocess.Popen([sys.executable, str(script), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # `--help | head`, before the first line
        assert process.stderr.read() == b""


def test_brackets_within_quotes_are_no_cut_lists() -> None:
    composition.refuse_cut("train", ['data.prompt_template="[INST {text}"', 'data.prompt_template_with_input="{prompt} {input}]"'])
    with pytest.raises(ConfigError, match="a shell cuts it at its spaces"):
        composition.refuse_cut("train", ["model.lora.target_modules=[query,", "value]"])


@pytest.mark.parametrize("verb", [None, "train"])
def test_the_version_is_said(verb: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(verb, ["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"lorica {lorica.__version__}\n"
