"""Other tokens than in training are an error wherever a model is used again, not a worse model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.data import token_contract

Lorica = Callable[..., tuple[int, str]]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"
SHORT = ["data.max_train_examples=16", "data.max_validation_examples=4", "data.max_test_examples=4", "trainer.batch_size=4"]
SHORT += ["trainer.max_steps=2", "trainer.max_epochs=-1", "trainer.checkpoint_every_n_steps=1"]


def _edit(name: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text("utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")

    return edit


def _swap(raw: Any) -> None:
    vocabulary = raw["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def _bos_twice(raw: Any) -> None:
    first = raw["post_processor"]["single"][0]
    raw["post_processor"]["single"].insert(0, first)


def _another_token(raw: Any) -> None:
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 4096, "content": "<|new|>"})


def _template(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return write


TOKENIZER, SETTINGS, TASK = "tokenizer.json", "tokenizer_config.json", "lorica.json"
TOKENS = {
    "a second bos": _edit(TOKENIZER, _bos_twice),
    "no bos": _edit(TOKENIZER, lambda raw: raw.update(post_processor=None)),
    "two ids swapped": _edit(TOKENIZER, _swap),
    "letters lowered": _edit(TOKENIZER, lambda raw: raw.update(normalizer={"type": "Lowercase"})),
    "a merge gone": _edit(TOKENIZER, lambda raw: raw["model"]["merges"].pop(0)),
    "a space before the text": _edit(TOKENIZER, lambda raw: raw.update(normalizer={"type": "Prepend", "prepend": " "})),
    "a token more": _edit(TOKENIZER, _another_token),
    "another eos": _edit(SETTINGS, lambda config: config.update(eos_token="<unk>")),
    "another pad": _edit(SETTINGS, lambda config: config.update(pad_token="<unk>")),
    "a space in the template": _template(TEMPLATE.replace("[{{", "[ {{")),
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
}
WORDING = {
    "the prompt's wording": _edit(TASK, lambda task: task.update(prompt_template=task["prompt_template"] + " ")),
    "the template not used": _edit(TASK, lambda task: task.update(use_chat_template=False)),
    "the labels' order": _edit(TASK, lambda task: task["labels"].reverse()),
    "the longest text": _edit(TASK, lambda task: task.update(max_length=task["max_length"] - 1)),
}
CLASSIFIER = {
    "cut at the other side": _edit(SETTINGS, lambda config: config.update(truncation_side="left")),
    "a second cls": _edit(TOKENIZER, _bos_twice),
}


def _trained(base: Path, folder: Path, *more: str) -> Path:
    from lorica.cli import main

    with pytest.raises(SystemExit) as end:
        main("train", [*more, f"model.base={base}", f"run_dir={folder}", *SHORT])
    assert end.value.code == 0
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> tuple[Path, Path]:
    """(base with a chat template, a run on it)."""
    folder = tmp_path_factory.mktemp("causal")
    base = Path(shutil.copytree(tiny_mistral, folder / "base"))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    return base, _trained(base, folder / "run", "model=tiny_mistral_qlora", "data=sentiment")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> tuple[Path, Path]:
    """(a small BERT, a run on it)."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, pad_token_id=3)).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(folder / "base")
    return folder / "base", _trained(folder / "base", folder / "run", "model=minilm_lora", "data=ag_news")


def _refused(lorica: Lorica, *command: str) -> None:
    code, printed = lorica(*command)
    assert code == 2 and "token contract" in " ".join(printed.split()), (command, printed)


def _copy(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, symlinks=True)
    (to / "adapter" / "SHA256SUMS").unlink()  # as after someone meant it
    return to


def _kinds(kinds: dict[str, Any], fixture: str) -> list[Any]:
    return [pytest.param(fixture, change, id=name) for name, change in kinds.items()]


@pytest.mark.parametrize(("fixture", "change"), _kinds(TOKENS | WORDING, "causal") + _kinds(CLASSIFIER, "encoder"))
def test_predict_merge_and_export_refuse_other_tokens(
    fixture: str, change: Callable[[Path], None], request: pytest.FixtureRequest, tmp_path: Path, lorica: Lorica
) -> None:
    run = _copy(request.getfixturevalue(fixture)[1], tmp_path / "run")
    change(run / "adapter")
    _refused(lorica, "predict", f"run={run}", "text=hello")
    _refused(lorica, "merge", f"run={run}")
    _refused(lorica, "export", f"run={run}", "format=safetensors")
    assert not (run / "merged").exists() and not (run / "exports").exists()


@pytest.mark.parametrize(("fixture", "change"), _kinds(TOKENS, "causal") + _kinds(CLASSIFIER, "encoder"))
def test_a_run_that_goes_on_refuses_other_tokens(
    fixture: str, change: Callable[[Path], None], request: pytest.FixtureRequest, tmp_path: Path, lorica: Lorica
) -> None:
    base, run = request.getfixturevalue(fixture)
    kept = Path(shutil.copytree(base, tmp_path / "kept"))
    going_on = _copy(run, tmp_path / "run")
    (going_on / "metrics.json").unlink()  # as if its test had been broken off
    try:
        change(base)
        _refused(lorica, "train", f"resume={going_on}", "trainer.max_steps=3")
    finally:
        shutil.rmtree(base)
        shutil.copytree(kept, base)


def test_the_same_tokens_are_taken_and_a_merged_model_keeps_the_contract(causal: tuple[Path, Path], tmp_path: Path, lorica: Lorica) -> None:
    run = _copy(causal[1], tmp_path / "run")
    assert lorica("merge", f"run={run}")[0] == 0
    contracts = [json.loads((folder / token_contract.FILE).read_text()) for folder in (run, run / "adapter", run / "merged")]
    assert contracts[0] == contracts[1] == contracts[2]
    assert len(contracts[0]["texts"]) == 5
    for folder in (run, run / "merged"):
        assert lorica("predict", f"run={folder}", "text=hello")[0] == 0
    TOKENS["a second bos"](run / "merged")
    (run / "merged" / "SHA256SUMS").unlink(missing_ok=True)
    _refused(lorica, "predict", f"run={run / 'merged'}", "text=hello")
    (run / "metrics.json").unlink()
    code, printed = lorica("train", f"resume={run}", "trainer.max_steps=3")
    assert code == 0, printed


def test_a_damaged_contract_is_said_and_none_is_no_fault(causal: tuple[Path, Path], tmp_path: Path, lorica: Lorica) -> None:
    run = _copy(causal[1], tmp_path / "run")
    file = run / "adapter" / token_contract.FILE
    for damage in ("{}", '{"texts": {}, "special_tokens": {}, "vocabulary": 3}', "[1]", "{"):
        file.write_text(damage)
        assert lorica("predict", f"run={run}", "text=hello")[0] == 2
    file.unlink()
    assert lorica("predict", f"run={run}", "text=hello")[0] == 0
