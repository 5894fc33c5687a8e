"""`lorica export`: what is written is read in its own runtime and put beside the original; what is damaged or unfaithful is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorica.checks import EXTRAS
from lorica.config import ConfigError
from lorica.exports import formats, runner
from lorica.models import merging

Lorica = Callable[..., tuple[int, str]]
SHORT = ["data.max_train_examples=32", "data.max_validation_examples=4", "data.max_test_examples=8", "trainer.batch_size=8"]
SHORT += ["trainer.max_steps=4", "trainer.max_epochs=-1"]


def _trained(folder: Path, *arguments: str) -> Path:
    from lorica.cli import main

    with pytest.raises(SystemExit) as end:
        main("train", [*arguments, f"run_dir={folder}", *SHORT])
    assert end.value.code == 0
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> Path:
    """A run on a small BERT."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, pad_token_id=3)).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(folder / "base")
    return _trained(folder / "run", "model=minilm_lora", f"model.base={folder / 'base'}", "data=ag_news")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> Path:
    """A QLoRA run on a tiny Mistral."""
    folder = tmp_path_factory.mktemp("causal") / "run"
    return _trained(folder, "model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment", "optimizer.lr=1e-2")


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "export_report.json").read_text("utf-8"))
    return found


def _flip(file: Path) -> None:
    """One bit of a file, in its middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_an_extra_that_is_not_installed_is_named_before_anything_is_read(
    tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in EXTRAS:
        monkeypatch.setitem(EXTRAS, name, ("lorica_has_no_such_package",))
        code, printed = lorica("export", f"run={tmp_path}", f"format=safetensors,{name}")
        assert code == 2 and f"format={name}: needs lorica_has_no_such_package" in printed, printed
        assert f"pip install 'lorica[{name}]'" in printed
    assert not list(tmp_path.iterdir())


def test_every_extra_is_one_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(EXTRAS) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["format=onxx"], "format=onxx: must be one or more of safetensors, onnx"),
        (["format=onnx,onnx"], "try: format=onnx"),
        (["format=safetensors", "safetensors=[bf16]"], "try: safetensors=[bfloat16]"),
        (["format=safetensors", "safetensors=[]"], "needs one or more"),
        (["format=safetensors", "onnx=[int8]"], "is a key of format=onnx"),
        (["format=safetensors", "llama_cpp=."], "is a key of format=gguf"),
        (["format=safetensors", "calibration_rows=9"], "is a key of format=gptq"),
        (["format=safetensors", "sample=nowhere.csv"], "sample=nowhere.csv: there is no such file"),
        (["format=safetensors", "min_agreement=1.5"], "min_agreement=1.5: must be at most 1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.checks.EXTRAS", {})
    code, printed = lorica("export", f"run={tmp_path}", *arguments)
    assert code == 2 and said in printed, printed


@pytest.mark.parametrize(
    ("task", "name", "said"),
    [
        ("sequence_classification", "gguf", "is not written for classifiers"),
        ("sequence_classification", "gptq", "is not written for classifiers"),
        ("causal_lm", "onnx", "is not written for causal models"),
    ],
)
def test_a_format_without_such_models_is_refused(task: str, name: str, said: str) -> None:
    opened: Any = SimpleNamespace(task={"task": task})
    with pytest.raises(ConfigError, match=said):
        runner._check_task(name, formats.find(name), opened)
    for other in ("safetensors", "torchao"):
        runner._check_task(other, formats.find(other), opened)


# ----------------------------------------------------------------------------------------------------------- the ladder


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_an_export_answers_as_the_original_and_is_not_made_twice(encoder: Path, lorica: Lorica) -> None:
    call = ["export", f"run={encoder}", "format=safetensors", "safetensors=[bfloat16,float32]"]
    code, printed = lorica(*call)
    assert code == 0 and "export ladder" in printed, printed
    whole, half = (encoder / "exports" / "safetensors" / kind for kind in ("float32", "bfloat16"))
    figures = _report(whole)["figures"]
    assert figures["agreement"] == 1.0 and abs(figures["kl"]) < 1e-9 and figures["positions"] == 8
    assert figures["value"] == pytest.approx(json.loads((encoder / "metrics.json").read_text())["test/accuracy"])
    assert 0 < _report(half)["figures"]["kl"] < 1e-2
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, whole)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.05) and figures["size_bytes"] == sizes[1]
    kept = _report(whole)["files"]["model.safetensors"]
    assert kept["bytes"] == sizes[1] and len(kept["sha256"]) == 64
    ladder = json.loads((encoder / "exports" / "ladder.json").read_text())
    assert [rung["name"] for rung in ladder["rungs"]] == ["original", "safetensors bfloat16", "safetensors float32"]
    assert "| safetensors float32 | " in (encoder / "exports" / "ladder.md").read_text()
    code, printed = lorica("predict", f"run={whole}", "text=hello")
    assert code == 0, printed

    before = {p: p.stat().st_mtime_ns for p in encoder.glob("exports/*/*/*")}
    code, printed = lorica(*call)
    assert code == 0 and "is there, intact" in printed and {p: p.stat().st_mtime_ns for p in encoder.glob("exports/*/*/*")} == before
    assert json.loads((encoder / "exports" / "ladder.json").read_text()) == ladder

    _flip(whole / "model.safetensors")
    code, printed = lorica(*call)
    assert code == 2 and "model.safetensors is damaged" in printed and "try: again=true" in printed, printed
    code, printed = lorica("export", f"run={encoder}", "format=safetensors", "safetensors=[bfloat16]")
    assert code == 0 and "not on the ladder" in printed and "float32" not in (encoder / "exports" / "ladder.md").read_text(), printed
    assert lorica(*call, "again=true")[0] == 0 and _report(whole)["figures"]["agreement"] == 1.0
    assert not list((encoder / "exports").glob(".*"))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_what_answers_otherwise_is_refused_and_leaves_nothing(causal: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging.Update, "apply", lambda self, weight: torch.randn_like(weight, dtype=torch.float32))
    code, printed = lorica("export", f"run={causal}", "format=safetensors", "safetensors=[float32]", "certify_rows=4")
    assert code == 2 and "refused safetensors float32: its" in printed and "(min_agreement=0.8)" in printed, printed
    assert sorted(p.name for p in (causal / "exports").iterdir()) == ["ladder.json", "ladder.md"]
    assert "- safetensors float32 was refused" in (causal / "exports" / "ladder.md").read_text()


CASES = [
    ("causal", "safetensors", "safetensors=[float32]", "float32", "model.safetensors", 0.99),
    ("encoder", "onnx", "onnx=[float32]", "float32", "model.onnx", 1.0),
    ("encoder", "onnx", "onnx=[int8]", "int8", "model.onnx", 0.7),
    ("encoder", "torchao", "torchao=[int8]", "int8", "model.safetensors", 0.7),
    ("causal", "torchao", "torchao=[int4]", "int4", "model.safetensors", 0.3),
    ("causal", "gguf", "gguf=[Q8_0]", "Q8_0", "model.gguf", 0.8),
    ("causal", "gptq", "gptq=[int8]", "int8", "model.safetensors", 0.8),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fixture", "name", "variants", "variant", "file", "least"), CASES, ids=[" ".join(case[1:3]) for case in CASES])
def test_each_format_runs_in_its_runtime_and_a_damaged_one_is_refused(
    fixture: str, name: str, variants: str, variant: str, file: str, least: float, request: pytest.FixtureRequest, lorica: Lorica
) -> None:
    for package in EXTRAS.get(name, ()):
        pytest.importorskip(package)
    more = []
    if name == "gguf":
        if "LLAMA_CPP" not in os.environ:
            pytest.skip("needs LLAMA_CPP, a folder with llama.cpp's convert_hf_to_gguf.py: tests have no network")
        more = [f"llama_cpp={os.environ['LLAMA_CPP']}"]
    run = request.getfixturevalue(fixture)
    call = ["export", f"run={run}", f"format={name}", variants, f"min_agreement={least}", "certify_rows=8", *more]
    code, printed = lorica(*call)
    assert code == 0, printed
    figures = _report(run / "exports" / name / variant)["figures"]
    assert figures["agreement"] >= least and figures["kl"] < 0.5
    assert 0 < figures["latency_p50_ms"] <= figures["latency_p95_ms"] and figures["tokens_per_second"] > 0
    _flip(run / "exports" / name / variant / file)
    code, printed = lorica(*call)
    assert code == 2 and f"{file} is damaged" in printed, printed
