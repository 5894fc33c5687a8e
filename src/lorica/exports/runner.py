"""`lorica export`: writes each format, reads it back in its own runtime, puts it on the ladder, or refuses it.

An export takes its place only when it was seen to answer as the original does; one that is there, intact and made of the same weights
with the same settings stays.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from lorica.checks import export_formats
from lorica.config import ConfigError, ExportConfig
from lorica.durable import MANIFEST, replaced_folder, sha256, write_json, write_text
from lorica.exports import formats
from lorica.exports.formats import REPORT, Format, check_intact
from lorica.exports.ladder import Rung, cells, compare, heads, markdown
from lorica.exports.questions import Questions
from lorica.runs import Held, unfinished
from lorica.screen import Screen, quiet_libraries

quiet_libraries()

from lorica import certificate  # noqa: E402  (after the libraries' noise is off)
from lorica.exports.asking import questions_of  # noqa: E402
from lorica.exports.source import Source  # noqa: E402
from lorica.models.trained import Opened, open_trained  # noqa: E402

ORIGINAL = "original"
LADDER = "ladder"
WORK = ".work-"  # beginning of the name of what is needed on the way
TAIL = 400  # characters of what a process that failed has said


@dataclass
class Job:
    """One call of the verb. home: <run>/exports. made_of: sha256 of the trained weights, by file."""

    config: ExportConfig
    opened: Opened
    source: Source
    questions: Questions
    home: Path
    made_of: dict[str, str]
    screen: Screen

    def settings(self, name: str, variant: str, found: Format) -> dict[str, Any]:
        """What an export depends on: one with the same settings is not made again."""
        return {
            "format": name,
            "variant": variant,
            "weights": self.made_of,
            "base": {"name": self.opened.base.name, "revision": self.opened.base.revision},
            "questions": self.questions.digest(),
            "calibration_rows": self.config.calibration_rows if name == "gptq" else None,
            "llama_cpp": self.config.llama_cpp if name == "gguf" else None,
            "versions": formats.versions(found),
        }


def run(config: ExportConfig) -> int:
    """Write what was asked for. Returns 0; 2 where an export was refused, and the others are there.

    Raises:
        ConfigError: the run can't be exported at all, or not in a format that was asked for; an export that is there is damaged.
    """
    screen = Screen()
    run_folder = Path(config.run).expanduser().resolve()  # outputs/latest may point elsewhere by the time of writing
    opened = open_trained(run_folder, config.base)
    if why := unfinished(run_folder):
        screen.note(why)
    wanted = [(name, variant) for name in export_formats(config) for variant in getattr(config, name)]
    for name in export_formats(config):
        _check_task(name, formats.find(name), opened)
    home = run_folder / "exports"
    home.mkdir(exist_ok=True)
    held = Held(home, lock=".lock", key="run", doing="exporting")
    try:
        for left in home.glob(f"{WORK}*"):  # by a call that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=WORK, dir=home) as work, screen.counting("merged, bytes") as count:
            rows = certificate.sample(opened.task, run_folder, config.sample, config.certify_rows)
            questions = questions_of(opened.task, opened.tokenizer, rows)
            source = Source(run_folder, opened, config.base, Path(work), count, questions.texts)
            job = Job(config, opened, source, questions, home, _made_of(opened), screen)
            return _climb(job, wanted)
    finally:
        (home / ".lock").unlink(missing_ok=True)
        held.release()


def _check_task(name: str, found: Format, opened: Opened) -> None:
    """Refuse a format that has no such models.

    Raises:
        ConfigError: says which has.
    """
    task = str(opened.task["task"])
    if task not in found.tasks:
        kind = "causal models" if task == "causal_lm" else "classifiers"
        other = "gguf" if task == "causal_lm" else "onnx"
        raise ConfigError("format", name, f"is not written for {kind}; this run is one", f"format={other}, torchao or safetensors")


def _made_of(opened: Opened) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(opened.folder.glob("*.safetensors"))}


# --------------------------------------------------------------------------------------------------------------- the ladder


def _climb(job: Job, wanted: list[tuple[str, str]]) -> int:
    """Make what is not there yet, show the ladder, keep it."""
    there = {place: rung for place in wanted if (rung := _finished(job, *place)) is not None and not job.config.again}
    for (name, variant), rung in there.items():
        job.screen.print(f"{name} {variant} is there, intact and of the same weights: {job.home / name / variant}")
        if why := rung.broken(job.config.min_agreement):
            raise ConfigError(
                "min_agreement", f"{job.config.min_agreement:g}", f"{name} {variant}: {why}", "a lower one, or another format"
            )
    original = _kept_original(job)
    refused: dict[tuple[str, str], Rung] = {}
    if len(there) < len(wanted) or original is None:
        answers = job.source.work / ORIGINAL
        measured = _measure(job, answers, ORIGINAL, job.source.run, json.dumps(job.config.base))
        original = compare(ORIGINAL, job.questions, answers, answers, measured, _original_size(job.opened))
        for name, variant in wanted:
            if (name, variant) not in there:
                try:
                    _make(job, name, variant, answers)
                except Refused as e:
                    job.screen.print(f"refused {e.rung.name}: {e.rung.refused}")
                    refused[name, variant] = e.rung
                gc.collect()
    rungs = [original, *_all_finished(job, refused), *refused.values()]
    _show(job, rungs)
    return 2 if refused else 0


class Refused(Exception):
    """An export that is damaged or unfaithful, and was not written."""

    def __init__(self, rung: Rung) -> None:
        super().__init__(rung.refused)
        self.rung = rung


def _make(job: Job, name: str, variant: str, answers: Path) -> None:
    """Write one export, read it back, and let it take its place.

    Raises:
        Refused: it can't be written, can't be read, or does not answer as the original does.
    """
    found, target = formats.find(name), job.home / name / variant
    new = not target.parent.exists()
    try:
        with replaced_folder(target) as folder:
            job.screen.print(f"{name} {variant}: writing")
            said = found.write(job.source, folder, variant, job.config)
            files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
            kept = {file: {"bytes": path.stat().st_size, "sha256": sha256(path)} for file, path in files.items()}
            job.screen.print(f"{name} {variant}: reading {len(job.questions.rows)} rows")
            home = job.source.work / f"{name}-{variant}"
            measured = _measure(job, home, name, folder, variant)
            size = sum(path.stat().st_size for file, path in files.items() if path.suffix in (".safetensors", ".onnx", ".gguf", ".data"))
            rung = compare(f"{name} {variant}", job.questions, home, answers, measured, size)
            if why := rung.broken(job.config.min_agreement):
                raise Refused(replace(rung, refused=f"{why} (min_agreement={job.config.min_agreement:g})"))
            report = {
                "settings": job.settings(name, variant, found),
                "made": said,
                "sample": {"origin": job.questions.origin, "rows": len(job.questions.rows), "positions": rung.positions},
                "min_agreement": job.config.min_agreement,
                "figures": rung.as_json(),
                "files": kept,
            }
            write_json(folder / REPORT, report)
            write_text(folder / "README.md", _card(job, name, variant, rung))
    except ConfigError as e:
        raise Refused(Rung(f"{name} {variant}", refused=str(e).replace("\n  try: ", "; try "))) from None
    finally:
        if new and target.parent.is_dir() and not any(target.parent.iterdir()):
            target.parent.rmdir()


def _measure(job: Job, home: Path, name: str, folder: Path, variant: str) -> dict[str, Any]:
    """Read the questions in a process of its own; what it measured.

    Raises:
        ConfigError: the files are refused, or end the process; the runtime's tokenizer gives other ids.
    """
    home.mkdir()
    write_json(home / "request.json", {"format": name, "folder": str(folder), "variant": variant})
    job.questions.write(home / "questions.json")
    command, environment = formats.module_command(["lorica.exports.reading", str(home)])
    place = None if name == ORIGINAL else home  # runtimes leave logs where they work; a base may be named from here
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, errors="replace", check=False)
    file = home / "measured.json"
    measured: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if "error" in measured:
        raise ConfigError(*measured["error"])
    if done.returncode or not measured:
        job.screen.log(done.stderr)
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1][:TAIL]
        raise ConfigError("format", name, f"its runtime ended with {done.returncode} while it read {variant}: {said}", "another format")
    if measured.get("tokenizer"):
        raise ConfigError("format", name, f"the runtime's tokenizer is not the one of training: {measured['tokenizer']}", "another format")
    return measured


# ------------------------------------------------------------------------------------------------------------ what is there


def _report(folder: Path) -> dict[str, Any] | None:
    """An intact export's report; None where there is no export.

    Raises:
        ConfigError: it is damaged.
    """
    if not (folder / REPORT).exists() and not (folder / MANIFEST).exists():
        return None
    check_intact(folder)
    found: dict[str, Any] = json.loads((folder / REPORT).read_text("utf-8"))
    return found


def _finished(job: Job, name: str, variant: str) -> Rung | None:
    """The rung of an export that need not be made again.

    Raises:
        ConfigError: it is damaged, and was not asked for again.
    """
    if job.config.again or (report := _report(job.home / name / variant)) is None:
        return None
    return Rung.from_json(report["figures"]) if report["settings"] == job.settings(name, variant, formats.find(name)) else None


def _all_finished(job: Job, refused: dict[tuple[str, str], Rung]) -> list[Rung]:
    """Every export of these weights, measured on these rows, that is there; one that is damaged is said and left out."""
    rungs = []
    for file in sorted(job.home.glob(f"*/*/{REPORT}")):
        if (file.parent.parent.name, file.parent.name) in refused:
            continue
        try:
            report = _report(file.parent)
        except ConfigError as e:
            job.screen.note(f"not on the ladder: {e.rule}")
            continue
        if report is not None and all(report["settings"][k] == v for k, v in _common(job).items()):
            rungs.append(Rung.from_json(report["figures"]))
    return rungs


def _common(job: Job) -> dict[str, Any]:
    return {"weights": job.made_of, "questions": job.questions.digest()}


def _kept_original(job: Job) -> Rung | None:
    """The original's rung, where an earlier call measured the same."""
    file = job.home / f"{LADDER}.json"
    if not file.is_file():
        return None
    kept = json.loads(file.read_text("utf-8"))
    return Rung.from_json(kept["rungs"][0]) if kept.get("of") == _common(job) else None


def _original_size(opened: Opened) -> int:
    """Bytes that must be kept to answer: the weights, and of an adapter its base's files."""
    from lorica.models import base

    own = sum(file.stat().st_size for file in opened.folder.glob("*.safetensors"))
    return own + (sum(file.stat().st_size for file in set(base.weight_files(opened.base).values())) if opened.is_adapter else 0)


# ---------------------------------------------------------------------------------------------------------- what was found


def _show(job: Job, rungs: list[Rung]) -> None:
    """The ladder on the screen, and in ladder.json and ladder.md."""
    rows = job.questions
    about = [f"{len(rows.rows)} rows ({rows.origin}), read one at a time on {_machine()}; each model in a process of its own."]
    table = Table(title="export ladder", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for i, head in enumerate(heads(rungs)):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for rung in rungs:
        table.add_row(*cells(rung), style="red" if rung.refused else None)
    job.screen.print(about[0])
    job.screen.print(table)
    write_json(job.home / f"{LADDER}.json", {"of": _common(job), "about": about, "rungs": [rung.as_json() for rung in rungs]})
    write_text(job.home / f"{LADDER}.md", markdown(rungs, about))
    job.screen.print(f"exports  {job.home}")


def _machine() -> str:
    import platform

    return f"{platform.machine()}, {os.cpu_count()} CPU cores"


def _card(job: Job, name: str, variant: str, rung: Rung) -> str:
    opened = job.opened
    labels = opened.task.get("labels")
    agreement = rung.label_agreement if rung.label_agreement is not None else rung.agreement
    lines = [
        "---",
        f"base_model: {opened.base.name}",
        "---",
        f"# {Path(opened.base.name).name}, {name} {variant}",
        "",
        f"A model trained on {opened.task.get('data') or 'unnamed data'}, exported by Lorica.",
        "",
        f"- Task: {opened.task['task']}" + (f", labels {', '.join(labels)}" if labels else ""),
        f"- Beside the original on {len(job.questions.rows)} rows ({job.questions.origin}): the same answer to {agreement:.1%}, mean KL "
        f"divergence {rung.kl:.1e} nats; {REPORT} has all figures",
        f"- Files are those that were measured: `sha256sum -c {MANIFEST}`",
    ]
    return "\n".join(lines) + "\n"
