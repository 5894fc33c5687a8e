"""Writes that survive a crash, and manifests that find damage. No torch.

A file is written under a temporary name in its own folder, synced, renamed, and the folder is synced: readers see the old file or the
new one, whenever the machine dies. A manifest is a file in the format of `sha256sum`, with a last line that seals it:

    9c56cc51b374c3ba189210d5b6d4bf57790d351c96c47c02190ecf1e430635ab  adapter_model.safetensors
    # sealed 2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, BinaryIO

MANIFEST = "SHA256SUMS"  # of the files of a folder
FOR_PEOPLE = "README.md"  # the model card, which people edit: in no manifest
SEAL = "# sealed "
CHUNK = 1 << 22  # bytes hashed at once: long enough that threads seldom ask for Python's lock
HASHERS = 4  # threads of `Sums`
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """A file does not fit; what was there under its name before still is."""

    def __init__(self, path: Path, needed: int, free: int) -> None:
        super().__init__(
            f"the disk is full: {path} needs {needed:,} bytes, {free:,} are free; what was saved before is intact. "
            "Make room, then resume=<the run folder>"
        )
        self.path, self.needed, self.free = path, needed, free


# --------------------------------------------------------------------------------------------------------------- writes


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last; where folders can't be synced there is nothing to do."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """What this user may still write there."""
    return shutil.disk_usage(folder).free


def check_room(path: Path, size: int) -> None:
    """Refuse to begin what can't be finished.

    Raises:
        DiskFull: `size` bytes don't fit beside `path`.
    """
    if size > (free := free_bytes(path.parent)):
        raise DiskFull(path, size, free)


@contextlib.contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A binary file to fill, that takes the place of `path` when all went well.

    Args:
        size: bytes that will be written, where that is known before.
    Raises:
        DiskFull: before anything is written, or on the way.
    """
    check_room(path, size)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        written = temporary.stat().st_size if temporary.exists() else 0
        with contextlib.suppress(OSError):
            temporary.unlink()
        if out_of_room(e):
            raise DiskFull(path, max(size, written), free_bytes(path.parent)) from e
        raise
    sync_folder(path.parent)


def out_of_room(error: BaseException) -> bool:
    """Whether a full disk is behind an error; safetensors and torch say it in words only."""
    return not isinstance(error, DiskFull) and (getattr(error, "errno", None) in NO_ROOM or os.strerror(errno.ENOSPC) in str(error))


def append(path: Path, text: str) -> None:
    """Add lines to a file that is no more than a log: what a crash tears off is cut away by whoever goes on.

    Raises:
        DiskFull: they don't fit.
    """
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as e:
        if out_of_room(e):
            raise DiskFull(path, len(text), free_bytes(path.parent)) from e
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: readers see the old text or the new, also after a crash."""
    content = text.encode("utf-8")
    with replacing(path, len(content)) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON, NaN-free; what can't be in UTF-8 (a file's name, a column's) is kept as its number."""
    finite = _finite(value)
    try:
        write_text(path, json.dumps(finite, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except UnicodeEncodeError:  # before anything is written
        write_text(path, json.dumps(finite, indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not (float("-inf") < value < float("inf")) else value


@contextlib.contextmanager
def replaced_folder(folder: Path, size: int = 0, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """An empty folder to fill, that takes the place of `folder`, with a manifest of its files, when all went well.

    Between two renames there is a moment with neither; `recover_folder` ends it after a crash.

    Args:
        size: bytes that will be written, where that is known before. known: sha256 of files by name, filled by whoever fills the folder;
            the others are read once more.
    Raises:
        DiskFull: before anything is written, or on the way.
    """
    temporary, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    recover_folder(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        check_room(folder, size)
        yield temporary
        files = [file for file in temporary.rglob("*") if file.is_file()]
        for file in files:
            file.chmod(0o644)  # some writers leave files that only their owner reads
            with file.open("rb") as f:
                os.fsync(f.fileno())
        names = sorted(file.relative_to(temporary).as_posix() for file in files)
        hashes = {name: (known or {}).get(name) or sha256(temporary / name) for name in names if name != FOR_PEOPLE}
        write_text(temporary / MANIFEST, manifest(hashes))
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException as e:
        if out_of_room(e):
            raise DiskFull(folder, size, free_bytes(folder.parent)) from e
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(folder)


def recover_folder(folder: Path) -> None:
    """What `replaced_folder` left when it was killed: the folder before, where the new one was not there yet."""
    old = folder.with_name(f".{folder.name}.old")
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(old, folder)
        sync_folder(folder.parent)


# ------------------------------------------------------------------------------------------------------------- manifests


class Hashing:
    """A file to write to that knows the sha256 of what it was given."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def sha256(path: Path, ended: Event | None = None) -> str:
    """Of a file's content, in hexadecimal. ended: stops it, when nobody wants to know any more."""
    digest, block = hashlib.sha256(), memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            if ended is not None and ended.is_set():
                raise CancelledError
    return digest.hexdigest()


class Sums:
    """The sha256 of large files, made in threads beside other work and once a file; at the end of its context they stop."""

    def __init__(self) -> None:
        self._threads, self._ended = ThreadPoolExecutor(HASHERS, "sha256"), Event()
        self._found: dict[Path, Future[str]] = {}

    def start(self, files: Iterable[Path]) -> None:
        """Begin with files that are whole, and stay as they are until `of` was asked."""
        for file in files:
            if file not in self._found:
                self._found[file] = self._threads.submit(sha256, file, self._ended)

    def of(self, file: Path) -> str:
        """The sum of one, once it is there."""
        self.start([file])
        return self._found[file].result()

    def __enter__(self) -> Sums:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads.shutdown(cancel_futures=True)


def manifest(hashes: Mapping[str, str]) -> str:
    """The manifest of files by name."""
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return f"{lines}{SEAL}{hashlib.sha256(lines.encode()).hexdigest()}\n"


def read_manifest(path: Path) -> dict[str, str]:
    """File name -> sha256.

    Raises:
        ValueError: it is damaged, or names a file outside its folder.
    """
    text = path.read_bytes().decode("utf-8", "replace")
    pairs = [line.split("  ", 1) for line in text.splitlines() if not line.startswith(SEAL)]
    hashes = {pair[1]: pair[0] for pair in pairs if len(pair) == 2}
    if text != manifest(hashes):
        raise ValueError(f"{path} is damaged: its seal is another")
    for name in hashes:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path} names {name}, which is outside its folder")
    return hashes


def damage(path: Path) -> str:
    """What is wrong with the files of a manifest beside it, in words; "" where nothing is."""
    try:
        hashes = read_manifest(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError) as e:
        return str(e)
    for name, expected in hashes.items():
        file = path.parent / name
        try:
            if sha256(file) != expected:
                return f"{file} is damaged: its sha256 is not that of {path.name}"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as e:
            return f"{file} can't be read ({e.strerror})"
    return ""
