"""docs/small-gpus.md: its tables are what plans give now, its commands compose."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lorica.composition import compose, compose_tree

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "small-gpus.md").read_text("utf-8")


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("small_gpus", ROOT / "tools" / "small_gpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_plans_say_now(tool: Any) -> None:
    assert tool.page(PAGE) == PAGE, "docs/small-gpus.md is behind planning/: run `make docs`"
    assert len(re.findall(r"<!-- \w+ -->\n\|", PAGE)) == 2
    assert len(re.findall(r"^\| ", PAGE, re.MULTILINE)) > len(tool.RUNS) + len(tool.LEVERS)


def test_a_7b_in_4_bits_fits_on_every_card_of_the_page(tool: Any) -> None:
    for card, trainer in tool.COLUMNS.values():
        assert tool.planned(f"{trainer} {tool.MISTRAL}", card).fit.fits


def test_each_lever_saves_memory_without_what_it_is_laid_over(tool: Any) -> None:
    first, *others = [tool.planned(f"{tool.MISTRAL} {typed}", "rtx3070_8gb").fit.peak for typed, _ in tool.LEVERS.values()]
    assert all(peak < first for peak in others)


def test_its_commands_compose_and_its_links_lead_somewhere() -> None:
    for line in PAGE.split("```")[1].strip().splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "python":
            compose("train", words[2:])
        else:
            compose_tree("plan" if words[1] == "plan" else words[1], [w for w in words[2:] if w.startswith("gpu.")])
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
