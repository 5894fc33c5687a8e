"""Host memory, disks, and whether files can be written as runs write them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from lorica import caches, durable
from lorica.doctor.verdicts import Finding, fail, ok, warn

GB, GIB = 10**9, 2**30
LEAST_MEMORY, SOME_MEMORY = 1 * GIB, 4 * GIB  # a LoRA on MiniLM takes 0.9 GiB of host memory; a 7B model is loaded through 4
SEVEN_B = 15 * GB  # what a 7B model takes on a disk, downloaded or merged
LEAST_OUTPUTS = GB // 2  # states and adapter of a 7B QLoRA run
LEAST_CACHE = GB
CGROUP = Path("/sys/fs/cgroup")


def memory() -> Finding:
    """Memory that this process may still have."""
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = _container_limit()
    where = ""
    if limit is not None and limit[1] < total:
        free, total, where = min(free, limit[0]), limit[1], " (the container's limit)"
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free{where}"
    if free < LEAST_MEMORY:
        return fail(f"{text}; the smallest run takes 1 GiB", "end other programs, or give the container more memory")
    if free < SOME_MEMORY:
        return warn(f"{text}; a 7B model is loaded through about 4 GiB", "end other programs, or a smaller model: model=minilm_lora")
    return ok(text)


def _container_limit() -> tuple[int, int] | None:
    """(free, most) bytes of this process's control group (version 2), where it has a limit."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        most = int((CGROUP / "memory.max").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return most - int((CGROUP / "memory.current").read_text()) + cached, most
    return None


def outputs(folder: Path) -> Finding:
    """Write, sync, rename and delete a file there, as a run does; what was not there before is taken away again."""
    folder = folder.expanduser()
    try:
        with _made(folder):
            file = folder / f".doctor-{os.getpid()}"
            try:
                durable.write_text(file, "written by lorica doctor\n" * 1000)
                free = durable.free_bytes(folder)
            finally:
                file.unlink(missing_ok=True)
    except durable.DiskFull as e:
        return fail(f"{folder}: the disk is full ({e.free / GB:.1f} GB free)", f"make room: du -sh {folder}/*; or run_dir=<another disk>")
    except OSError as e:
        return fail(f"{folder} can't be written ({e.strerror or e})", _writable(folder, e))
    text = f"{folder} can be written, {free / GB:,.1f} GB free"
    if free < LEAST_OUTPUTS:
        return fail(f"{text}; a 7B QLoRA run keeps {LEAST_OUTPUTS / GB:g} GB", f"make room: du -sh {folder}/*; or run_dir=<another disk>")
    if free < SEVEN_B:
        return warn(f"{text}; a merged 7B model takes {SEVEN_B / GB:g} GB", "make room, or output=<another disk> for lorica merge")
    return ok(text)


def hub_cache(needed: bool) -> Finding:
    """Room and write access where the hub's files are kept. needed: whether the base is still to be downloaded."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    elsewhere = "HF_HOME=<a folder with room>"
    try:
        free = _room(folder)
    except OSError as e:
        return warn(f"{folder} can't be written ({e.strerror or e}): nothing can be downloaded", elsewhere)
    text = f"{folder}, {free / GB:,.1f} GB free"
    if needed and free < SEVEN_B:
        return warn(f"{text}; a 7B model takes {SEVEN_B / GB:g} GB", f"hf cache prune, or {elsewhere}")
    return ok(text)


def own_cache() -> Finding:
    """Room and write access where runs keep tokens, scores and compiled layers for each other."""
    folder = caches.folder("")
    elsewhere = "LORICA_CACHE=<a folder with room>"
    try:
        free = _room(folder)
    except OSError as e:
        return warn(f"{folder} can't be written ({e.strerror or e}): each run tokenises and compiles again", elsewhere)
    text = f"{folder}, {free / GB:,.1f} GB free"
    if free < LEAST_CACHE:
        return warn(f"{text}: token ids of large data sets may not fit", f"rm -r {folder}  (all of it may go), or {elsewhere}")
    return ok(text)


def _room(folder: Path) -> int:
    """Free bytes where a folder is or would be, which can be written.

    Raises:
        OSError: it can't.
    """
    with _made(folder):
        _touch(folder)
        return durable.free_bytes(folder)


def _touch(folder: Path) -> None:
    """Write a byte there.

    Raises:
        OSError: it can't be.
    """
    file = folder / f".doctor-{os.getpid()}"
    try:
        file.write_bytes(b"1")
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there meanwhile, with its parents; those that were not before go again.

    Raises:
        OSError: it can't be made.
    """
    made: list[Path] = []
    try:
        for one in [*reversed(folder.parents), folder]:
            if not one.exists():
                one.mkdir(exist_ok=True)
                made.append(one)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(folder))
        yield
    finally:
        for one in reversed(made):
            with contextlib.suppress(OSError):
                one.rmdir()


def _writable(folder: Path, error: OSError) -> str:
    """What makes runs write somewhere."""
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return f"mv {folder} {folder}.old, or run_dir=<a folder of yours>"
    if error.errno == errno.EROFS:
        return "run_dir=<a folder on a disk that is not mounted read-only>"
    return f"sudo chown -R $USER {folder}, or run_dir=<a folder of yours>"
