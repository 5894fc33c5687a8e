"""Writes requirements.lock: every version of constraints.txt with the sha256 of the files that the package registry has for it.

pip itself finds the files, for Linux on x86-64 and each Python that Lorica runs on; nothing is installed. torch is left out: the same
version is built for CPUs and for several CUDA versions, each with hashes of its own, and a machine may bring its own build.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)), "manylinux2014_x86_64", "linux_x86_64")
UNHASHED = ("torch",)
SOURCES = ("antlr4-python3-runtime",)  # published without wheels
LOCAL = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")  # where a machine names files of its own
HEADER = """# Written by `make lock` from constraints.txt: sha256 of the registry's files for Linux on x86-64, Python {pythons}.
# Installed by `make setup-locked`, with --require-hashes. Not in here: torch, which has a build for each kind of machine.
"""


def pinned() -> list[str]:
    """`name==version` of constraints.txt, but for what has no one hash."""
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#") and line.partition("==")[0] not in UNHASHED]


def files(requirements: list[str], *options: str) -> dict[str, str]:
    """Requirement -> sha256 of the file that pip would install, from the registry only: folders of wheels on this machine don't count."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder) / "wanted.txt", Path(folder) / "report.json"
        wanted.write_text("\n".join(requirements))
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--no-deps"]
        place = ["--target", f"{folder}/nowhere"] if options else []
        subprocess.run(
            [*command, *place, *options, "--report", str(report), "-r", str(wanted)],
            check=True,
            env={k: v for k, v in os.environ.items() if k not in LOCAL} | {"PIP_CONFIG_FILE": os.devnull},
        )
        found = json.loads(report.read_text("utf-8"))["install"]
    by_name = {_plain(i["metadata"]["name"]): i["download_info"]["archive_info"]["hashes"]["sha256"] for i in found}
    return {r: by_name[_plain(r.partition("==")[0])] for r in requirements}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Write the lock file."""
    hashes: dict[str, set[str]] = defaultdict(set)
    requirements = pinned()
    wheels = [r for r in requirements if r.partition("==")[0] not in SOURCES]
    for r, digest in files([r for r in requirements if r not in wheels]).items():
        hashes[r].add(digest)
    for python in PYTHONS:
        platforms = [f"--platform={p}" for p in PLATFORMS]
        for r, digest in files(wheels, "--only-binary=:all:", f"--python-version={python}", *platforms).items():
            hashes[r].add(digest)
        print(f"Python {python}: {len(wheels)} files", flush=True)
    lines = [" \\\n    ".join([r, *(f"--hash=sha256:{h}" for h in sorted(hashes[r]))]) for r in requirements]
    (ROOT / "requirements.lock").write_text(HEADER.format(pythons=", ".join(PYTHONS)) + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
