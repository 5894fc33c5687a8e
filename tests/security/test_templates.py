"""Hostile chat templates: jinja's sandbox holds, and one that loops, fills the memory or raises is one clear error within seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lorica.config import ConfigError
from lorica.data import templates
from lorica.data.encoding import CausalEncoder
from lorica.data.examples import Example
from lorica.models.base import Base, load_tokenizer

TEMPLATES = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
    "fills the memory": ("{{ 'a' * 10**11 }}", "takes more than"),
    "power without end": ("{{ 9**(9**9) }}", "does not end|takes more than"),
    "doubles": (
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "does not end|takes more",
    ),
    "calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses this conversation|kills the process"),
    "raises": ("{{ raise_exception('never') }}", "refuses this conversation: never"),
    "is broken": ("{% if %}", "is no template"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this conversation"),
    "globals": ("{{ raise_exception.__globals__['os'].system('touch $CANARY') }}", "refuses this conversation"),
    "globals by a filter": ("{{ (messages|attr('__class__')).x }}", "refuses this conversation"),
    "builtins": ("{{ cycler.__init__.__globals__.os.popen('touch $CANARY').read() }}", "refuses this conversation"),
    "namespace": ("{{ namespace(__class__=1) }}", "refuses this conversation"),
    "includes a file": ("{% include '/etc/passwd' %}", "refuses this conversation"),
    "imports": ("{% import 'evil' as e %}{{ e.run() }}", "refuses this conversation"),
    "changes its input": ("{{ messages.clear() }}", "refuses this conversation"),
}


@pytest.mark.parametrize(("template", "says"), TEMPLATES.values(), ids=TEMPLATES)
def test_hostile_templates(template: str, says: str, work: Path, tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 1.5)
    tokenizer: Any = load_tokenizer(Base(str(tiny_mistral), str(tiny_mistral)))
    tokenizer.chat_template = template
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match=f"use_chat_template=.*({says})"):
        CausalEncoder(tokenizer, 64).prompt_ids(Example("a:1", prompt="Hello", completion="there"))
    assert time.perf_counter() - begun < 10
