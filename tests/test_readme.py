"""Every command of the README runs, or says that it needs a GPU or the hub and then at least composes."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorica.composition import compose_tree

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def _commands() -> list[tuple[str, str]]:
    """(command, its comment) of the block under `## Commands`."""
    block = README.split("## Commands")[1].split("```")[1]
    lines = [line.partition("  #") for line in block.splitlines() if line.startswith(("python ", "lorica "))]
    return [(command.strip(), comment) for command, _, comment in lines]


def _run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    arguments = words[2:] if words[0] == "python" else words[1:]
    program = [sys.executable, str(ROOT / words[1])] if words[0] == "python" else [sys.executable, "-m", "lorica"]
    return subprocess.run([*program, *arguments], cwd=folder, capture_output=True, text=True, timeout=500, check=False)


def test_the_readme_shows_commands_and_its_files_exist() -> None:
    assert len(_commands()) >= 10
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_next_command_that_the_readme_shows_can_be_typed() -> None:
    (line,) = [line for line in README.splitlines() if line.startswith("next ")]
    tree = compose_tree("predict", shlex.split(line)[3:])
    assert tree.run.startswith("outputs/ag_news-minilm_lora/") and tree.text.startswith("Icelandic Parties Draw Lots for Speaker's Chair. ")


@pytest.mark.parametrize(("command", "comment"), [c for c in _commands() if re.search(r"\((GPU|hub)", c[1])])
def test_commands_for_a_gpu_or_the_hub_compose(command: str, comment: str, tmp_path: Path) -> None:
    done = _run(f"{command} --cfg job", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_other_commands_run_in_order(tmp_path: Path, lorica: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first as it is typed, on fewer rows; the others in this process, which has torch already."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text("text\nThe soup was cold\nLovely all of it\n")
    first, *others = [command for command, comment in _commands() if not re.search(r"\((GPU|hub)", comment)]
    assert first == "python train.py"
    done = _run(f"{first} data.max_train_examples=64", tmp_path)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "outputs" / "latest" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for command in others:
        words = shlex.split(command)
        verb, arguments = (Path(words[1]).stem, words[2:]) if words[0] == "python" else (words[1], words[2:])
        code, printed = lorica(verb, *arguments)
        assert code == 0, f"{command}\n{printed[-2000:]}"
    assert (tmp_path / "scored.csv").read_text().startswith("text,prediction,probability")
    merged = list(tmp_path.glob("outputs/*/*/merged/config.json"))  # a comparison comes after it, whose runs are newer
    assert len(merged) == 1 and merged[0].parents[1].name != "latest"
