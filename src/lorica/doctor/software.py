"""Python, the required packages, a C compiler. The ranges are those of pyproject.toml, read where they stand."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from lorica import __version__
from lorica.doctor.verdicts import Finding, fail, ok, warn


def ranges() -> tuple[str, list[str]]:
    """(versions of Python, requirements): of the clone's pyproject.toml, which an editable install's metadata may be behind, else of the
    installed package."""
    file = Path(__file__).resolve().parents[3] / "pyproject.toml"
    if file.is_file() and (project := tomllib.loads(file.read_text("utf-8")).get("project", {})).get("name") == "lorica":
        return project["requires-python"], project["dependencies"]
    required = [text for text in metadata.requires("lorica") or [] if "extra ==" not in text]
    return metadata.metadata("lorica")["Requires-Python"], required


def python(version: str = "") -> Finding:
    """Whether this is a version of Python that is supported."""
    from packaging.specifiers import SpecifierSet

    version = version or platform.python_version()
    supported = ranges()[0]
    if not SpecifierSet(supported).contains(version, prereleases=True):
        return fail(
            f"{version} at {sys.executable}; Lorica needs {supported}", "rm -rf .venv && make setup PYTHON=python3.12", python=version
        )
    return ok(f"{version} (needs {supported})", python=version, lorica=__version__)


def packages() -> Finding:
    """Whether every required package is there in a version that is supported."""
    from packaging.requirements import Requirement

    versions, wrong, wanted = {}, [], []
    for text in ranges()[1]:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate():
            continue
        try:
            have = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
        else:
            versions[needed.name] = have
            if needed.specifier.contains(have, prereleases=True):
                continue
            wrong.append(f"{needed.name} {have} is not {needed.specifier}")
        wanted.append(f"'{needed.name}{needed.specifier}'")
    if wrong:
        return fail("; ".join(wrong), f"pip install {' '.join(wanted)}", **versions)
    return ok(f"all {len(versions)} that are required, in supported versions", **versions)


def compiler(gpu: bool) -> Finding:
    """Whether kernels can be compiled where they are used: Triton builds their launcher with a C compiler."""
    named = os.environ.get("CC")
    found = shutil.which(named) if named else shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if found:
        return ok(found)
    lacking = f"CC={named} is no program" if named else "no C compiler (gcc, cc) in PATH"
    install = ("unset CC" if named else "apt-get install gcc g++") + "  (or conda install gxx)"
    if gpu:
        return fail(f"{lacking}: Triton can't build kernels for the GPU", install)
    return warn(f"{lacking}: what bitsandbytes and torch compile for a CPU runs uncompiled", install)
