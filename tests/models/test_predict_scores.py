"""Labels that are scored many texts at once, sorted by length, are those of each text on its own, in the order that was asked."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica import scoring
from lorica.answering import Predictor
from lorica.data import encoding
from lorica.data.encoding import CausalEncoder
from lorica.data.examples import Example
from lorica.kernels import attention
from lorica.models.trained import Trained, load_trained
from lorica.scoring import BATCH

CPU = torch.device("cpu")
LABELS = ["good", "good enough", "bad"]  # one begins as another does: a text has several sequences
WORDS = [
    "the",
    "service",
    "was",
    "slow",
    "so",
    "we",
    "waited",
    "for",
    "soup",
    "that",
    "nobody",
    "had",
    "ordered",
    "but",
    "bread",
    "is",
    "fine",
]


def _wander(model: Any, factor: float) -> None:
    """Larger random weights: scores that differ from text to text."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(factor)


def _folder(tmp_path: Path, tiny_mistral: Path, task: dict[str, Any]) -> Path:
    """A folder as training leaves it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_mistral, folder, ignore=shutil.ignore_patterns("SHA256SUMS"))
    (folder / "lorica.json").write_text(json.dumps({"max_length": 40, "labels": LABELS, **task}))
    return folder


@pytest.fixture
def encoder(tmp_path: Path, tiny_mistral: Path) -> Trained:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    folder = _folder(tmp_path, tiny_mistral, {"task": "sequence_classification"})
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(
        RobertaConfig(**sizes, vocab_size=4096, max_position_embeddings=64, pad_token_id=3, num_labels=3)
    )
    _wander(model, 20.0)
    model.save_pretrained(folder)
    return load_trained(folder, CPU)


@pytest.fixture
def causal(tmp_path: Path, tiny_mistral: Path) -> Trained:
    trained = load_trained(_folder(tmp_path, tiny_mistral, {"task": "causal_lm", "use_chat_template": False}), CPU)
    _wander(trained.model, 5.0)
    return trained


@pytest.fixture(params=["encoder", "causal"])
def trained(request: pytest.FixtureRequest) -> Trained:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def _examples(n: int, label: Any = None) -> list[Example]:
    draw = random.Random(4)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 45))) for _ in range(n)]  # some are cut to max_length
    return [Example(f"x:{i}", text=t, prompt=f"{t}\nIs it good?", label=label(i) if label else None) for i, t in enumerate(texts)]


def _one_by_one(predictor: Predictor, examples: list[Example]) -> torch.Tensor:
    """Probabilities of each text on its own, from the model's plain logits."""
    model, rows = predictor.trained.model, []
    for example in examples:
        with torch.no_grad():
            if isinstance(predictor.encoder, CausalEncoder):
                (of,) = predictor.encoder.candidates([example])
                spoken = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids in of.sequences]
                scores = torch.stack([torch.stack([spoken[s][at, token] for s, at, token in picks]).sum() for picks in of.picks])
            else:
                ids = predictor.trained.tokenizer(example.text, truncation=True, max_length=40)["input_ids"]
                scores = model(input_ids=torch.tensor([ids])).logits[0]
        rows.append(scores.softmax(-1))
    return torch.stack(rows)


def _rows(answers: list[Any]) -> torch.Tensor:
    assert all(list(a.probabilities) == LABELS and a.prediction == max(LABELS, key=a.probabilities.get) for a in answers)
    return torch.tensor([list(a.probabilities.values()) for a in answers])


def test_answers_are_each_texts_own_in_order_whatever_the_batch_size(trained: Trained) -> None:
    predictor, examples = Predictor(trained), _examples(2 * BATCH + 5)
    expected = _one_by_one(predictor, examples)
    assert expected.std(0).max() > 0.05 and len(set(expected.argmax(1).tolist())) > 1
    for size in (None, 1, 7, 1000):
        torch.testing.assert_close(_rows(predictor.answer(examples, size)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("varlen_on_cpu")
def test_flat_batches_have_the_same_answers(trained: Trained) -> None:
    examples = _examples(20)
    expected = _rows(Predictor(trained).answer(examples))
    trained.model.set_attn_implementation(attention.VARLEN)
    trained.padded = False
    torch.testing.assert_close(_rows(Predictor(trained).answer(examples, 6)), expected, rtol=1e-4, atol=1e-5)


class Replayed:
    """CapturedScores without a GPU: each call is the forward, on a batch of the size that was captured."""

    def __init__(self, score: Any, batch: dict[str, Any]) -> None:
        self.score, self.sizes, self.calls = score, {k: v.shape for k, v in batch.items() if isinstance(v, torch.Tensor)}, 0

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        assert {k: v.shape for k, v in batch.items() if isinstance(v, torch.Tensor)} == self.sizes
        self.calls += 1
        return self.score(batch)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("varlen_on_cpu")
def test_captured_batches_have_the_same_answers(encoder: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 16)
    short = [Example(f"y:{i}", text="so") for i in range(40)]  # more rows than were thought to fit
    examples = [*_examples(50), *short]
    plain = Predictor(encoder)
    expected = _rows(plain.answer(examples))
    encoder.model.set_attn_implementation(attention.VARLEN)
    encoder.padded = False
    monkeypatch.setattr(scoring, "CapturedScores", Replayed)
    monkeypatch.setattr(scoring, "waits_for_the_device", lambda run: run() is None)
    monkeypatch.setattr(scoring, "CAPTURED_TOKENS", 96)
    counted: list[int] = []
    predictor = Predictor(encoder)
    predictor.scorer.capture(examples[:16])
    torch.testing.assert_close(_rows(predictor.answer(examples, done=counted.append)), expected, rtol=1e-4, atol=1e-5)
    made = predictor.scorer._captured
    assert isinstance(made, Replayed) and made.calls == len(counted) > 10 and sum(counted) == len(examples)
    assert max(counted) == predictor.scorer._shape.targets  # rows ran out before tokens did
    of_seven = _rows(predictor.answer(examples, 7))  # a size that was asked for
    assert made.calls == len(counted)
    torch.testing.assert_close(of_seven, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("varlen_on_cpu")
def test_a_forward_that_waits_for_the_device_is_not_captured(encoder: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = _examples(20)
    expected = _rows(Predictor(encoder).answer(examples))
    encoder.model.set_attn_implementation(attention.VARLEN)
    encoder.padded = False
    monkeypatch.setattr(scoring, "CapturedScores", None)
    monkeypatch.setattr(scoring, "waits_for_the_device", lambda run: run() is not None)
    predictor = Predictor(encoder)
    predictor.scorer.capture(examples)
    torch.testing.assert_close(_rows(predictor.answer(examples)), expected, rtol=1e-4, atol=1e-5)


def test_the_label_that_a_text_has_or_lacks_changes_nothing(trained: Trained) -> None:
    predictor = Predictor(trained)
    unknown = predictor.answer(_examples(9))
    assert predictor.answer(_examples(9, lambda i: i % 3)) == predictor.answer(_examples(9, lambda i: None if i % 2 else 1)) == unknown


def test_progress_counts_every_text_once(trained: Trained) -> None:
    counted: list[int] = []
    Predictor(trained).answer(_examples(17), 5, counted.append)
    assert counted == [5, 5, 5, 2]


def test_nothing_asked_is_nothing_answered(trained: Trained) -> None:
    assert Predictor(trained).answer([]) == []
