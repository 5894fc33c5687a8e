"""What only the hub has is refused within seconds, in one line that says what to do."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lorica import hub
from lorica.config import ConfigError

Lorica = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    "overrides", [("model=roberta_lora",), ("data=sentiment", "data.source=hub"), ("model=mistral_qlora", "data=chat")]
)
def test_offline_is_one_line_within_seconds(
    overrides: tuple[str, ...], lorica: Lorica, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = time.perf_counter()
    code, printed = lorica("train", *overrides)
    assert code == 2 and time.perf_counter() - begun < 10
    assert "model.base" in printed or "data.hub_id" in printed
    assert len(printed.strip().splitlines()) <= 5 and "Traceback" not in printed


def test_an_address_that_does_not_answer_is_found_out_in_time() -> None:
    begun = time.perf_counter()
    assert not hub.reachable("http://127.0.0.1:9", seconds=1.0)
    assert time.perf_counter() - begun < 3


def _response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None, url="https://example.org", text="")


def test_gated_and_missing_repositories_say_what_to_do() -> None:
    from huggingface_hub import errors

    for error, words in ((errors.GatedRepoError, "accept them"), (errors.RepositoryNotFoundError, "hf auth login")):
        with pytest.raises(ConfigError) as e, hub.hub_errors("model.base", "someone/model"):
            raise error("no", response=_response(403))
        assert words in str(e.value)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), hub.hub_errors("model.base", "x"):
        raise ZeroDivisionError


def test_a_tokenizer_without_pad_never_gets_eos() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from lorica.models.base import choose_pad_token

    for vocabulary, unknown, expected in (
        ({"</s>": 0, "<unk>": 1, "a": 2}, "<unk>", "<unk>"),
        ({"</s>": 0, "[PAD]": 1, "<unk>": 2}, "<unk>", "[PAD]"),
        ({"</s>": 0, "a": 1}, None, "<pad>"),
    ):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=unknown)), eos_token="</s>", unk_token=unknown
        )
        tokenizer.pad_token = tokenizer.eos_token
        choose_pad_token(tokenizer)
        assert tokenizer.pad_token == expected and tokenizer.pad_token_id != tokenizer.eos_token_id
