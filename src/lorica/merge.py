"""`lorica merge`: adapter and base as one plain transformers model, written when it was seen to answer as the adapter does.

A 4-bit base is merged as its dequantised weights, which are what the adapter was trained on; how far its original weights are from
these is measured beside, and they are written only if that is nearer.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorica.config import ConfigError, MergeConfig, TrainerConfig
from lorica.durable import Sums, check_room, replaced_folder, write_json
from lorica.runs import read_task, unfinished
from lorica.screen import Screen, quiet_libraries

quiet_libraries()

import torch  # noqa: E402  (after the libraries' noise is off)
from rich.table import Table  # noqa: E402

from lorica import certificate, hardware, model_card  # noqa: E402
from lorica.certificate import Figures, Sample  # noqa: E402
from lorica.fingerprint import versions  # noqa: E402
from lorica.models import base, merging, shards  # noqa: E402
from lorica.models.merging import Plan, merge  # noqa: E402
from lorica.models.trained import Opened, Trained, load_opened, load_trained, open_trained  # noqa: E402

__all__ = ["merge", "run"]

REPORT = "merge_report.json"
WEIGHTS = ".safetensors"
ONTO = {  # in words
    "base": "into its base",
    "dequantised": "onto the dequantised 4-bit base",
    "original": "onto the original base, before it was quantised",
    "requantised": "onto the dequantised base and rounded to 4 bits again",
}


@dataclass
class Job:
    """One merge. source: the run. dtype: of the weights written. plan: None where PEFT merges in memory. sums: of all weight files."""

    config: MergeConfig
    source: Path
    opened: Opened
    device: torch.device
    dtype: torch.dtype
    plan: Plan | None
    screen: Screen
    sums: Sums


def run(config: MergeConfig) -> int:
    """Write the merged model.

    Raises:
        ConfigError: not an adapter; its base can't be had; no candidate answers as the adapter does.
    """
    screen = Screen()
    source = Path(config.run).expanduser().resolve()  # outputs/latest may point elsewhere by the time of writing
    target = Path(config.output).expanduser() if config.output else source / "merged"
    check_target(target)
    opened = open_trained(source, config.base)
    if not opened.is_adapter:
        raise ConfigError("run", config.run, "is a whole model already; there is nothing to merge", "use it as it is")
    if why := unfinished(source):
        screen.note(why)
    names = candidates(config, opened)
    dtype = opened.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    device = hardware.choose(TrainerConfig(accelerator=config.accelerator, devices=1)).device
    plan = merging.plan(opened)
    rows = certificate.sample(opened.task, source, config.sample, config.certify_rows) if config.certify_rows else None
    known: dict[str, str] = {}
    with Sums() as sums, replaced_folder(target, _size(plan, dtype), known) as folder:
        job = Job(config, source, opened, device, dtype, plan, screen, sums)
        sums.start(_read(opened))
        found = compare(job, names, rows, folder) if rows is not None else {}
        if rows is None:
            write_candidate(job, names[0], folder)
        chosen = certificate.best({name: found[name] for name in names}) if rows is not None else names[0]
        if rows is not None:
            show(screen, rows, found, names, chosen)
            refuse(config, found[chosen], chosen)
        for file in list((folder / chosen).iterdir()):
            if file.suffix == WEIGHTS:
                known[file.name] = sums.of(file)
            os.replace(file, folder / file.name)
        for rest in [p for p in folder.iterdir() if p.is_dir()]:
            shutil.rmtree(rest)
        write_json(folder / REPORT, report(job, chosen, rows, found))
        merged = model_card.Merged(ONTO[chosen], _name(dtype), certificate_line(rows, found.get(chosen)))
        model_card.write(source, folder, {}, merged)
    screen.print(f"merged {ONTO[chosen]}, {_name(dtype)}: {target}")
    kind = "text-generation" if opened.task["task"] == "causal_lm" else "text-classification"
    program = f"from transformers import pipeline; print(pipeline({kind!r}, {str(target)!r})('...'))"
    typed = f'"{program}"' if not set(program) & set('"$`\\!') else shlex.quote(program)
    screen.print(f"next   python -c {typed}")
    return 0


def candidates(config: MergeConfig, opened: Opened) -> list[str]:
    """What to write, or to choose from.

    Raises:
        ConfigError: the base was not in 4 bits, so that there is no choice.
    """
    if opened.quantization is None:
        if config.onto != "auto" or config.requantize:
            name, value = ("onto", config.onto) if config.onto != "auto" else ("requantize", "true")
            raise ConfigError(name, value, "is for adapters of a 4-bit base; this one's was not quantised", f"leave {name} out")
        return ["base"]
    if config.onto != "auto":
        return [config.onto]
    if config.certify_rows == 0:
        return ["dequantised"]
    return ["dequantised", "original", *(["requantised"] if config.requantize else [])]


def check_target(folder: Path) -> None:
    """Refuse to replace a folder that an earlier merge did not write.

    Raises:
        ConfigError: it holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()) and read_task(folder).get("weights") != "merged":
        raise ConfigError("output", folder, "is a folder with other files, which would be replaced", f"output={folder / 'merged'}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError("output", folder, "is a file")


# ------------------------------------------------------------------------------------------------------------ candidates


def compare(job: Job, names: list[str], rows: Sample, folder: Path) -> dict[str, Figures]:
    """Write candidates into folders of their names, and measure them against the adapter, whose own figures are `adapter`.

    Never are two models in memory. Of the candidates all but the best so far are removed. Where there is a choice, the adapter is first
    put beside the original weights, which differs from merging into them by rounding only: if that is further away than what is written
    already, it is not written.
    """
    logits = folder / "logits"
    logits.mkdir()
    found: dict[str, Figures] = {}

    def measured(what: str, load: Callable[[], Trained]) -> Figures:
        hardware.forget()
        with job.screen.counting(what) as count:
            trained = load()
            if trained.adapter is None:
                merging.compute_in(trained.model, trained.model.dtype)
            return certificate.measure(trained, rows, logits, not found, count)

    def best() -> str:
        return certificate.best({n: found[n] for n in names if n in found})

    found["adapter"] = measured("adapter", lambda: load_opened(job.opened, job.device))
    for name in names:
        if name == "original" and len(found) > 1:
            beside = measured("original compared", lambda: load_opened(job.opened, job.device, "original"))
            found[name] = replace(beside, in_memory=True)
            if best() != name:
                continue
            check_room(folder / name, _size(job.plan, job.dtype))
        write_candidate(job, name, folder)
        found[name] = measured(f"{name} compared", partial(load_trained, folder / name, job.device))
        needed = {best()} | ({"dequantised"} if "requantised" in names and name != "requantised" else set())
        for other in {*names, "dequantised"} - needed:
            shutil.rmtree(folder / other, ignore_errors=True)
    return found


def write_candidate(job: Job, name: str, folder: Path) -> None:
    """Write one merged model, complete, into the folder of its name."""
    new = folder / name
    if new.is_dir():
        return
    if name == "requantised":
        write_candidate(job, "dequantised", folder)
        merging.requantize(folder / "dequantised", new, job.opened, job.dtype, job.device)
    else:
        new.mkdir()
        original = name == "original"
        if job.plan is None:
            merging.merge_whole(job.source, job.config.base, new, job.dtype, job.device, original)
        else:
            with job.screen.counting(f"{name} written, bytes") as count:
                merging.write(job.plan, new, job.dtype, job.device, original, count)
    changes = {"weights": "merged", "quantization": None, "dtype": _name(job.dtype), "merged_from": str(job.opened.folder)}
    job.opened.write_asking(new, changes)
    job.sums.start(sorted(new.glob(f"*{WEIGHTS}")))


def _size(plan: Plan | None, dtype: torch.dtype) -> int:
    """Bytes of one candidate, where they are known."""
    return sum(shards.size(kind) for kinds in plan.shards(dtype) for kind in kinds.values()) if plan is not None else 0


def _read(opened: Opened) -> list[Path]:
    """The adapter's file, and the base's files of weights."""
    return [opened.folder / f"adapter_model{WEIGHTS}", *sorted(set(base.weight_files(opened.base).values()))]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------------- what was found


def refuse(config: MergeConfig, found: Figures, name: str) -> None:
    """Let nothing be written that does not answer as the adapter does.

    Raises:
        ConfigError: a limit is broken.
    """
    if not (what := found.broken(config.max_kl, config.min_agreement)):
        return
    close = found.kl is not None and found.kl <= config.max_kl
    key, value = ("min_agreement", config.min_agreement) if close else ("max_kl", config.max_kl)
    other = "dtype=float32" if config.onto in ("auto", "dequantised") else "onto=dequantised"
    raise ConfigError(key, f"{value:g}", f"merged {ONTO[name]}, {what}; nothing was written", f"{other}, or another {key} if that will do")


def show(screen: Screen, rows: Sample, found: dict[str, Figures], names: list[str], chosen: str) -> None:
    """A small table of the adapter and all candidates."""
    first = found["adapter"]
    accuracy = first.accuracy is not None
    heads = ["", "mean KL", "same top-1", "largest logit difference", "loss", *(["accuracy"] if accuracy else [])]
    table = Table(title=f"compared at {first.positions:,} positions of {len(rows.examples)} rows: {rows.origin}", title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in certificate.table(["adapter", *names], [found[n] for n in ("adapter", *names)]):
        text = f"merged ({row[0]})" if row[0] in ONTO else row[0]
        text += ", not written" if found[row[0]].in_memory else ""
        table.add_row(text, *row[1 : len(heads)], style="bold" if row[0] == chosen else None)
    screen.print(table)


def report(job: Job, chosen: str, rows: Sample | None, found: dict[str, Figures]) -> dict[str, Any]:
    """merge_report.json."""
    opened, config = job.opened, job.config
    adapter, *files = _read(opened)
    return {
        "written": chosen,
        "dtype": _name(job.dtype),
        "certified": rows is not None,
        "sample": None if rows is None else {"origin": rows.origin, "rows": len(rows.examples), "positions": found["adapter"].positions},
        "limits": None if rows is None else {"max_kl": config.max_kl, "min_agreement": config.min_agreement},
        "adapter": found["adapter"].as_json() if found else None,
        "candidates": {name: {**figures.as_json(), "in_memory": figures.in_memory} for name, figures in found.items() if name != "adapter"},
        "trained": {"dtype": _name(opened.dtype), "quantization": opened.task.get("quantization")},
        "merged": "tensor by tensor" if job.plan is not None else "in memory",
        "device": job.device.type,
        "versions": versions(),
        "fingerprints": {
            "base": {"name": opened.base.name, "revision": opened.base.revision, "sha256": {f.name: job.sums.of(f) for f in files}},
            "adapter": {"sha256": job.sums.of(adapter)},
        },
    }


def certificate_line(rows: Sample | None, found: Figures | None) -> str:
    """How far the merged model is from the adapter, in words."""
    if rows is None or found is None:
        return f"not compared with the adapter (`certify_rows=0`); {REPORT} has what it was made of"
    return (
        f"mean KL divergence from the adapter {found.kl:.1e} nats, the same most likely answer at {found.agreement:.2%} of "
        f"{found.positions:,} positions, largest logit difference {found.largest:.2g} ({len(rows.examples)} rows: {rows.origin}; {REPORT})"
    )
