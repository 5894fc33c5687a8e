"""`lorica doctor`: every check at once, a line each in a fixed order, and the exit code. No torch in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from lorica.config import DoctorConfig
from lorica.doctor import gpus, places, software
from lorica.doctor.outside import Hub, wandb
from lorica.doctor.probing import Probing
from lorica.doctor.verdicts import FAIL, OK, WARN, Check, Once, Verdict

WIDTH = 110  # of lines that no terminal shows
NAMES = 12  # columns of a check's name


def run(config: DoctorConfig, base: str | None, revision: str | None, as_json: bool) -> int:
    """Look at everything and print a verdict each.

    Args:
        base: whose access is checked, as `model.base` and `model.revision`; None: none is. as_json: one list instead of lines.
    Returns:
        1 where runs would fail, else 0.
    """
    until = time.monotonic() + config.timeout
    probing = Probing(until)
    verdicts = []
    try:
        if not as_json:
            print("lorica doctor", flush=True)
        hub = Hub(base, revision, bool(config.model or config.base))
        for verdict in _verdicts(config, hub, probing, until):
            verdicts.append(verdict)
            if not as_json:
                print(line(verdict, _width()), flush=True)
    finally:
        probing.close()
    if as_json:
        print(json.dumps([dataclasses.asdict(v) for v in verdicts], indent=2, ensure_ascii=False))
    else:
        print(_count(verdicts))
    return 1 if any(v.verdict == FAIL for v in verdicts) else 0


def _verdicts(config: DoctorConfig, hub: Hub, probing: Probing, until: float) -> Iterator[Verdict]:
    """Every check's, in order; all are under way from the start."""
    driver = Once(lambda: gpus.Driver(probing.outcome("driver")))
    checks = [
        Check("python", software.python),
        Check("packages", software.packages),
        Check("torch", lambda: gpus.torch(driver(), probing.outcome("torch"))),
        Check("gpu", lambda: gpus.gpu(driver(), probing.outcome("gpu"))),
        Check("compiler", lambda: software.compiler(driver().present)),
        Check("triton", lambda: gpus.triton(driver(), probing.outcome("triton"))),
        Check("bitsandbytes", lambda: gpus.bitsandbytes(probing.outcome("bitsandbytes"))),
        Check("attention", lambda: gpus.attention(probing.outcome("triton"), probing.outcome("attention"))),
        Check("memory", places.memory),
        Check("outputs", lambda: places.outputs(Path(config.outputs))),
        Check("hub cache", lambda: places.hub_cache(hub.missing)),
        Check("own cache", places.own_cache),
        Check("hub", hub.reached),
        Check("hub token", hub.token),
        *([Check("base", hub.base)] if hub.base_name else []),
        Check("wandb", wandb),
    ]
    for check in checks:
        yield check.verdict(until + 0.5)  # the probes end by themselves at `until`


def line(verdict: Verdict, width: int) -> str:
    """`ok    name  what was found`, wrapped beside itself, and below it the fix in one line, to be copied."""
    head = f"  {verdict.verdict.upper() if verdict.verdict == FAIL else verdict.verdict:<4}  {verdict.name:<{NAMES}}  "
    room = max(20, width - len(head))
    found = textwrap.wrap(verdict.found, room, break_long_words=False, break_on_hyphens=False) or [""]
    lines = [head + found[0], *(" " * len(head) + more for more in found[1:])]
    return "\n".join([*lines, *([f"{' ' * len(head)}fix: {verdict.fix}"] if verdict.fix else [])])


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH


def _count(verdicts: list[Verdict]) -> str:
    number = {kind: sum(v.verdict == kind for v in verdicts) for kind in (OK, WARN, FAIL)}
    if number[FAIL]:
        end = "runs would fail"
    elif number[WARN]:
        end = "runs work; what warns is slower or can't be used"
    else:
        end = "nothing to mend"
    return f"{number[OK]} ok, {number[WARN]} warn, {number[FAIL]} fail: {end}"
