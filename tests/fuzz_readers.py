"""Breaks valid data files at random for as long as it is told, and reads them: `python -m tests.fuzz_readers --seconds 600`.

Every input must end within a second in rows or in a ConfigError, with memory that stays within bounds. What breaks this is kept in
the folder that `--keep` names, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorica.config import ConfigError
from lorica.data.chat import parse_messages
from lorica.data.readers import read_rows
from lorica.data.rows import BadRow

SECONDS = 1.0  # for one file, of this process's own time
HANGS = 20  # seconds after which a file is given up
GROWTH = 1 << 30  # bytes that the process may grow by
WORDS = [b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xfe\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\"]
WORDS += [b"[", b"]", b"{", b"}", b":", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"\xe2\x80\xa8", b"PAR1"]
WORDS += [b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x80" * 10, b"text,label\n", b'{"text": "a"}', b"[" * 2000, b'{"a":' * 2000, b"a" * 70000]


def seeds() -> dict[str, list[bytes]]:
    """Valid files by ending."""
    records: list[dict[str, Any]] = [
        {"text": f"Row {i}, \"quoted\" and 'said';\nnext line ä€😀", "label": i % 3, "score": i / 7, "none": None} for i in range(40)
    ]
    chats = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * i}]} for i in range(30)]
    rows = "".join(f'"{str(r["text"]).replace(chr(34), chr(34) * 2)}",{r["label"]}\r\n' for r in records)
    files: dict[str, list[bytes]] = {
        "csv": [f"text,label\r\n{rows}".encode(), f"\ufefftext;label\n{rows}".replace('",', '";').encode(), b"a\tb\n1\t2\n" * 50],
        "jsonl": ["".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for r in lot).encode() for i, lot in enumerate((records, chats))],
        "json": [json.dumps(lot, indent=indent).encode() for lot in (records, chats) for indent in (None, 1)],
        "parquet": [],
    }
    for lot, codec in ((records, "snappy"), (chats, "zstd"), (records * 20, "gzip"), (chats, "none")):
        for dictionary in (True, False):
            written = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(lot), written, compression=codec, use_dictionary=dictionary, row_group_size=64)
            files["parquet"].append(written.getvalue())
    return files


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def replace(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    data[at : at + draw.choice((0, 1, 4, 50))] = draw.choice(WORDS)


def cut(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    del data[at : at + draw.choice((1, 8, 200, len(data)))]


def repeat(data: bytearray, draw: random.Random) -> None:
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    data[b:b] = data[a : min(b, a + 2000)] * draw.choice((1, 2, 30))


def swap(data: bytearray, draw: random.Random) -> None:
    a, b = draw.randrange(len(data)), draw.randrange(len(data))
    data[a : a + 16], data[b : b + 16] = data[b : b + 16], data[a : a + 16]


def near_the_end(data: bytearray, draw: random.Random) -> None:
    """Parquet's footer is there."""
    for _ in range(draw.choice((1, 2, 4))):
        data[-1 - draw.randrange(min(len(data), 1200))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, replace, cut, repeat, swap, near_the_end)


def mutants(files: dict[str, list[bytes]], draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Broken files without end; one in ten has another ending than it should."""
    endings = list(files)
    while True:
        ending = draw.choice(endings)
        data = bytearray(draw.choice(files[ending]))
        for _ in range(draw.choice((1, 1, 2, 3, 6))):
            if data:
                draw.choice(MUTATIONS)(data, draw)
        yield draw.choice(endings) if draw.random() < 0.1 else ending, bytes(data)


class Hang(BaseException):
    """A file that isn't read in time."""


def _give_up(number: int, frame: FrameType | None) -> None:
    raise Hang


def read(path: Path, columns: list[str] | None) -> str:
    """Read a file as training does: `rows`, `faults` or `refused`."""
    found = "rows"
    try:
        for row in read_rows(path, columns):
            assert row.origin.startswith(path.name) and "\n" not in row.fault
            if row.fault:
                found = "faults"
                continue
            for value in row.fields.values():
                if isinstance(value, str):
                    value.encode("utf-8")
            try:
                parse_messages(row.fields.get("messages"))
            except BadRow:
                continue
    except ConfigError as e:
        str(e).encode("utf-8", "surrogateescape")
        return "refused"
    return found


def trouble(path: Path, columns: list[str] | None, counts: Counter[str]) -> str:
    """What is wrong with how a file was read, or ""."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    signal.alarm(HANGS)
    try:
        counts[read(path, columns)] += 1
    except Hang:
        return f"not read within {HANGS} s"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    if (took := time.process_time() - begun) > SECONDS:
        return f"took {took:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return f"took {grown >> 20:,} MiB" if grown > GROWTH // 4 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="null: another each time")
    parser.add_argument("--keep", type=Path, default=Path("outputs/fuzz"), help="where files that break a reader go")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    draw, counts, found = random.Random(seed), Counter[str](), 0
    signal.signal(signal.SIGALRM, _give_up)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + GROWTH, size + GROWTH))
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        for number, (ending, content) in enumerate(mutants(seeds(), draw)):
            if time.monotonic() > end:
                break
            path = Path(folder) / f"fuzz.{ending}"
            path.write_bytes(content)
            counts[ending] += 1
            if why := trouble(path, ["text", "label"] if ending == "csv" and number % 5 == 0 else None, counts):
                found += 1
                args.keep.mkdir(parents=True, exist_ok=True)
                kept = args.keep / f"{seed}-{number}.{ending}"
                kept.write_bytes(content)
                print(f"{kept}: {why}", flush=True)
    total = sum(counts[ending] for ending in seeds())
    print(f"{total:,} files in {args.seconds:g} s, seed {seed}: {dict(sorted(counts.items()))}; {found} broke a reader")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
