"""Hostile configuration: on the command line, in a folder of groups, in the config.yaml of a run. Each ends in one clear message."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorica.cli import main
from lorica.composition import compose
from lorica.runs import to_yaml

BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(12))
DOUBLING = "model:\n  name: ${data.name}${data.name}\ndata:\n  name: ${model.base}${model.base}\n"


def refused(verb: str, args: list[str], capsys: pytest.CaptureFixture[str], *says: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(SystemExit) as end:
        main(verb, args)
    shown = capsys.readouterr()
    assert end.value.code == 2 and shown.err.startswith("lorica: ") and "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= 5 and time.perf_counter() - begun < 5
    for part in says:
        assert part in shown.err, shown.err
    assert "a-value-that-only-the-environment-has" not in shown.out + shown.err


TYPED = {
    "target of the model": ("model._target_=evil.run", "can name code"),
    "target with a plus": ("+model._target_=evil.run", "can name code"),
    "target in a dictionary": ("model={_target_: evil.run}", "can name code"),
    "target in a value of any type": ("model.lora.target_modules={_target_: evil.run}", "can name code"),
    "target in a list": ("trainer.devices=[{_target_: evil.run}]", "can name code"),
    "partial": ("trainer.val_check_interval={_partial_: true}", "can name code"),
    "callbacks": ("trainer.callbacks=[evil.Callback]", "there is no such key"),
    "plugins": ("trainer.plugins=evil.Plugin", "there is no such key"),
    "strategy by a path": ("trainer.strategy=evil.Strategy", "must be one of"),
    "module by a path": ("data.module=evil:Data", "must be one of"),
    "module by an import": ("data.module=evil_package.data", "must be one of"),
    "optimiser by a path": ("optimizer.name=evil.Adam", "must be one of"),
    "schedule by a path": ("optimizer.lr_scheduler_type=evil.schedule", "must be one of"),
    "attention from a hub": ("model.attn_implementation=someone/evil-kernel", "must be one of"),
    "remote code": ("model.trust_remote_code=true", "code that comes with weights is never run"),
    "hydra's search path": ("hydra.searchpath=[pkg://evil_package]", "there is no such"),
    "hydra's launcher": ("hydra/launcher=evil", "there is no such"),
    "hydra's callbacks": ("+hydra.callbacks.x._target_=evil.run", "can name code"),
    "environment": ("run_dir=${oc.env:HOSTILE_WISH}", "the resolver oc.env"),
    "environment in a text": ("data.prompt_template='{text} ${oc.env:HOSTILE_WISH}'", "the resolver oc.env"),
    "environment with spaces": ("run_dir='${ oc.env : HOSTILE_WISH }'", "the resolver oc.env"),
    "decoded": ("run_dir='${oc.decode:${seed}}'", "run_dir"),
    "nested reference": ("run_dir='${model.${data.name}}'", "run_dir"),
    "reference to a reference": ("run_dir='${model.base}${model.base}' | model.base=${data.name}", "run_dir"),
    "reference to itself": ("run_dir=${run_dir}", "run_dir"),
    "python's format": ("model.name='{0.__class__}'", "part of the run folder's name"),
    "run folder by a name that climbs": ("model.name=../../outside", "part of the run folder's name"),
    "run folder by another name that climbs": ("data.name=..", "part of the run folder's name"),
    "secret as a key": ("logger.api_key=0123456789abcdef", "secrets are never"),
    "patterns as layers": ("model.lora.target_modules='(a+)+$'", "must be a list of layer names"),
}


@pytest.mark.parametrize(("typed", "says"), TYPED.values(), ids=TYPED)
def test_hostile_overrides(typed: str, says: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused("train", typed.split(" | "), capsys, says)


GROUPS = {
    "python object": ("seed: !!python/object/apply:os.system ['touch $CANARY']\n", "tags can name code"),
    "python name": ("seed: !!python/name:evil.run\n", "tags can name code"),
    "python module": ("seed: !!python/module:evil\n", "tags can name code"),
    "new python object": ("seed: !!python/object/new:evil.run {}\n", "tags can name code"),
    "tag by its full name": ("seed: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch $CANARY']\n", "tags can name code"),
    "tag by a short hand": ("%TAG !e! tag:yaml.org,2002:python/\n--- !e!name:evil.run\n", "tags can name code"),
    "tag of one's own": ("seed: !evil 3\n", "tags can name code"),
    "target": ("model:\n  lora:\n    target_modules:\n      _target_: evil.run\n", "can name code"),
    "bomb of aliases": (BOMB, "anchor or alias"),
    "alias to itself": ("a: &a [*a]\n", "anchor or alias"),
    "deep lists": ("a: " + "[" * 20_000 + "]" * 20_000, "nested more than"),
    "deep keys": ("".join(" " * i + "a:\n" for i in range(200)), "nested more than"),
    "huge file": ("# " + "x" * (2 << 20) + "\n", "more than 1,048,576 bytes"),
    "number of ten thousand digits": ("seed: " + "9" * 10_000 + "\n", "can't be read"),
    "date that isn't": ("seed: 2001-99-99\n", "can't be read"),
    "no text": ("\0\0\1\xff", "is damaged"),
    "environment": ("run_dir: ${oc.env:HOSTILE_WISH}\n", "the resolver oc.env"),
    "environment in a default": ("defaults:\n- /model: ${oc.env:HOSTILE_WISH}\n", "the resolver oc.env"),
    "doubling references": (DOUBLING, "which is a reference itself"),
    "search path": ("hydra:\n  searchpath: [pkg://evil_package]\n", "hydra"),
    "file outside": ("defaults:\n- /../../bomb\n", ""),
    "launcher": ("defaults:\n- override /hydra/launcher: evil\n", ""),
}


@pytest.mark.parametrize(("text", "says"), GROUPS.values(), ids=GROUPS)
def test_hostile_files_of_a_folder_of_groups(text: str, says: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "more" / "experiment").mkdir(parents=True)
    (work / "bomb.yaml").write_text(BOMB)
    head = "# @package _global_\n" if not text.startswith("%") else ""
    (work / "more" / "experiment" / "hostile.yaml").write_text(head + text, "latin-1")
    refused("train", ["--config-dir", "more", "experiment=hostile", "run_dir=here"], capsys, says)
    assert not (work / "here").exists()


def _with(**values: Any) -> str:
    config = yaml.safe_load(to_yaml(compose("train", [])))
    for name, value in values.items():
        section, _, key = name.partition("__")
        if key:
            config[section][key] = value
        else:
            config[section] = value
    return yaml.safe_dump(config)


RUNS = {
    "python object": (lambda: _with() + "more: !!python/object/apply:os.system ['touch $CANARY']\n", "tags can name code"),
    "bomb of aliases": (lambda: _with() + BOMB, "anchor or alias"),
    "target": (lambda: _with(_target_="evil.run"), "can name code"),
    "target in a section": (lambda: _with(trainer___target_="evil.run"), "can name code"),
    "module by a path": (lambda: _with(data__module="evil:Data"), "must be one of"),
    "logger by a path": (lambda: _with(logger__name="evil"), "must be one of"),
    "name that climbs": (lambda: _with(data__name="../../outside"), "part of the run folder's name"),
    "attention from a hub": (lambda: _with(model__attn_implementation="someone/evil"), "must be one of"),
    "key nobody knows": (lambda: _with(callbacks=["evil"]), "there is no such key"),
    "deep lists": (lambda: "a: " + "[" * 20_000, "nested more than"),
    "a list": (lambda: "- evil\n", "is not the configuration of a run"),
    "no text": (lambda: "\0\x01", "is damaged"),
}


@pytest.mark.parametrize(("text", "says"), RUNS.values(), ids=RUNS)
def test_hostile_run_folders(text: Any, says: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "run" / "checkpoints").mkdir(parents=True)
    (work / "run" / "checkpoints" / "step-000003.ckpt").touch()
    (work / "run" / "config.yaml").write_text(text())
    refused("train", ["resume=run"], capsys, says)


def test_a_reference_in_a_runs_own_configuration_is_text(work: Path) -> None:
    (work / "run" / "checkpoints").mkdir(parents=True)
    (work / "run" / "checkpoints" / "step-000003.ckpt").touch()
    (work / "run" / "config.yaml").write_text(_with(data__prompt_template="{text} ${oc.env:HOSTILE_WISH}"))
    config = compose("train", ["resume=run"])
    assert config.data.prompt_template == "{text} ${oc.env:HOSTILE_WISH}"
