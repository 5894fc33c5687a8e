"""Tokenised rows on disk, found again by all that they depend on: a second run of the same data does not tokenise it again.

A file is one split for one encoder, `<key>.npz` under `folder()`: flat arrays and where each row ends, written under a temporary
name, synced and renamed. Whatever is wrong with a file, its rows are tokenised again; what can't be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lorica import caches, durable
from lorica.data import encoding
from lorica.data.encoding import Candidates, CausalEncoder, ClassifierEncoder, Encoded, Progress, Truncation, silent
from lorica.data.examples import Example

FEWEST = 2_000  # examples that are worth a file
LIMIT = 10 * 2**30  # bytes of all files together
STALE_SECONDS = 24 * 3600.0  # a temporary file this old was left by a process that died
PACKAGES = ("tokenizers", "transformers", "jinja2")
JOINED = 1_000  # examples hashed by one call

T = TypeVar("T")
Arrays = dict[str, "np.ndarray[Any, Any]"]


def folder() -> Path:
    """Where the files lie."""
    return caches.folder("tokens")


# ----------------------------------------------------------------------------------------------------------------- keys


def _feed(digest: Any, *parts: bytes) -> None:
    for part in parts:  # each with its length, so that no two lists of parts read the same
        digest.update(len(part).to_bytes(8, "little") + part)


def encoder_key(encoder: ClassifierEncoder | CausalEncoder) -> bytes:
    """32 bytes of what the rows depend on besides the examples: tokenizer, template, lengths, labels' names, code and versions.

    The tokenizer is left without truncation and padding; every call of it sets its own.
    """
    tokenizer = encoder.tokenizer
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # they are part of its text, and depend on what it was asked last
    backend.no_padding()
    template = getattr(tokenizer, "chat_template", None)
    digest = hashlib.sha256()
    settings: list[Any] = [
        type(encoder).__qualname__,
        encoder.max_length,
        type(tokenizer).__module__,
        type(tokenizer).__qualname__,
        sorted(tokenizer.special_tokens_map.items()),
        tokenizer.all_special_ids,
        tokenizer.eos_token_id,
        tokenizer.truncation_side,
        getattr(tokenizer, "split_special_tokens", None),
        template,
        date.today().isoformat() if "strftime_now" in str(template) else "",  # such a template writes the day into each row
        [importlib.metadata.version(package) for package in PACKAGES],
    ]
    if isinstance(encoder, CausalEncoder):
        settings += [encoder.chat, encoder.label_names]
    _feed(digest, repr(settings).encode("utf-8", "surrogatepass"), backend.to_str().encode())
    _feed(digest, *(Path(str(file)).read_bytes() for file in (encoding.__file__, __file__)))
    return digest.digest()


def _fields(example: Example) -> Iterator[str]:
    """An example in strings that read in one way only: lengths first. Its origin does not matter."""
    e = example
    yield f"{len(e.text)} {e.label} {len(e.prompt)} {len(e.completion)} {len(e.messages)}:"
    yield from (e.text, e.prompt, e.completion)
    for message in e.messages:
        yield f"{len(message.role)} {len(message.content)}:{message.role}{message.content}"


def rows_key(of_encoder: bytes, kind: str, examples: Sequence[Example]) -> str:
    """The name of a file: sha256 over the encoder, what is made of the examples, and every example in order.

    Args:
        kind: "rows" or "candidates".
    """
    digest = hashlib.sha256()
    _feed(digest, of_encoder, kind.encode(), str(len(examples)).encode())
    for i in range(0, len(examples), JOINED):
        joined = "".join(itertools.chain.from_iterable(map(_fields, examples[i : i + JOINED])))
        _feed(digest, joined.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- rows and arrays


def _ends(lengths: Iterable[int]) -> np.ndarray[Any, Any]:
    return np.cumsum(np.fromiter(lengths, np.int64))


def _flat(numbers: Iterable[int]) -> np.ndarray[Any, Any]:
    return np.fromiter(numbers, np.int32)


def _parts(flat: Any, ends: np.ndarray[Any, Any]) -> Iterator[Any]:
    """`flat` cut at `ends`; all of it is used.

    Raises:
        ValueError: the ends are not those of this array.
    """
    cuts = [0, *ends.tolist()]
    if cuts[-1] != len(flat) or any(a > b for a, b in itertools.pairwise(cuts)):
        raise ValueError("ends and contents don't fit")
    return (flat[a:b] for a, b in itertools.pairwise(cuts))


def _pack_rows(rows: Sequence[Encoded]) -> Arrays:
    return {
        "ids": np.frombuffer(b"".join(r.ids.tobytes() for r in rows), np.int32),
        "id_ends": _ends(len(r.ids) for r in rows),
        "labels": np.frombuffer(b"".join(r.labels.tobytes() for r in rows), np.int32),
        "label_ends": _ends(len(r.labels) for r in rows),
        "label": np.fromiter((r.label for r in rows), np.int64),
    }


def _unpack_rows(arrays: Arrays) -> list[Encoded]:
    ids, labels = (array("i", arrays[name].tobytes()) for name in ("ids", "labels"))
    parts = zip(_parts(ids, arrays["id_ends"]), _parts(labels, arrays["label_ends"]), arrays["label"].tolist(), strict=True)
    return [Encoded(*part) for part in parts]


def _pack_candidates(rows: Sequence[Candidates]) -> Arrays:
    sequences = [s for r in rows for s in r.sequences]
    picks = [p for r in rows for p in r.picks]
    return {
        "ids": _flat(itertools.chain.from_iterable(sequences)),
        "id_ends": _ends(map(len, sequences)),
        "sequence_ends": _ends(len(r.sequences) for r in rows),
        "picks": _flat(number for of_label in picks for pick in of_label for number in pick).reshape(-1, 3),
        "pick_ends": _ends(map(len, picks)),
        "label_ends": _ends(len(r.picks) for r in rows),
        "label": np.fromiter((r.label for r in rows), np.int64),
    }


def _unpack_candidates(arrays: Arrays) -> list[Candidates]:
    sequences = list(_parts(arrays["ids"].tolist(), arrays["id_ends"]))
    picks = list(_parts([tuple(pick) for pick in arrays["picks"].tolist()], arrays["pick_ends"]))
    parts = zip(_parts(sequences, arrays["sequence_ends"]), _parts(picks, arrays["label_ends"]), arrays["label"].tolist(), strict=True)
    return [Candidates(*part) for part in parts]


# ---------------------------------------------------------------------------------------------------------------- files


def _checksum(key: str, arrays: Arrays) -> np.ndarray[Any, Any]:
    digest = hashlib.blake2b(key.encode(), digest_size=32)
    for name in sorted(arrays):
        one = np.ascontiguousarray(arrays[name])
        _feed(digest, f"{name} {one.dtype.str} {one.shape}".encode())
        digest.update(one.data)
    return np.frombuffer(digest.digest(), np.uint8)


def content_hash(rows: Sequence[Encoded] | Sequence[Candidates]) -> str:
    """Equal for rows that are the same to a model, in the same order."""
    if rows and isinstance(rows[0], Candidates):
        return hashlib.sha256(_checksum("rows", _pack_candidates(rows)).tobytes()).hexdigest()  # type: ignore[arg-type]
    digest = hashlib.sha256(np.array([(len(r.ids), len(r.labels), r.label) for r in rows], np.int64).tobytes())  # type: ignore[union-attr]
    for row in rows:
        digest.update(row.ids)  # type: ignore[union-attr]
        digest.update(row.labels)  # type: ignore[union-attr]
    return digest.hexdigest()


def read(path: Path) -> Arrays | None:
    """What `write` was given; None where there is no file. A damaged one is removed."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if not np.array_equal(arrays.pop("checksum"), _checksum(path.stem, arrays)):
            raise ValueError("its checksum is another")
    except FileNotFoundError:
        return None
    except Exception:  # a damaged zip file can raise almost anything
        _drop(path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the files used longest ago go first
    return arrays


def _drop(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def write(path: Path, arrays: Arrays) -> None:
    """Keep arrays, and remove the files used longest ago that are then too many. Nothing is kept where the folder can't be written."""
    if sum(one.nbytes for one in arrays.values()) > LIMIT:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path) as file:
            np.savez(file, checksum=_checksum(path.stem, arrays), **arrays)  # type: ignore[arg-type]
        _bound(path)


def _bound(newest: Path) -> None:
    """Files used longest ago go until all are within LIMIT; other processes may remove them at the same time."""
    found = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.suffix == ".tmp" and time.time() - status.st_mtime > STALE_SECONDS:
                _drop(path)
            elif path.suffix == ".npz":
                found.append((path != newest, status.st_mtime, status.st_size, path))
    kept = 0
    for _, _, size, path in sorted(found, key=lambda f: (not f[0], f[1]), reverse=True):  # the newest file, then by last use
        kept += size
        if kept > LIMIT:
            _drop(path)


# ------------------------------------------------------------------------------------------------------------- encoding


class TokenCache:
    """Encodes examples, or reads what was encoded before.

    Attributes:
        found: rows that came from the cache. made: rows that were tokenised, in so many seconds.
    """

    def __init__(self, encoder: ClassifierEncoder | CausalEncoder, enabled: bool = True) -> None:
        self.encoder = encoder
        self.enabled = enabled and type(encoder) in (ClassifierEncoder, CausalEncoder)  # the code of others is not part of the key
        self.found = self.made = 0
        self.seconds = 0.0
        self._encoder_key: bytes | None = None

    def rows(self, examples: Sequence[Example], truncation: Truncation, progress: Progress = silent) -> list[Encoded]:
        """As `encoder.encode`."""
        path = self._path("rows", examples)
        if path is not None and (arrays := read(path)) is not None:
            with contextlib.suppress(KeyError, ValueError, TypeError):
                rows, cut = _unpack_rows(arrays), Truncation(*arrays["truncation"].tolist())
                first = self.encoder.encode(examples[:1], Truncation())[0]  # leaves the tokenizer set as encoding does
                if len(rows) == len(examples) and (first.ids, first.labels, first.label) == (rows[0].ids, rows[0].labels, rows[0].label):
                    truncation.add(cut)
                    return self._hit(rows, progress)
            _drop(path)
        own = Truncation()
        rows = self._timed(lambda: self.encoder.encode(examples, own, progress))
        truncation.add(own)
        if path is not None:
            write(path, {**_pack_rows(rows), "truncation": np.array(astuple(own), np.int64)})
        return rows

    def candidates(self, examples: Sequence[Example], progress: Progress = silent) -> list[Candidates]:
        """As `encoder.candidates`."""
        encoder = self.encoder
        assert isinstance(encoder, CausalEncoder)
        path = self._path("candidates", examples)
        if path is not None and (arrays := read(path)) is not None:
            with contextlib.suppress(KeyError, ValueError, TypeError):
                rows = _unpack_candidates(arrays)
                if len(rows) == len(examples) and encoder.candidates(examples[:1])[0] == rows[0]:
                    return self._hit(rows, progress)
            _drop(path)
        rows = self._timed(lambda: encoder.candidates(examples, progress))
        if path is not None:
            write(path, _pack_candidates(rows))
        return rows

    def _path(self, kind: str, examples: Sequence[Example]) -> Path | None:
        if not self.enabled or len(examples) < FEWEST:
            return None
        try:
            if self._encoder_key is None:
                self._encoder_key = encoder_key(self.encoder)
            return folder() / f"{rows_key(self._encoder_key, kind, examples)}.npz"
        except Exception:  # a tokenizer with parts in Python can't be written; the code is in an archive; there is no home
            self.enabled = False
            return None

    def _timed(self, make: Callable[[], list[T]]) -> list[T]:
        started = time.perf_counter()
        rows = make()
        self.seconds += time.perf_counter() - started
        self.made += len(rows)
        return rows

    def _hit(self, rows: list[T], progress: Progress) -> list[T]:
        self.found += len(rows)
        progress(len(rows))
        return rows
