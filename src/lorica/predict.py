"""`lorica predict`: one text, or a csv, jsonl or parquet file of them, answered by a run, an adapter or a merged model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica import calibration
from lorica.answered_parts import Parts, identity_of
from lorica.config import ConfigError, PredictConfig, TrainerConfig
from lorica.data.asked_file import Survey, changed, look_ahead, look_through
from lorica.data.asking import ask_text, known_column
from lorica.durable import DiskFull, sha256
from lorica.runs import read_task, unfinished, weights_folder
from lorica.screen import Screen, counted, duration, quiet_libraries
from lorica.signals import EXIT_CODE, Interrupted, Stop, exit_code

if TYPE_CHECKING:
    from lorica.answers import Answer
    from lorica.file_answering import Job

SCORED_ROWS, WRITTEN_ROWS = 2048, 512  # of a chunk: where labels are scored, and where texts are written
LARGE = 1 << 28  # bytes of a file that takes a while to be looked through

quiet_libraries()


def run(config: PredictConfig) -> int:
    """Answer, print or write. Returns 0; 1 when rows of the input could not be answered (they say why); 75 when asked to stop
    (130: by Ctrl-C before any row was answered).

    Raises:
        ConfigError: no weights, no text column, columns with the names of ours, a base that can't be had, an output that another
            process writes.
    """
    if config.target_risk is not None:  # refused before torch is imported, which takes seconds
        calibration.threshold(calibration.read(weights_folder(Path(config.run).expanduser())), config.target_risk)
    if config.text is not None:
        _answer_text(config, config.text)
        return 0
    stop = Stop("stops after this batch; complete chunks are kept")
    stop.listen()
    try:
        return _answer_file(config, Screen(), stop)
    except Interrupted as e:  # before there was anything to keep
        print(f"lorica: {e}: interrupted before any row was answered", file=sys.stderr)
        return exit_code(e.signum, kept=False)
    finally:
        stop.close()


def _answer_text(config: PredictConfig, text: str) -> None:
    run = Path(config.run).expanduser()
    weights_folder(run)
    from lorica import hardware
    from lorica.answering import Predictor
    from lorica.models.trained import load_trained

    machine = _named_here(lambda: hardware.choose(TrainerConfig(accelerator=config.accelerator, devices=1)))
    trained = load_trained(run, machine.device, config.base)
    if why := unfinished(run):
        print(f"lorica: note: {why}", file=sys.stderr)  # what is answered stands alone on the standard output
    predictor = Predictor(trained, config.max_new_tokens, config.target_risk)
    print(_line(predictor.answer([ask_text(predictor.task, text)], config.batch_size)[0]))
    if predictor.cut.rows:
        print(f"lorica: note: {_cut(predictor.cut.rows, predictor.task)}", file=sys.stderr)


def _cut(texts: int, task: dict[str, Any]) -> str:
    longest, were = task.get("max_length") or 512, "was" if texts == 1 else "were"
    return f"{counted(texts, 'text')} did not fit into the {longest:,} tokens that the model reads, and {were} cut"


def _line(answer: Answer) -> str:
    if answer.probabilities is None:
        return str(answer.prediction)
    others = ", ".join(f"{name} {p:.3f}" for name, p in sorted(answer.probabilities.items(), key=lambda x: -x[1]))
    return f"{answer.prediction or 'not sure enough'}  ({others})"


def _named_here(choose: Any) -> Any:
    """What is chosen; in an error, keys of `trainer` have the names that they have here."""
    try:
        return choose()
    except ConfigError as e:
        raise ConfigError(e.where.removeprefix("trainer."), e.value, e.rule, e.fix.removeprefix("trainer.")) from None


def _answer_file(config: PredictConfig, screen: Screen, stop: Stop) -> int:
    assert config.input is not None
    source = Path(config.input).expanduser()
    target = Path(config.output).expanduser() if config.output else source.with_name(f"{source.stem}.scored{source.suffix}")
    if not target.parent.is_dir():
        raise ConfigError("output", target, "its folder does not exist", f"mkdir -p {target.parent}")
    if target.is_dir():
        raise ConfigError("output", target, "is a folder", f"output={target / 'scored.csv'}")
    run = Path(config.run).expanduser()
    task = read_task(weights_folder(run))
    look_ahead(source, task, config.text_column)  # before torch is imported, which takes seconds
    if why := unfinished(run):
        screen.note(why)
    from lorica import hardware
    from lorica.file_answering import Job

    kind = _named_here(lambda: hardware.accelerator_kind(config.accelerator))
    devices = _named_here(lambda: hardware.device_numbers(config.devices, kind))
    chunk_rows = _chunk_rows(config, task)
    version = _version(source)
    if source.stat().st_size > LARGE:
        screen.print(f"looking through {source} ({source.stat().st_size / 2**30:.1f} GiB)")
    parts = Parts(target, _identity(config, run, task, source, kind, chunk_rows))
    survey = parts.surveyed() or look_through(source, task, config.text_column, chunk_rows, target.suffix.lower())
    if survey.only is not None and known_column(task, {survey.only}) is None:
        screen.note(f"texts are read from the only column, {survey.only}")
    try:
        if note := parts.hold(survey):
            screen.note(note)
        return _answer_rest(Job(config, kind, source, task, survey, parts), version, devices, screen, stop)
    except DiskFull as e:
        screen.print(f"failed: {str(e).partition(';')[0]}; what is answered is in {parts.folder}. Make room, then the same command goes on")
        return 1
    finally:
        parts.release()


def _answer_rest(job: Job, version: tuple[int, int], devices: list[int], screen: Screen, stop: Stop) -> int:
    """Answer the chunks that an earlier run did not, and make the output."""
    from lorica.file_answering import Counted, answer_chunks, share_chunks

    survey, parts = job.survey, job.parts
    there = parts.done()
    wanted = [i for i in range(len(survey.chunks)) if i not in there]
    before = sum(survey.chunks[i][1] for i in there)
    if there:
        screen.print(f"goes on after {before:,} of {survey.answerable:,} rows, which {parts.folder} has")
    seconds, cut = 0.0, 0
    progress = Counted(screen, survey.answerable, before)
    try:
        if len(devices) > 1 and len(wanted) > 1:
            stop.deferred = True
            begun = time.perf_counter()
            with progress:
                cut = share_chunks(job, wanted, devices[: len(wanted)], progress.add, stop).rows
            seconds = time.perf_counter() - begun
        elif wanted or not parts.begun:
            predictor = job.predictor(devices[0])
            stop.deferred = True
            with progress:
                seconds = answer_chunks(job, predictor, wanted, progress.add, stop)
            cut = predictor.cut.rows
        stop.deferred = True
        if _version(job.source) != version:
            raise changed(job.source)
        parts.join(len(survey.chunks))
    except Interrupted as e:
        stop.ignore()
        done = sum(survey.chunks[i][1] for i in parts.done())
        screen.print(f"interrupted ({e}), {done:,} of {survey.answerable:,} rows are kept, by whole chunks; the same command goes on")
        return EXIT_CODE
    _say_what_is_done(survey, before, seconds, parts.output, screen)
    if cut:
        screen.note(_cut(cut, job.task) + (" (of those answered now)" if before else ""))
    return 1 if survey.faults else 0


def _say_what_is_done(survey: Survey, before: int, seconds: float, target: Path, screen: Screen) -> None:
    rows = survey.answerable - before
    took = f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
    earlier = f", {before:,} before" if before else ""
    screen.print(f"{counted(rows, 'row')} answered in {took} ({rows / max(seconds, 1e-9):,.0f} rows/s){earlier}: {target}")
    for fault in survey.first_faults:
        screen.note(f"{fault}: no prediction")
    if (more := survey.faults - len(survey.first_faults)) > 0:
        screen.note(f"and {more:,} more; their rows say why in the column error")


def _chunk_rows(config: PredictConfig, task: dict[str, Any]) -> int:
    """Rows of a chunk: many, so that batches of like lengths are found in it, and few, so that little is lost with one."""
    rows = SCORED_ROWS if task.get("labels") else WRITTEN_ROWS
    return rows if config.batch_size is None else -(-rows // config.batch_size) * config.batch_size


def _version(source: Path) -> tuple[int, int]:
    """Differs once somebody has written to the file.

    Raises:
        ConfigError: it is gone.
    """
    try:
        found = source.stat()
    except OSError:
        raise changed(source) from None
    return found.st_size, found.st_mtime_ns


def _identity(config: PredictConfig, run: Path, task: dict[str, Any], source: Path, kind: str, chunk_rows: int) -> dict[str, Any]:
    """What the output depends on."""
    base = config.base or task.get("base")
    bases = [Path(p).expanduser() for p in (base, run / "base") if p]
    return {
        "input": [source.name, sha256(source)],
        "run": identity_of(weights_folder(run)),
        "base": [base, *(identity_of(p) for p in bases if p.is_dir())],
        "text_column": config.text_column,
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "target_risk": config.target_risk,
        "accelerator": kind,
        "chunks": chunk_rows,
    }
