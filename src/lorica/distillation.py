"""A teacher's label probabilities for the rows that a student trains on: asked before training, kept on disk, and the teacher let go.

A file is what one teacher says of a chunk of rows, `<key>.npz` under `folder()`, named by the hash of all that it depends on. Whatever is
wrong with a file, its rows are asked about again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorica import caches, fingerprint, hardware, plain_yaml
from lorica.answered_parts import identity_of
from lorica.answering import Predictor
from lorica.config import ConfigError, DistillationConfig
from lorica.data import token_cache
from lorica.data.asking import ask_text
from lorica.data.examples import Example
from lorica.data.module import LoricaDataModule
from lorica.file_answering import Counted
from lorica.models.trained import load_trained, open_trained
from lorica.runs import going_on, unfinished
from lorica.screen import Screen, duration

KEY = "distillation.teacher"
FORMAT = 1  # of the files; another one is another key
CHUNK_ROWS = {"cuda": 8192}  # by device, elsewhere FEWER_ROWS: what is lost at most when the asking is broken off
FEWER_ROWS = 512
# Settings of `data` that decide which rows are held out.
SPLITTING = (
    *("module", "source", "path", "hub_id", "hub_config", "revision", "train_split", "validation_split", "test_split", "csv_columns"),
    *("max_examples", "validation_fraction", "validation_from", "test_fraction", "text_column", "label_column"),
)


def folder() -> Path:
    """Where the files lie."""
    return caches.folder("teacher")


@dataclass(frozen=True)
class Teacher:
    """A trained model that scores the student's labels.

    Attributes:
        path: as the user gave it. task: its lorica.json. digest: of its weights and its base's, in hexadecimal.
    """

    path: Path
    task: dict[str, Any]
    digest: str

    def __str__(self) -> str:
        kind = "classifier" if self.task["task"] == "sequence_classification" else "causal"
        try:
            accuracy = json.loads((self.path / "metrics.json").read_text("utf-8"))["test/accuracy"]
            return f"{self.path} ({kind}, {accuracy:.4f} of its test rows right)"
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self.path} ({kind})"


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of the training rows.

    Attributes:
        scores: log-probabilities fp32 [N, labels], rows and labels in the student's order. found: rows that were on disk.
        seconds: that the others took. right: share of the rows whose label it finds likeliest.
    """

    scores: torch.Tensor
    found: int
    seconds: float
    right: float

    def __str__(self) -> str:
        n = len(self.scores)
        asked = f"asked about {n - self.found:,} training rows in {duration(self.seconds)}" if n > self.found else ""
        kept = f"{self.found:,} from the cache" if self.found else ""
        return f"{', '.join(filter(None, (asked, kept)))}, right on {self.right:.1%}"


def find(settings: DistillationConfig, labels: Sequence[str]) -> Teacher:
    """The teacher of a run; no weights are loaded.

    Args:
        labels: the student's.
    Raises:
        ConfigError: it is not there, unfinished or damaged, or scores other labels.
    """
    assert settings.teacher is not None
    path = Path(settings.teacher).expanduser()
    if unfinished(path):
        raise ConfigError(KEY, path, "is a run that is not finished", going_on(path) or "the folder of a finished run")
    try:
        opened = open_trained(path)
    except ConfigError as e:
        what = "" if e.where == "run" else f"{e.where}={e.value} "
        raise ConfigError(KEY, path, f"{what}{e.rule}", "the folder of a finished run on the same labels") from None
    theirs = opened.task.get("labels")
    if not theirs:
        raise ConfigError(KEY, path, "scores no labels: it was trained to write texts", "a run on data with the same labels")
    if sorted(theirs) != sorted(labels):
        raise ConfigError(
            KEY,
            path,
            f"its labels are {', '.join(theirs)}; the data's are {', '.join(labels)}, and both must have the same names",
            "a teacher that was trained on these labels, or data.labels and data.label_values with the teacher's names",
        )
    weights = [identity_of(opened.folder), fingerprint.of_base(opened.base.path, opened.base.revision)]
    return Teacher(path, opened.task, hashlib.sha256(json.dumps(weights).encode()).hexdigest())


def key_of(teacher: Teacher, device: str, texts: Sequence[str]) -> str:
    """The name of a chunk's file: sha256 over teacher, labels, rows in order, kind of device and versions."""
    parts = [FORMAT, teacher.digest, teacher.task["labels"], device, sorted(fingerprint.versions().items()), list(texts)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def ask(
    teacher: Teacher, examples: Sequence[Example], labels: Sequence[str], device: torch.device, screen: Screen, progress: bool = True
) -> Lesson:
    """What the teacher says of labelled texts, in its own wording; read where an earlier run asked the same.

    It is loaded only where something is missing, and its memory is given back. Chunks that are complete stay when this is broken off.

    Args:
        labels: the student's, in whose order the scores are. progress: rows/s and time left are shown.
    Raises:
        ConfigError: a score is no number.
    """
    size = CHUNK_ROWS.get(device.type, FEWER_ROWS)
    chunks = [examples[i : i + size] for i in range(0, len(examples), size)]
    files = [folder() / f"{key_of(teacher, device.type, [e.text for e in chunk])}.npz" for chunk in chunks]
    scores = [_kept(file, (len(chunk), len(labels))) for file, chunk in zip(files, chunks, strict=True)]
    missing = [i for i, of_chunk in enumerate(scores) if of_chunk is None]
    found = len(examples) - sum(len(chunks[i]) for i in missing)
    seconds = 0.0
    if missing:
        counted = Counted(screen, len(examples), found, "teacher")
        predictor = Predictor(load_trained(teacher.path, device))
        with counted if progress else nullcontext():
            for i in missing:
                asked = [ask_text(predictor.task, e.text, e.origin) for e in chunks[i]]
                said = predictor.log_probabilities(asked, counted.add if progress else lambda n: None)
                if not np.isfinite(said).all():
                    raise ConfigError(KEY, teacher.path, "its scores are no numbers (NaN or infinite)", "another teacher")
                token_cache.write(files[i], {"scores": said})
                scores[i] = said
        seconds = counted.seconds
        del predictor
        hardware.forget()
    columns = [teacher.task["labels"].index(name) for name in labels]
    whole = np.concatenate([of_chunk for of_chunk in scores if of_chunk is not None])[:, columns]
    right = float((whole.argmax(1) == np.array([e.label for e in examples])).mean())
    return Lesson(torch.from_numpy(np.ascontiguousarray(whole)), found, seconds, right)


def _kept(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The scores of a file, None where it has none that are of this form."""
    scores = (token_cache.read(file) or {}).get("scores")
    fits = scores is not None and scores.shape == shape and scores.dtype == np.float32 and bool(np.isfinite(scores).all())
    return scores if fits else None


# ------------------------------------------------------------------------------------------------------- the test rows


def doubt(teacher: Teacher, data: LoricaDataModule) -> str:
    """Why the teacher may have been trained on the student's test rows, in words; "" where it was not.

    Splits follow from the data and its settings alone, so that the same settings held out the same rows. Otherwise the teacher's own
    test rows are looked at, on which it was not trained.
    """
    test = [e.content for e in data.splits.test]
    run = next((f for f in (teacher.path, teacher.path.parent) if (f / "config.yaml").is_file()), None)
    if run is None or not test:
        return "what the teacher was trained on is not known here; it may have seen the test rows" if test else ""
    saved = plain_yaml.read(run / "config.yaml", KEY)
    theirs = saved.get("data") if isinstance(saved, dict) else None
    differing = _differing(theirs if isinstance(theirs, dict) else {}, asdict(data.config))
    if not differing:
        return ""
    tested = _tested(run / "predictions.jsonl")
    unproven = sum(content not in tested for content in test)
    if not unproven:
        return ""
    return (
        f"the teacher was trained on other data ({', '.join(f'data.{name}' for name in differing)}); "
        f"{unproven:,} of the {len(test):,} test rows were not among those held out from it, and it may have seen them"
    )


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Which settings that decide the splits are others."""
    for settings in (theirs, ours):
        if isinstance(settings.get("path"), str):
            settings["path"] = str(Path(settings["path"]).expanduser().resolve())
    return [name for name in SPLITTING if theirs.get(name) != ours.get(name)]


def _tested(predictions: Path) -> set[str]:
    """The contents of a run's test rows."""
    try:
        rows = [json.loads(line) for line in predictions.read_text("utf-8").splitlines()]
        return {Example("", text=row["text"]).content for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
