"""Answers written by many prompts at once, with finished rows leaving, are those that transformers writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.models.generation import greedy, stop_tokens

PROMPTS = [[1, 5, 9, 200, 31], [1, 7], [1, 400, 12, 77, 8, 9, 10, 1000, 6], [1, 3000, 2], [1, 900, 901, 902]]


@pytest.fixture(scope="module")
def model(tiny_mistral: Path) -> Any:
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tiny_mistral).eval()
    torch.manual_seed(1)
    with torch.no_grad():  # random weights repeat one token for ever: larger ones wander
        for p in found.parameters():
            if p.ndim > 1:
                p.mul_(6.0)
    return found


def _theirs(model: Any, prompts: list[list[int]], stops: list[int], n: int) -> list[list[int]]:
    answers = []
    for prompt in prompts:  # one at a time: no padding at all
        out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=3, eos_token_id=stops)
        answer = out[0, len(prompt) :].tolist()
        answers.append(answer[: next((i for i, t in enumerate(answer) if t in stops), len(answer))])
    return answers


@pytest.mark.parametrize("window", [None, 6])
def test_greedy_is_transformers_generate(model: Any, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "sliding_window", window)
    free = greedy(model, PROMPTS, 3, {2}, 24)
    stops = sorted({2, free[0][4], free[2][9], free[4][14]})  # rows end at different times
    expected = _theirs(model, PROMPTS, stops, 24)
    assert len({len(a) for a in expected}) > 2
    assert greedy(model, PROMPTS, 3, stops, 24) == expected


def test_the_rows_that_have_ended_are_not_computed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = greedy(model, PROMPTS, 3, {2}, 12)
    sizes: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: (sizes.append(kw["input_ids"].shape[0]), forward(**kw))[1])
    greedy(model, PROMPTS, 3, {2, free[0][2]}, 12)
    assert sizes[0] == len(PROMPTS) and min(sizes) < len(PROMPTS) and sizes == sorted(sizes, reverse=True)


def test_stop_tokens_of_both_configurations(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, 9])
    assert stop_tokens(model) == {2, 9}


def test_no_new_tokens(model: Any) -> None:
    assert greedy(model, PROMPTS[:2], 3, {2}, 0) == [[], []]
