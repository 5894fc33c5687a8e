"""What the rows of every data set go through before a model is known: read, refuse or skip bad ones, convert, split. No torch."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from lorica.config import ConfigError, DataConfig
from lorica.data.examples import Example, Splits, split_examples
from lorica.data.readers import NOT_UTF8, SAMPLES, Row, check_columns, csv_header, read_hub, read_rows, split_files

SHOWN_FAULTS = 3
IN_UTF8 = "iconv -f CP1252 -t UTF-8 IN > OUT where a spreadsheet wrote the file, or data.on_bad_rows=skip"
SMALL = 1 << 20  # bytes of files that are read whole in a blink
FIRST_ROWS = 16


class BadRow(ValueError):
    """A row that can't become an example; the message says why."""


class Rows:
    """The rows of one data set; `load()` reads and splits them.

    Subclasses say what its columns mean (`columns`, `to_example`) and nothing about models. With a `LoricaDataModule` they are what
    trains (`lorica.data.modules`); by themselves they need no torch.
    """

    generative: ClassVar[bool] = False  # test rows are answered by generation
    sample_name: ClassVar[str] = ""  # folder of the packaged sample

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        super().__init__()  # Lightning's, in a data module
        self.config, self.seed = config, seed
        self.labels: list[str] | None = None
        self.revision: str | None = config.revision
        self.faults: list[tuple[str, str]] = []  # (origin, why) of rows that were skipped
        self._splits: Splits | None = None

    @abstractmethod
    def columns(self) -> dict[str, str]:
        """Configuration key -> column that must exist."""

    @abstractmethod
    def to_example(self, row: Row) -> Example:
        """One row as an Example.

        Raises:
            BadRow: null, empty or unknown values.
        """

    def describe(self) -> dict[str, Any]:
        """What must be known to ask a trained model the same way: kept beside its weights (see `lorica.data.asking`)."""
        return {"kind": None}

    def prepare_rows(self, rows: dict[str, list[Row]]) -> None:
        """Look over all rows before they are converted (labels are found here)."""

    @property
    def splits(self) -> Splits:
        """The examples; `load()` reads them."""
        self.load()
        assert self._splits is not None
        return self._splits

    def load(self) -> None:
        """Read and split, once.

        Raises:
            ConfigError: files, columns or rows that can't be used.
        """
        if self._splits is not None:
            return
        rows = self._read()
        for split, of_split in rows.items():
            self._check_columns(of_split, split)
        for of_split in rows.values():
            if of_split and all(row.fault for row in of_split):
                self.faults = [(row.origin, row.fault) for row in of_split]
                self._refuse_faults(of_split)
        if not rows["train"]:
            key = "data.hub_id" if self.config.source == "hub" else "data.path"
            raise ConfigError(key, getattr(self.config, key[5:]), "has no rows to train on", "a source with rows, below a file's header")
        self.prepare_rows(rows)
        examples = {split: list(self._convert(of_split)) for split, of_split in rows.items()}
        if self.faults and self.config.on_bad_rows == "refuse":
            self._refuse_faults([row for of_split in rows.values() for row in of_split])
        self._splits = split_examples(examples, self.config, self.seed)

    def look_ahead(self) -> int | None:
        """Refuse what is seen at once: whatever is wrong with small files, columns that no row of a large one can have. Not of the hub.

        Returns:
            How many training rows there are, where the files are small and read whole; else None.
        Raises:
            ConfigError: as `load` does.
        """
        if self.config.source == "hub":
            return None
        files = self._files()
        if sum(file.stat().st_size for file in files.values()) <= SMALL:
            return len(self.splits.train)
        for split, file in files.items():
            if file.suffix.lower() in (".csv", ".parquet"):  # all rows have the same columns
                self._check_columns(list(islice(read_rows(file, self.config.csv_columns), FIRST_ROWS)), split)
        return None

    def _check_columns(self, rows: Sequence[Row], split: str) -> None:
        check_columns(rows, self.columns(), f"the {split} file" if self.config.source == "files" else f"the {split} split")

    def _read(self) -> dict[str, list[Row]]:
        if self.config.source == "hub":
            rows, self.revision = read_hub(self.config)
            return rows
        files = self._files()
        for file in files.values():
            self._check_header(file)
        return {split: list(read_rows(file, self.config.csv_columns)) for split, file in files.items()}

    def _check_header(self, file: Path) -> None:
        """Refuse a csv file that has a column which is asked for twice."""
        header = csv_header(file) if self.config.csv_columns is None else []
        for key, column in self.columns().items():
            if header.count(column) > 1:
                raise ConfigError(
                    key, column, f"{file.name} has {header.count(column)} columns of that name", "other names for all but one"
                )

    def _files(self) -> dict[str, Path]:
        """The file of each split."""
        config = self.config
        if config.source == "sample":
            folder = SAMPLES / self.sample_name
            if not self.sample_name:
                raise ConfigError(
                    "data.source", "sample", f"data={config.name} has no packaged sample", "data.source=files data.path=my.csv"
                )
        else:
            assert config.path is not None
            folder = Path(config.path).expanduser()
        return split_files(folder, config.name)

    def _convert(self, rows: Sequence[Row]) -> Iterator[Example]:
        for row in rows:
            fault = row.fault
            if not fault:
                try:
                    yield self.to_example(row)
                    continue
                except BadRow as e:
                    fault = str(e)
            self.faults.append((row.origin, fault))

    def _refuse_faults(self, rows: Sequence[Row]) -> None:
        shown = "; ".join(f"{origin} {why}" for origin, why in self.faults[:SHOWN_FAULTS])
        more = f"; and {len(self.faults) - SHOWN_FAULTS:,} more" if len(self.faults) > SHOWN_FAULTS else ""
        foreign = any(why == NOT_UTF8 for _, why in self.faults) and all(
            str(value).isascii() for row in rows if not row.fault for value in row.fields.values()
        )
        fix = IN_UTF8 if foreign else "mend them, or data.on_bad_rows=skip"
        if len(self.faults) == len(rows) and self.config.csv_columns:
            fix = "data.csv_columns=null where the first line names the columns, or another data="
        raise ConfigError("data.on_bad_rows", "refuse", f"{len(self.faults):,} of {len(rows):,} rows can't be used: {shown}{more}", fix)

    def fault_counts(self) -> dict[str, int]:
        """Skipped rows by reason."""
        return dict(Counter(why for _, why in self.faults))
