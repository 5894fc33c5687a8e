"""Secrets are replaced by `***` wherever text or a configuration is written, by their format, their name or the environment's values;
what only looks like one (a commit, a token count, a tokenizer's pad token, a prompt with the word token) stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorica import cli, composition
from lorica.config import ConfigError
from lorica.runs import to_yaml
from lorica.secrets import REDACTED, is_secret_name, redact, redact_tree

HEX = "0123456789abcdef0123456789abcdef01234567"  # a commit, and the older form of a W&B key
SECRETS = {
    "hugging face": "hf_" + "aB3" * 11,
    "wandb": "wandb_v1_" + "aB3_" * 11,
    "openai": "sk-" + "aB3" * 12,
    "openai project": "sk-proj-" + "aB3-" * 12,
    "anthropic": "sk-ant-api03-" + "aB3_" * 12,
    "github": "ghp_" + "aB3" * 12,
    "github fine-grained": "github_pat_" + "aB3_" * 12,
    "aws": "AKIA" + "ABCD" * 4,
    "google": "AIza" + "aB3-x" * 7,
}


@pytest.fixture(autouse=True)
def no_secrets_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if is_secret_name(name):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_published_formats_go_wherever_they_stand(secret: str) -> None:
    for around in ("{}", "see {} here", "url?x={}&y=1", '{{"a": "{}"}}', "line\n{}\nline", "({})"):
        shown = redact(around.format(secret))
        assert secret not in shown and secret[12:] not in shown and REDACTED in shown
    assert redact_tree({"logger": {"tags": ["ok", secret], "entity": secret}}) == {"logger": {"tags": ["ok", "***"], "entity": "***"}}


@pytest.mark.parametrize(
    "text",
    [
        f"WANDB_API_KEY={HEX}",
        f"export HF_TOKEN={HEX}",
        f"logger.api_key={HEX}",
        f"api_key: {HEX}",
        f"apikey={HEX}",
        f"hub_token = {HEX}",
        f'token="{HEX}"',
        f"--token={HEX}",
        f"{{'api_key': '{HEX}', 'seed': 1}}",
        f'{{"password": "{HEX}"}}',
        f"db.password={HEX}",
        f"AWS_SECRET_ACCESS_KEY={HEX}",
        f"Authorization: Bearer {HEX}",
        f"https://someone:{HEX}@example.org/repo.git",
        f"postgresql://:{HEX}@db:5432/x",
    ],
)
def test_values_given_to_a_secrets_name_go(text: str) -> None:
    assert HEX not in redact(text)
    assert REDACTED in redact(text)


def test_only_the_value_goes() -> None:
    assert redact(f"logger.api_key={HEX} seed=1") == "logger.api_key=*** seed=1"
    assert redact(f"{{'token': '{HEX}', 'seed': 1}}") == "{'token': '***', 'seed': 1}"
    assert redact(f"logger.api_key={HEX}: no such key") == "logger.api_key=***: no such key"
    assert redact(f"git clone https://me:{HEX}@example.org/a.git b") == "git clone https://***@example.org/a.git b"
    assert redact("password=hunter2") == "password=***"


def test_values_of_secret_environment_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", HEX)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("ORDINARY", "outputs/here")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact(f"failed with {HEX} and correct horse battery") == "failed with *** and ***"
    assert redact("key wJalrXUtnFEMI/K7MDENG.") == "key ***."
    assert redact("wrote outputs/here of abc") == "wrote outputs/here of abc"
    assert redact_tree({"tags": [f"x{HEX}y"]}) == {"tags": ["x***y"]}


@pytest.mark.parametrize("form", [str, repr])
def test_what_comes_after_a_line_break_goes_however_it_is_written(form: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNING_PRIVATE_KEY", "-----BEGIN-----\nMIIEow=\n-----END-----")
    for text in (f"a\n{SECRETS['hugging face']}", "is\n-----BEGIN-----\nMIIEow=\n-----END-----"):
        shown = redact(str(ConfigError("text", form(text), "is another")))
        assert REDACTED in shown and "aB3" not in shown and "MIIEow" not in shown


def test_a_proposal_does_not_write_a_secret_in_another_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DB_PASSWORD", 'pa"ssword1')
    with pytest.raises(SystemExit):
        cli.main("train", ['model.basee="pa\\"ssword1"'])
    said = capsys.readouterr().err
    assert "model.basee=***" in said and "try: model.base=..." in said and "ssword1" not in said


def test_the_longer_of_two_overlapping_values_goes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefghijklmnop")
    assert redact("abcdefghijklmnop") == "***"


HARMLESS = [
    f"model.revision={HEX}",
    f"fancyzhx/ag_news at {HEX}",
    "trainer.tokens_per_batch=4096",
    "tokens_per_batch: 4096",
    "data.max_new_tokens=256",
    "train/tokens_per_second: 5123.4",
    "pad_token_id=1",
    "pad_token=<pad> eos_token=</s>",
    "pad_token: '[PAD]'",
    "tokenizer.eos_token=eos",
    "the token: a piece of a word",
    "What is the next token: {text}",
    "Token: {text}\nLabel:",
    "Which password: the old one or the new?",
    "I forgot my password: please help, order 12345",
    "secret: none",
    "api_key=null",
    "token=${oc.env:HF_TOKEN}",
    "https://huggingface.co/FacebookAI/roberta-base",
    "http://localhost:8000/predict",
    "2026-01-02 10:11:12 step 5: loss 0.31",
    "the risk-taking disk-based task-list",
    "the bearer of good news",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_survives(text: str) -> None:
    assert redact(text) == text
    assert redact_tree([text]) == [text]


def test_keys_decide_in_a_tree() -> None:
    tree = {
        "api_key": "abc",
        "wandb": {"token": ["one", "two"], "password": ""},
        "pad_token": "[PAD]",
        "tokens_per_batch": 4096,
        "max_new_tokens": 256,
        "revision": HEX,
        "token": None,
        "secret": True,
        "text_column": "token",
        "pair": (1, "x"),
    }
    assert redact_tree(tree) == tree | {"api_key": "***", "wandb": {"token": ["***", "***"], "password": ""}, "pair": [1, "x"]}
    assert tree["api_key"] == "abc"  # a copy


@pytest.mark.parametrize(
    "name", ["api_key", "WANDB_API_KEY", "logger.token", "HF_TOKEN", "client-secret", "password", "AWS_SECRET_ACCESS_KEY"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["tokens_per_batch", "pad_token", "model.eos_token", "max_new_tokens", "key", "monkey", "secretary", "seed"]
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


def test_redacting_twice_changes_nothing() -> None:
    for text in (*HARMLESS, f"logger.api_key={HEX}: no", *SECRETS.values(), f"https://a:{HEX}@b/c"):
        assert redact(redact(text)) == redact(text)


def test_a_long_word_is_read_in_linear_time() -> None:
    assert redact("a" * 200_000 + ".token" * 3) == "a" * 200_000 + ".token" * 3


def test_a_recorded_configuration_keeps_its_prompt_and_loses_its_secrets() -> None:
    config = composition.compose("train", ["data.prompt_template='Which token: {text}, password: a or b?'", f"model.revision={HEX}"])
    config.data.hub_id = SECRETS["hugging face"]
    recorded = yaml.safe_load(to_yaml(config))
    assert recorded["data"]["prompt_template"] == "Which token: {text}, password: a or b?"
    assert recorded["model"]["revision"] == HEX
    assert recorded["data"]["hub_id"] == REDACTED


def test_what_is_shown_of_a_configuration_loses_its_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--cfg", "job"], ["--help"], []):
        with pytest.raises(SystemExit):
            cli.main("train", [f"model.base={SECRETS['hugging face']}", "optimizer.lr=abc" if not args else "seed=1", *args])
        shown = "".join(capsys.readouterr())
        assert SECRETS["hugging face"] not in shown
    for typed in (f"logger.api_key={HEX}", f"hf_token={HEX}", f"model={{token:{HEX}}}"):
        with pytest.raises(SystemExit):
            cli.main("train", [typed])
        assert HEX not in "".join(capsys.readouterr())


def test_environment_values_are_redacted_on_the_real_screen(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "train.py"), f"data.labels={HEX}"],
        cwd=tmp_path,
        env={**os.environ, "WANDB_API_KEY": HEX},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "lorica: data.labels=***: must be a list, as [a,b]\n"
