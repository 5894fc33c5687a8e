"""What is asked after training is asked in its wording, and the command that a run prints asks it; files keep all of their columns."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica import composition, file_answering, summary
from lorica.answering import Predictor
from lorica.answers import Answer
from lorica.config import (
    ChatDataConfig,
    ClassificationDataConfig,
    ConfigError,
    DataConfig,
    InstructionDataConfig,
    OptimizerConfig,
)
from lorica.data.asking import ask_row, ask_text, typed_text
from lorica.data.examples import Example
from lorica.data.module import LoricaDataModule
from lorica.data.registry import build_data

Lorica = Callable[..., tuple[int, str]]
WHOLE = {"name": "x", "source": "files", "validation_fraction": 0.0, "test_fraction": 0.0}
HARD = 'Isn\'t "Größe", he said: ${x} = f(1e3)!'


def data_of(schema: type[DataConfig], module: str, file: Path, rows: list[dict[str, Any]], **values: Any) -> LoricaDataModule:
    """A data module on a jsonl file of those rows."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return build_data(schema(**(WHOLE | {"module": module, "path": str(file)} | values)))


def typed(data: LoricaDataModule, folder: Path = Path(".")) -> str:
    """The text that the printed command asks."""
    words = shlex.split(summary.next_command(folder, data))
    assert words[:2] == ["python", "predict.py"]
    config = composition.compose("predict", words[2:])
    assert config.run == str(folder)
    assert isinstance(config.text, str)
    return config.text


# ------------------------------------------------------------------------------------------------------ the next command


@pytest.mark.parametrize("text", [HARD, '"Quoted"', '"A" and "B"', "1e3", "null", "a=b, c", "back\\"])
def test_the_next_command_asks_a_labelled_row(text: str, tmp_path: Path) -> None:
    rows = [{"text": text, "label": "a"}, {"text": "other", "label": "b"}]
    assert typed(data_of(ClassificationDataConfig, "classification", tmp_path / "a.jsonl", rows)) == text


def test_the_next_command_has_one_line_of_so_much_text(tmp_path: Path) -> None:
    rows = [{"text": "two\nlines\t\x1b[31m" + 100 * "ü", "label": "a"}, {"text": "other", "label": "b"}]
    asked = typed(data_of(ClassificationDataConfig, "classification", tmp_path / "a.jsonl", rows))
    assert asked.startswith("two lines  [31mü") and asked.endswith("ü...") and len(asked) == 90


def test_the_next_command_names_a_folder_with_a_hard_name(tmp_path: Path) -> None:
    folder = tmp_path / "Läufe, it's a=b (1)"
    folder.mkdir()
    rows = [{"text": "one", "label": "a"}, {"text": "other", "label": "b"}]
    assert typed(data_of(ClassificationDataConfig, "classification", tmp_path / "a.jsonl", rows), folder) == "one"


def test_the_next_command_asks_what_an_instruction_asks(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "one", "output": "eins"},
        {"instruction": f"Explain {HARD}", "input": "", "output": "so"},
    ]
    data = data_of(InstructionDataConfig, "instruction", tmp_path / "a.jsonl", rows)
    assert typed(data) == f"Explain {HARD}"  # a row that one text can ask
    assert data.splits.train[1].prompt == ask_text(data.describe(), typed(data)).prompt
    with_input = data_of(InstructionDataConfig, "instruction", tmp_path / "b.jsonl", [rows[0], rows[0] | {"instruction": "Say."}])
    assert typed(with_input) == "Translate. one"


def test_the_next_command_asks_the_input_of_a_shared_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": "Answer.", "input": text, "output": "so"} for text in (HARD, "Why {input}?")]
    data = data_of(InstructionDataConfig, "instruction", tmp_path / "a.jsonl", rows)
    assert typed(data) == HARD
    assert [typed_text(data.describe(), row) for row in data.splits.train] == [HARD, "Why {input}?"]


def test_a_prompt_that_is_not_of_the_template_is_asked_as_it_is() -> None:
    task = {"kind": "instruction", "prompt_template": "Q: {prompt} {prompt}!", "prompt_template_with_input": "Q: {prompt} {input}?{input}"}
    assert typed_text(task, Example("", prompt="Q: a\nb a\nb!")) == "a\nb"
    assert typed_text(task, Example("", prompt="Q: a b?{input}")) == "a b"
    assert typed_text(task, Example("", prompt="free")) == "free"
    assert typed_text({"kind": None}, Example("", prompt="of a package's own")) == "of a package's own"


def test_the_next_command_asks_what_the_user_asks(tmp_path: Path) -> None:
    turns = [("system", "Be short."), ("user", HARD), ("assistant", "Yes.")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    assert typed(data_of(ChatDataConfig, "chat", tmp_path / "a.jsonl", rows)) == HARD


# --------------------------------------------------------------------------------------------------- wording of training


def test_news_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    written = "Arsenal #39;s win\\by <b>two</b> &amp; more "
    rows = [{"text": written, "label": "a"}, {"text": "other", "label": "b"}]
    data = data_of(ClassificationDataConfig, "ag_news", tmp_path / "a.jsonl", rows, csv_columns=None)
    trained = data.splits.train[0]
    task = {**data.describe(), "labels": data.labels, "data": "of another name"}
    for asked in (ask_text(task, written), ask_row(task, rows[0], None, "")):
        assert (asked.text, asked.prompt) == (trained.text, trained.prompt) and asked.text == "Arsenal's win by two & more"


def test_weights_without_the_key_go_by_the_name_of_their_data() -> None:
    task = {"kind": "classification", "prompt_template": "{text}", "text_column": "text", "labels": ["a", "b"]}
    assert ask_text(task | {"data": "ag_news"}, "A #39;s").text == "A's"
    assert ask_text(task | {"data": "sentiment"}, " A #39;s ").text == "A #39;s"
    assert ask_text({}, " as it is ").text == " as it is "


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("column", ["prediction", "probability", "probabilities", "error"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_column_that_answers_would_be_written_over_is_refused(
    column: str, ending: str, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_answering, "load_trained", lambda *a: pytest.fail("loaded"))
    file = tmp_path / f"in.{ending}"
    if ending == "csv":
        file.write_text(f"text,{column}\nso,mine\n", "utf-8")
    else:
        file.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "so", column: "mine"}) + "\n", "utf-8")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", "utf-8")
    code, printed = lorica("predict", f"run={model}", f"input={file}")
    assert code == 2 and f"has a column {column}," in printed and "rename that column" in printed
    assert {f.name for f in tmp_path.iterdir()} == {file.name, model.name}


# ---------------------------------------------------------------------------------------------------- a model that writes


@pytest.fixture
def writer(tiny_mistral: Path, tmp_path: Path) -> Path:
    """A model folder as a finished chat run merges it, trained for answers of 3 tokens."""
    folder = shutil.copytree(tiny_mistral, tmp_path / "Läufe, it's a=b")
    task = {"task": "causal_lm", "base": str(folder), "kind": "chat", "messages_column": "messages", "max_new_tokens": 3}
    (folder / "lorica.json").write_text(json.dumps(task), "utf-8")
    return folder


def test_a_text_that_is_cut_is_said_to_be(writer: Path, lorica: Lorica) -> None:
    task = json.loads((writer / "lorica.json").read_text("utf-8"))
    (writer / "lorica.json").write_text(json.dumps(task | {"max_length": 12}), "utf-8")
    assert "cut" not in lorica("predict", f"run={writer}", "text=so", "max_new_tokens=1")[1]
    code, printed = lorica("predict", f"run={writer}", f"text={'so ' * 20}", "max_new_tokens=1")
    assert code == 0 and "1 text did not fit into the 12 tokens that the model reads, and was cut" in printed


def test_answers_are_as_long_as_in_training_unless_said(
    writer: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def begin(self: Predictor, examples: list[Example], batch_size: int, done: Any = None) -> Callable[[], list[Answer]]:
        asked.extend((e.messages[0].content, self.max_new_tokens) for e in examples)
        return lambda: [Answer("so") for _ in examples]

    monkeypatch.setattr(Predictor, "begin", begin)
    assert lorica("predict", f"run={writer}", f"text={HARD}") == (0, "so\n")
    assert lorica("predict", f"run={writer}", "text=a", "max_new_tokens=5")[0] == 0
    task = json.loads((writer / "lorica.json").read_text("utf-8"))
    (writer / "lorica.json").write_text(json.dumps(task | {"max_new_tokens": None}), "utf-8")
    assert lorica("predict", f"run={writer}", "text=a")[0] == 0
    (tmp_path / "a, b=c.csv").write_text("text\nso\n", "utf-8")
    assert lorica("predict", f"run={writer}", f"input={tmp_path / 'a, b=c.csv'}", f"output={tmp_path / 'ü, d.csv'}")[0] == 0
    assert asked == [(HARD, 3), ("a", 5), ("a", 256), ("so", 256)]
    with (tmp_path / "ü, d.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"text": "so", "prediction": "so"}]


def test_a_model_writes_so_many_tokens(writer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lorica.models.causal_lm import CausalLM
    from lorica.models.trained import load_trained

    written: list[int] = []
    generate = CausalLM.generate

    def counted(self: CausalLM, *args: Any) -> list[list[int]]:
        answers = generate(self, *args)
        written.extend(len(ids) for ids in answers)
        return answers

    monkeypatch.setattr(CausalLM, "generate", counted)
    predictor = Predictor(load_trained(writer, torch.device("cpu")))
    predictor.answer([ask_text(predictor.task, text) for text in ("hello there", "goal")], 2)
    assert len(written) == 2 and all(n <= 3 for n in written)


# ------------------------------------------------------------------------------------------------------ summary's figures


def test_a_constant_rate_has_no_warm_up() -> None:
    assert summary._warmup(OptimizerConfig(warmup_ratio=0.1), 100) == "warm-up 10"
    assert summary._warmup(OptimizerConfig(warmup_ratio=0.1, lr_scheduler_type="constant"), 100) == "no warm-up"
    assert summary._warmup(OptimizerConfig(warmup_ratio=0.1, lr_scheduler_type="constant_with_warmup"), 100) == "warm-up 10"


def test_a_column_for_one_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="text_column=review: names a column of an input file"):
        composition.compose("predict", ["run=.", "text=so", "text_column=review"])
