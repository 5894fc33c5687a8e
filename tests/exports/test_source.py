"""What exports are made of: rows to calibrate on are the run's own, and a converter is the one that was published."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lorica.config import ConfigError
from lorica.data.encoding import Truncation, build_encoder
from lorica.data.registry import build_data
from lorica.exports import gguf
from lorica.exports.source import Source


def _source(run: Path, tokenizer: Any) -> Source:
    task = {"task": "causal_lm", "max_length": 64, "labels": ["negative", "neutral", "positive"]}
    opened: Any = SimpleNamespace(task=task, tokenizer=tokenizer)
    return Source(run, opened, None, run, lambda done, total: None, [])


def _config(run: Path, **data: Any) -> Any:
    from lorica.composition import compose

    config = compose("train", ["model=tiny_mistral_qlora", "data=sentiment", *(f"data.{k}={v}" for k, v in data.items())])
    import dataclasses

    (run / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return config


def test_calibration_rows_are_training_rows_as_they_were_learnt(tmp_path: Path, tiny_mistral: Path) -> None:
    from lorica.models.base import Base, load_tokenizer

    tokenizer = load_tokenizer(Base(str(tiny_mistral), str(tiny_mistral)))
    config = _config(tmp_path, max_train_examples=20)
    source = _source(tmp_path, tokenizer)
    encoder = build_encoder(source.opened.task, tokenizer)
    learnt = [list(row.ids) for row in encoder.encode(build_data(config.data, config.seed).splits.train, Truncation())]
    assert len(learnt) == 20 and source.training_rows(1000) == learnt
    assert source.training_rows(5) == learnt[::4]


def test_without_its_training_data_a_run_is_not_calibrated(tmp_path: Path) -> None:
    source = _source(tmp_path, None)
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        source.training_rows(8)
    for text, said in (("data: {module: nowhere}", "names no data module"), ("[]", "names no data module")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            source.training_rows(8)
    _config(tmp_path)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**saved, "data": {**saved["data"], "pathh": 1}}))
    with pytest.raises(ConfigError, match=r"has data\.pathh"):
        source.training_rows(8)


def test_another_converter_than_was_published_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path))
    given: list[list[str]] = []

    def download(command: list[str], **settings: Any) -> Any:
        given.append(command)
        folder = Path(command[command.index("-d") + 1])
        (folder / f"llama_cpp_python-{gguf.VERSION}.tar.gz").write_bytes(b"something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ConfigError, match="another sha256"):
        gguf.pinned_converter()
    assert "--require-hashes" in given[0] and not (tmp_path / "llama.cpp" / gguf.VERSION).exists()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr="no network\n"))
    with pytest.raises(ConfigError, match=r"can't fetch .* no network"):
        gguf.pinned_converter()
