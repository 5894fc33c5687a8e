"""How long the training rows are, before anything is loaded: counted with the base's own tokenizer file where it is at hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorica import hub
from lorica.config import ConfigError, DataConfig, TrainConfig
from lorica.data.encoding import CausalEncoder, ClassifierEncoder, Encoded, Truncation
from lorica.data.examples import Example
from lorica.data.readers import Row, check_columns, read_rows, split_files
from lorica.data.registry import build_rows
from lorica.data.rows import BadRow

LETTERS = 4.2  # to a token of English, where there is no tokenizer
LARGE = 4 << 20  # bytes of a file of which only the first rows are read
UNCUT = 1 << 30


@dataclass(frozen=True)
class Lengths:
    """Of the training rows that were looked at.

    Attributes:
        prompts, answers: tokens of each that are not learnt, and that are; not cut. rows: training rows in all. counted: by the base's
            tokenizer, not by letters. classified: a classifier learns each row as a whole. estimated: rows are counted by
            the lines of a large file.
    """

    prompts: np.ndarray
    answers: np.ndarray
    rows: int
    counted: bool
    labels: int
    classified: bool
    estimated: bool = False

    def cut(self, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, learnt ones) of each row under a `model.max_length`, as `data.encoding` cuts."""
        whole = self.prompts + self.answers
        if self.classified:
            return np.minimum(whole, max_length), np.ones_like(whole)
        kept = np.minimum(self.answers, np.maximum(max_length - self.prompts, max_length // 2))
        return np.minimum(whole, max_length), np.where(whole > max_length, kept, self.answers)

    def shortened(self, max_length: int) -> tuple[float, float]:
        """Shares of rows that are cut, and whose answers are."""
        whole = self.prompts + self.answers
        _, kept = self.cut(max_length)
        return float((whole > max_length).mean()), 0.0 if self.classified else float((kept < self.answers).mean())


def look(config: TrainConfig, most: int) -> Lengths | None:
    """The lengths of at most so many training rows; None where the rows are on the hub.

    Raises:
        ConfigError: the files can't be used.
    """
    data = config.data
    if data.source == "hub" and not Path(str(data.hub_id)).expanduser().is_dir():
        return None
    examples, rows, labels = _examples(config, most)
    encoder, counted = _encoder(config, labels)
    if encoder is not None:
        encoded: list[Encoded] = encoder.encode(examples, Truncation())
        tokens, learnt = np.array([len(r.ids) for r in encoded]), np.array([r.supervised for r in encoded])
    else:
        tokens, learnt = _by_letters(examples, labels)
    classified = config.model.task == "sequence_classification"
    return Lengths(
        tokens if classified else tokens - learnt,
        learnt if not classified else np.zeros_like(tokens),
        rows,
        counted,
        len(labels),
        classified,
        _large(data) is not None,
    )


def _examples(config: TrainConfig, most: int) -> tuple[list[Example], int, list[str]]:
    """(at most so many training examples, evenly from all; how many there are; the labels)."""
    data = config.data
    source = build_rows(data, config.seed)
    if (file := _large(data)) is not None:
        first = list(itertools.islice(read_rows(file, data.csv_columns), 2 * most))
        check_columns(first, source.columns(), "the train file")
        try:
            source.prepare_rows({"train": first})
        except ConfigError:  # a file in the order of its labels: they are looked for in all of it
            source.prepare_rows({"train": list(read_rows(file, data.csv_columns))})
        examples = []
        for row in first:
            with suppress(BadRow):
                if not row.fault:
                    examples.append(source.to_example(row))
        if not examples:
            raise ConfigError("data.path", data.path, f"none of its first {len(first):,} rows can be used", "mend them")
        count = _count(file, first)
        held = data.validation_fraction + data.test_fraction
        return examples[:most], min(round(count * (1 - held)), data.max_train_examples or count), list(source.labels or [])
    source.load()
    train = source.splits.train
    step = max(1, len(train) // most)
    return train[::step][:most], len(train), list(source.labels or [])


def _count(file: Path, first: list[Row]) -> int:
    """Rows of a file, by its lines and by how many lines the first ones take."""
    if file.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
    lines = 0
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            lines += chunk.count(b"\n")
    last = first[-1].origin.rpartition(":")[2] if first else "1"
    return round(lines * len(first) / max(1, int(last))) if last.isdigit() else len(first)


def _large(data: DataConfig) -> Path | None:
    """The training file, where it is too large to be read as a whole for a plan."""
    if data.source != "files" or data.path is None:
        return None
    file = split_files(Path(data.path).expanduser(), data.name)["train"]
    return file if file.stat().st_size > LARGE and file.suffix.lower() != ".json" else None


def _encoder(config: TrainConfig, labels: list[str]) -> tuple[Any, bool]:
    """(the run's own encoder, over the base's tokenizer file; whether there is one)."""
    folder = _tokenizer_folder(config)
    if folder is None:
        return None, False
    try:
        tokenizer = FileTokenizer(folder)
        if config.model.task == "sequence_classification":
            return ClassifierEncoder(tokenizer, UNCUT), True
        return CausalEncoder(tokenizer, UNCUT, use_chat_template=False, label_names=labels), True
    except (ConfigError, OSError, ValueError):
        return None, False


def _tokenizer_folder(config: TrainConfig) -> Path | None:
    folder = Path(config.model.base).expanduser()
    if (folder / "tokenizer.json").is_file():
        return folder
    if (home := hub.packaged(config.model.base)) is not None and (home / "tokenizer.json").is_file():
        return home
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(config.model.base, "tokenizer.json", revision=config.model.revision)
    except ValueError:  # no hub name
        return None
    return Path(found).parent if isinstance(found, str) else None


class FileTokenizer:
    """What encoders ask of transformers' tokenizers, of a tokenizer.json alone: importing transformers takes seconds.

    Without the chat template, whose marks are not counted then.
    """

    chat_template = None
    truncation_side = "right"

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.name_or_path = str(folder)
        self.backend_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        settings = folder / "tokenizer_config.json"
        told = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        eos = told.get("eos_token") or "</s>"
        self.eos_token = eos["content"] if isinstance(eos, dict) else str(eos)
        self.eos_token_id = self.backend_tokenizer.token_to_id(self.eos_token)

    def __call__(self, texts: list[str], add_special_tokens: bool = True, **_: Any) -> Any:
        return _Batch(self.backend_tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens))


class _Batch(dict[str, Any]):
    """Like transformers' BatchEncoding."""

    def __init__(self, encodings: list[Any]) -> None:
        super().__init__(input_ids=[list(e.ids) for e in encodings])
        self.encodings = encodings


def _by_letters(examples: list[Example], labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, learnt ones) of each example, by its letters."""

    def sizes() -> Iterator[tuple[float, float]]:
        for e in examples:
            if e.messages:
                said = [(len(m.content), m.role == "assistant") for m in e.messages]
                yield sum(n for n, _ in said), sum(n for n, own in said if own)
            else:
                answer = len(labels[e.label]) if e.label is not None else len(e.completion)
                yield len(e.prompt or e.text) + answer, answer

    both = np.array(list(sizes()), dtype=float).reshape(-1, 2) / LETTERS + 2
    return np.ceil(both[:, 0]).astype(int), np.ceil(both[:, 1]).astype(int)
