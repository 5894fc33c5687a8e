"""What every format is: it writes a folder, and loads that folder in its own runtime as something that gives logits.

No torch in here: a runtime that does without it is measured without it. A format's module is imported when it is used, and imports its
packages when they are used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from lorica.config import ConfigError, ExportConfig
from lorica.durable import MANIFEST, damage

if TYPE_CHECKING:
    from lorica.exports.source import Source

REPORT = "export_report.json"
CLASSES = {  # format -> where it is
    "original": "lorica.exports.original:Original",
    "safetensors": "lorica.exports.plain:Plain",
    "onnx": "lorica.exports.onnx:Onnx",
    "torchao": "lorica.exports.torchao:TorchAo",
    "gguf": "lorica.exports.gguf:Gguf",
    "gptq": "lorica.exports.gptq:Gptq",
}


class Scorer(Protocol):
    """A loaded model, one sequence of token ids at a time."""

    def logits(self, ids: list[int], first: int) -> np.ndarray:
        """What follows each of ids[first:], fp32 [T - first, vocabulary]; of a classifier its one answer, fp32 [1, classes]."""
        ...

    def tokens(self, text: str, special: bool) -> list[int] | None:
        """Ids of a text by the runtime's own tokenizer, with bos and such if `special`; None where the runtime has none."""
        ...


class Format(ABC):
    """One format of `export`.

    Attributes:
        tasks: of models that it can hold. packages: that write and load it, whose versions are kept in the report.
    """

    tasks: ClassVar[tuple[str, ...]] = ("causal_lm", "sequence_classification")
    packages: ClassVar[tuple[str, ...]] = ("transformers", "torch")

    @abstractmethod
    def write(self, source: Source, folder: Path, variant: str, config: ExportConfig) -> dict[str, Any]:
        """Write all files into an empty folder; gives what the report should say of how.

        Raises:
            ConfigError: this model can't be written so.
        """

    @abstractmethod
    def load(self, folder: Path, variant: str, task: str, longest: int) -> Scorer:
        """Load a folder.

        Args:
            task: as in lorica.json. longest: tokens of the longest sequence that will be read.
        """


def find(name: str) -> Format:
    """A format by name."""
    module, _, cls = CLASSES[name].partition(":")
    found: Format = getattr(import_module(module), cls)()
    return found


def versions(found: Format) -> dict[str, str | None]:
    """Of a format's packages."""
    return {package: _version(package) for package in found.packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_intact(folder: Path, fix: str = "again=true, to write it again") -> None:
    """Refuse an export whose files are not those that were measured.

    Raises:
        ConfigError: names the file.
    """
    if what := damage(folder / MANIFEST):
        raise ConfigError("run", folder, what, fix)


def module_command(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that run a module of this very package, wherever it lies, in a process of its own."""
    known = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]  # from another folder, too
    place = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *known])
    return [sys.executable, "-m", *arguments], {**os.environ, "PYTHONPATH": place}


def run_module(name: str, what: str, arguments: Sequence[str], folder: Path | None = None) -> str:
    """What a module prints, run in a process of its own.

    Args:
        name: of the format. what: does the work, in words. folder: to work in; None: this one.
    Raises:
        ConfigError: it failed; its last line is said.
    """
    command, environment = module_command(arguments)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:300]
        raise ConfigError("format", name, f"{what} failed: {said}", "another format")
    return done.stdout
