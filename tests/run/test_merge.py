"""`lorica merge` writes what it has seen to answer as the adapter does, says how near it is, and else writes nothing."""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from lorica import certificate, durable
from lorica.config import ChatDataConfig, ClassificationDataConfig, InstructionDataConfig
from lorica.data.registry import build_data
from lorica.durable import read_manifest, sha256
from lorica.models import merging

Lorica = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> Path:
    """Twelve steps of tiny_mistral_qlora on the sentiment sample."""
    from lorica.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    limits = ["data.max_train_examples=48", "data.max_validation_examples=8", "data.max_test_examples=12"]
    trainer = ["trainer.max_steps=12", "trainer.max_epochs=-1", "trainer.batch_size=8"]
    with pytest.raises(SystemExit) as end:
        main("train", ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment", f"run_dir={folder}", *limits, *trainer])
    assert end.value.code == 0
    return folder


def _report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_report.json").read_text("utf-8"))
    return found


def test_the_nearest_of_all_candidates_is_written(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    code, printed = lorica("merge", f"run={run}", f"output={tmp_path / 'merged'}", "requantize=true")
    assert code == 0 and "onto the dequantised 4-bit base" in printed, printed
    report = _report(tmp_path / "merged")
    found = report["candidates"]
    assert list(found) == ["dequantised", "original", "requantised"] and report["written"] == "dequantised" and report["certified"]
    assert found["dequantised"]["kl"] < 1e-8 and found["dequantised"]["agreement"] == 1.0
    assert all(found[other]["kl"] > 100 * abs(found["dequantised"]["kl"]) for other in ("original", "requantised"))
    assert report["sample"]["rows"] == 12 and report["sample"]["origin"] == "the run's own test rows"
    metrics = json.loads((run / "metrics.json").read_text())
    assert report["adapter"]["accuracy"] == pytest.approx(metrics["test/accuracy"])
    assert set(report["fingerprints"]["base"]["sha256"]) == {"model.safetensors"}
    assert "- Certificate: mean KL divergence" in (tmp_path / "merged" / "README.md").read_text("utf-8")
    assert not [p for p in (tmp_path / "merged").iterdir() if p.is_dir()]
    manifest = read_manifest(tmp_path / "merged" / "SHA256SUMS")
    assert all(sha256(tmp_path / "merged" / name) == digest for name, digest in manifest.items()) and "model.safetensors" in manifest


def test_of_a_run_that_is_not_finished_the_weights_are_said_to_be_the_best_so_far(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    stopped, file = tmp_path / "stopped", tmp_path / "asked.csv"
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("metrics.json", "merged"))
    file.write_text("text\nlate again\n", "utf-8")
    for verb, *more in (
        ("predict", "text=late again"),
        ("predict", f"input={file}"),
        ("merge", "certify_rows=0", f"output={tmp_path / 'merged'}"),
    ):
        code, printed = lorica(verb, f"run={stopped}", *more, "accelerator=cpu")
        assert code == 0 and "note: the run is not finished: these are its best weights so far" in printed, printed
    assert "not finished" not in lorica("predict", f"run={run}", "text=late again", "accelerator=cpu")[1]


@pytest.mark.parametrize("nearer", ["dequantised", "original"])
def test_the_original_base_is_written_only_where_it_is_the_nearer(
    nearer: str, run: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, dequantised, read = merging.write, merging.through_four_bits, durable.sha256
    written: list[bool] = []
    hashed: list[str] = []

    def writing(plan: Any, folder: Path, dtype: Any, device: Any, original: bool, progress: Any) -> None:
        written.append(original)
        write(plan, folder, dtype, device, original, progress)

    def hashing(path: Path, *ended: Any) -> str:
        hashed.append(path.name)
        return read(path, *ended)

    monkeypatch.setattr(merging, "write", writing)
    monkeypatch.setattr(durable, "sha256", hashing)
    if nearer == "original":
        monkeypatch.setattr(merging, "through_four_bits", lambda *a: -dequantised(*a))
    code, printed = lorica("merge", f"run={run}", f"output={tmp_path / 'merged'}", "max_kl=10", "min_agreement=0")
    assert code == 0, printed
    report = _report(tmp_path / "merged")
    found = report["candidates"]
    assert report["written"] == nearer and written == ([False] if nearer == "dequantised" else [False, True])
    assert found["original"]["in_memory"] is (nearer == "dequantised") and not found["dequantised"]["in_memory"]
    assert found["original"]["kl"] > 0 and ("merged (original), not written" in printed) is (nearer == "dequantised")
    # The base's one file, and each that was written, once; the certified folder is opened without a manifest.
    assert hashed.count("model.safetensors") == 1 + len(written)


def test_sums_are_those_of_the_files_and_end_with_their_context(tmp_path: Path) -> None:
    content = {"short": b"abc", "empty": b"", "long": bytes(range(256)) * (5 * durable.CHUNK // 512)}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with durable.Sums() as sums:
        sums.start(tmp_path / name for name in content)
        assert {name: sums.of(tmp_path / name) for name in content} == {n: hashlib.sha256(d).hexdigest() for n, d in content.items()}
    ended = Event()
    ended.set()
    with pytest.raises(CancelledError):
        sha256(tmp_path / "long", ended)


def test_a_merge_that_went_wrong_is_refused(run: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "merged"
    assert lorica("merge", f"run={run}", f"output={target}", "certify_rows=0")[0] == 0
    assert _report(target)["certified"] is False and "not compared" in (target / "README.md").read_text("utf-8")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    right = merging.Update.apply

    def wrong(self: merging.Update, weight: torch.Tensor) -> torch.Tensor:
        self.scaling *= -1
        try:
            return right(self, weight)
        finally:
            self.scaling *= -1

    monkeypatch.setattr(merging.Update, "apply", wrong)
    code, printed = lorica("merge", f"run={run}", f"output={target}", "onto=dequantised")
    assert code == 2 and "max_kl=0.001" in printed and "nothing was written" in printed, printed
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_the_original_base_is_written_only_where_its_distance_is_let_through(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    code, printed = lorica("merge", f"run={run}", f"output={tmp_path / 'merged'}", "onto=original", "max_kl=1e-6")
    assert code == 2 and "try: onto=dequantised" in printed and not (tmp_path / "merged").exists(), printed
    arguments = ["onto=original", "max_kl=10", "min_agreement=0", "dtype=bfloat16"]
    assert lorica("merge", f"run={run}", f"output={tmp_path / 'merged'}", *arguments)[0] == 0
    report = _report(tmp_path / "merged")
    assert (report["written"], report["dtype"], list(report["candidates"])) == ("original", "bfloat16", ["original"])


def test_an_adapter_without_its_run_is_compared_on_what_is_given(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    shutil.copytree(run / "adapter", tmp_path / "alone")
    code, printed = lorica("merge", f"run={tmp_path / 'alone'}", f"output={tmp_path / 'merged'}", "onto=dequantised", "certify_rows=3")
    assert code == 0 and "built-in prompts" in printed and _report(tmp_path / "merged")["sample"]["rows"] == 3
    (tmp_path / "rows.csv").write_text("text,label\nLovely all of it,positive\nThe soup was cold,negative\n")
    code, printed = lorica(
        "merge", f"run={tmp_path / 'alone'}", f"output={tmp_path / 'merged'}", "onto=dequantised", f"sample={tmp_path / 'rows.csv'}"
    )
    report = _report(tmp_path / "merged")
    assert code == 0 and report["sample"] == {"origin": "rows of rows.csv", "rows": 2, "positions": report["sample"]["positions"]}
    assert report["adapter"]["accuracy"] is not None and report["adapter"]["loss"] > 0


def test_questions_and_conversations_are_compared_as_they_were_trained(tiny_mistral: Path, tmp_path: Path, lorica: Lorica) -> None:
    limits = ["data.max_train_examples=6", "data.max_test_examples=2", "data.max_generated_examples=1", "data.max_new_tokens=2"]
    for data in ("healthcare_qa", "chat"):
        folder = tmp_path / data
        code, printed = lorica(
            "train",
            "model=tiny_mistral_qlora",
            f"model.base={tiny_mistral}",
            f"data={data}",
            "trainer.max_steps=1",
            f"run_dir={folder}",
            *limits,
        )
        assert code == 0, printed
        code, printed = lorica("merge", f"run={folder}", "onto=dequantised")
        assert code == 0, printed
        report = _report(folder / "merged")
        assert report["sample"]["rows"] == 2 and report["adapter"]["perplexity"] == pytest.approx(
            report["candidates"]["dequantised"]["perplexity"], rel=1e-4
        )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Say why.", "input": "My knee hurts.", "output": "Rest it."}) + "\n")
    code, printed = lorica("merge", f"run={tmp_path / 'healthcare_qa'}", "onto=dequantised", f"sample={tmp_path / 'rows.jsonl'}")
    assert code == 0 and _report(tmp_path / "healthcare_qa" / "merged")["adapter"]["loss"] > 0, printed


ASKED = {"prompt_column": "q", "input_column": None, "completion_column": "a"}


def _turns(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]


@pytest.mark.parametrize(
    ("schema", "module", "row", "answer"),
    [
        (ASKED, "instruction", {"q": "Why?", "a": " Because. "}, "Because."),
        (ASKED, "instruction", {"q": "Why?", "a": ""}, ""),
        ({}, "chat", {"messages": _turns("Hi", "Hello", "Why?", "Because.")}, "Because."),
        ({}, "chat", {"messages": _turns("Hi", "Hello", "Why?")}, ""),
        ({"label_column": "y"}, "classification", {"text": "Good", "y": "b"}, 1),
        ({"label_column": "y", "labels": ["a", "b"], "label_values": ["1", "2"]}, "classification", {"text": "Good", "y": 2}, 1),
        ({"label_column": "y"}, "classification", {"text": "Good", "y": "never heard of"}, None),
    ],
)
def test_rows_of_a_sample_file_keep_their_answers(
    schema: dict[str, Any], module: str, row: dict[str, Any], answer: str | int | None, tmp_path: Path
) -> None:
    """As the rows of training had them: by the same columns, labels written in the same ways."""
    trained = {
        "instruction": [{"q": "Why?", "a": "Because."}],
        "chat": [{"messages": _turns("Hi", "Hello")}],
        "classification": [{"text": t, "y": str(i + 1) if "labels" in schema else t} for i, t in enumerate("ab")],
    }
    schemas = {"instruction": InstructionDataConfig, "chat": ChatDataConfig, "classification": ClassificationDataConfig}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in trained[module]))
    whole = {"name": "x", "source": "files", "path": str(tmp_path / "train.jsonl"), "validation_fraction": 0.0, "test_fraction": 0.0}
    data = build_data(schemas[module](**whole, module=module, **schema))
    data.load()
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = {**data.describe(), "labels": data.labels}
    (example,) = certificate.sample(task, tmp_path, str(tmp_path / "rows.jsonl"), 8).examples
    if module != "chat":
        assert answer == (example.label if module == "classification" else example.completion)
    else:
        assert answer == example.messages[-1].content
        assert [m.content for m in example.messages[:-1]] == ["Hi", "Hello", "Why?"]


@pytest.mark.slow
@pytest.mark.shared
def test_a_trained_models_merge_is_certified_and_answers_alike(shared: Path, tmp_path: Path, lorica: Lorica) -> None:
    """The certificate's figures on a model that has learnt; 200 labels of transformers' pipeline are those of `predict`."""
    from transformers import pipeline

    run, rows = tmp_path / "run", ["data.source=files", f"data.path={shared / 'data' / 'sentiment'}"]
    limits = ["data.max_train_examples=64", "data.max_validation_examples=16", "data.max_test_examples=200", "trainer.max_epochs=1"]
    base = ["model=tiny_mistral_qlora", f"model.base={shared / 'models' / 'tiny-mistral'}", "data=sentiment"]
    code, printed = lorica("train", *base, "model.task=sequence_classification", f"run_dir={run}", *rows, *limits)
    assert code == 0, printed
    assert lorica("merge", f"run={run}")[0] == 0
    found = _report(run / "merged")["candidates"]["dequantised"]
    assert found["kl"] <= 1e-4 and found["agreement"] >= 0.999
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text("utf-8").splitlines()]
    pipe: Any = pipeline("text-classification", str(run / "merged"))
    given = pipe([row["text"] for row in answers], truncation=True, max_length=256, batch_size=20)
    assert [g["label"] for g in given] == [row["prediction"] for row in answers] and len(answers) == 200
