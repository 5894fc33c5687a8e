"""The command line: a verb, its flags, its help, and how it ends."""

from __future__ import annotations

import atexit
import dataclasses
import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorica import __version__
from lorica.checks import check_step
from lorica.composition import complete, compose, compose_tree, refuse_cut
from lorica.config import VERBS, CompareConfig, ConfigError, DoctorConfig, PlanConfig, TrainConfig
from lorica.options import group_options, register_plugins
from lorica.proposals import in_shell, nearest, sibling
from lorica.secrets import redact
from lorica.signals import NOTHING_KEPT

atexit.register(gc.freeze)  # looking for garbage among a million objects at the end takes a second and a half

FLAGS = ("help", "multirun", "cfg", "config-dir", "json")
RUNNERS = {
    "train": "lorica.train",
    "predict": "lorica.predict",
    "merge": "lorica.merge",
    "export": "lorica.exports.runner",
    "push": "lorica.push",
}
WITH_JSON = ("doctor", "plan")
WITH_TRAINS = ("compare", "plan")  # every other key and group is one of train's
USAGE = f"""usage: lorica VERB [group=option ...] [key=value ...]
verbs: {", ".join(VERBS)}
lorica VERB --help lists the groups and keys of a verb; --cfg job shows what would run."""


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit: 0 done, 1 failed, 2 the user's configuration or files can't be used, 75 asked to stop and saved,
    130 interrupted with nothing saved.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and columns of files may hold what is no text
    gc.disable()  # what is read at the start stays: looking through it for garbage is a tenth of the time
    try:
        if args[:1] == ["--version"]:
            print(f"lorica {__version__}")
            sys.exit(0)
        if verb is None:
            if not args or args[0] in ("-h", "--help"):
                print(USAGE)
                sys.exit(0 if args else 2)
            verb = args.pop(0)
            if verb not in VERBS:
                raise ConfigError("verb", verb, f"must be one of {', '.join(VERBS)}", f"lorica {nearest(verb, VERBS) or 'train'}")
        code = run(verb, args)
        sys.stdout.flush()
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except ConfigError as e:
        print(redact(f"lorica: {e}"), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("lorica: interrupted", file=sys.stderr)
        code = NOTHING_KEPT
    finally:
        gc.enable()
    if (launch := sys.modules.get("lorica.launch")) is not None:
        launch.leave(code)
    sys.exit(code)


def run(verb: str, args: list[str]) -> int:
    """Compose, check and call a verb.

    Raises:
        ConfigError: for every mistake in `args` or in a configuration file.
    """
    register_plugins()
    if any(a in ("-sc", "--shell-completion") for a in args):
        return complete(verb, args)
    typed, flags = _split(args)
    if flags["json"] and verb not in WITH_JSON:
        raise ConfigError("--json", None, f"is a flag of {' and '.join(WITH_JSON)}, not of {verb}", "leave it out")
    refuse_cut(verb, typed)
    overrides, for_train = _own(verb, typed, flags["config_dir"])
    if flags["show"] == "job" and flags["multirun"]:
        raise ConfigError("--cfg", "job", "shows one run, not a grid", "leave -m and --multirun out, with one value a key")
    if flags["show"]:
        print(_screen(verb, flags["show"], overrides, flags["config_dir"]))
        return 0
    if flags["multirun"] and verb != "train":
        raise ConfigError("-m", None, f"runs grids of train, not of {verb}")
    if flags["multirun"]:
        from lorica.grid import run_grid

        gc.enable()
        return run_grid(overrides, lambda cell: compose(verb, cell, flags["config_dir"]), flags["config_dir"])
    if verb == "doctor":
        return _doctor(overrides, flags)
    config = compose(verb, overrides, flags["config_dir"])
    if isinstance(config, CompareConfig):
        gc.enable()
        from lorica.compare import run_compare

        options = group_options(flags["config_dir"])["model"]
        return run_compare(config, for_train, lambda cell: compose("train", cell, flags["config_dir"]), options, flags["config_dir"])
    if isinstance(config, PlanConfig):
        from lorica.planning.runner import run as plan

        gc.enable()
        return plan(config, compose("train", for_train, flags["config_dir"]), flags["json"])
    if isinstance(config, TrainConfig):
        _look_ahead(config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    runner = "lorica.resume_drill" if getattr(config, "drill", None) == "resume" else RUNNERS[verb]
    imported = runner in sys.modules
    module = importlib.import_module(runner)
    if not imported:
        gc.freeze()  # what was imported stays, too
    gc.enable()
    code: int = module.run(config)
    if (loggers := sys.modules.get("lorica.loggers")) is not None:
        loggers.leave(code)
    return code


def _doctor(overrides: list[str], flags: dict[str, Any]) -> int:
    """Look at the machine, also where what reads configurations is broken: the checks say that."""
    from lorica.doctor import runner

    try:
        config: DoctorConfig = compose("doctor", overrides, flags["config_dir"])
        chosen = compose_tree("train", [f"model={config.model or 'mistral_qlora'}"], flags["config_dir"]).model
    except ImportError as e:
        print(redact(f"lorica: keys can't be read ({e}); what they are by default is looked at"), file=sys.stderr)
        return runner.run(DoctorConfig(), None, None, flags["json"])
    return runner.run(config, config.base or chosen.base, None if config.base else chosen.revision, flags["json"])


def _own(verb: str, typed: list[str], config_dir: str | None) -> tuple[list[str], list[str]]:
    """Overrides of the verb's own keys, and those that compare and plan hand on to train.

    Raises:
        ConfigError: a key that is nearly one of the verb's own.
    """
    if verb not in WITH_TRAINS:
        return typed, []
    own = [f.name for f in dataclasses.fields(VERBS[verb])]
    if verb == "plan":
        typed = [f"gpu.name={text.removeprefix('gpu=')}" if text.startswith("gpu=") else text for text in typed]
    mine = [text for text in typed if text.partition("=")[0].lstrip("+").partition(".")[0] in own]
    others = [text for text in typed if text not in mine]
    for text in others:
        name, _, value = text.partition("=")
        if "." not in name and name not in group_options(config_dir) and (near := nearest(name, own)):
            raise ConfigError(name, value, "there is no such key", in_shell(f"{near}={value}"))
    return mine, others


def _split(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Overrides, and the flags, named as Hydra names them: -m, -cd DIR, --cfg job, --help; --json."""
    overrides: list[str] = []
    flags: dict[str, Any] = {"multirun": False, "config_dir": None, "show": None, "json": False}
    rest = iter(args)
    for arg in rest:
        name, _, given = arg.partition("=")
        if arg in ("-m", "--multirun"):
            flags["multirun"] = True
        elif arg == "--json":
            flags["json"] = True
        elif arg in ("-h", "--help"):
            flags["show"] = "help"
        elif name in ("-c", "--cfg"):
            if (what := given or next(rest, "")) != "job":
                raise ConfigError("--cfg", what, "shows the job's configuration only", "--cfg job")
            flags["show"] = "job"
        elif name in ("-cd", "--config-dir"):
            folder = given if "=" in arg else next(rest, "")
            if not folder or not Path(folder).is_dir():
                raise ConfigError("--config-dir", folder, "there is no such folder" + sibling(Path(folder)))
            flags["config_dir"] = str(Path(folder).resolve())
        elif arg.startswith("-"):
            near = nearest(name.strip("-"), FLAGS)
            raise ConfigError(
                arg, None, "is not a flag of this program", f"--{near}" if near else f"{name.lstrip('-')}={given or '...'}, without dashes"
            )
        else:
            overrides.append(arg)
    return overrides, flags


def _look_ahead(config: TrainConfig) -> None:
    """Refuse what files show before torch is imported, which takes seconds."""
    from lorica import fingerprint
    from lorica.data.registry import look_ahead
    from lorica.runs import recorded, refuse_at_once

    if not config.drill:
        refuse_at_once(config)
    if config.resume not in (None, "auto", "required"):
        now = fingerprint.of_configuration(config)
        began = recorded(Path(config.resume))
        fingerprint.check_same(config.resume, {key: began[key] for key in now if key in began}, now)
    rows = look_ahead(config.data, config.seed)
    if rows is not None and not config.data.report_only:
        check_step(config.trainer, rows)


def _screen(verb: str, what: str, overrides: list[str], config_dir: str | None) -> str:
    """`--cfg job`: what would run. `--help`: what can be set."""
    if what == "job":
        from lorica.runs import to_yaml

        return redact(to_yaml(compose(verb, overrides, config_dir))).rstrip()
    from lorica.help_screen import help_screen

    groups = group_options(config_dir) if verb == "train" else {}
    tree = compose_tree(verb, overrides, config_dir)
    return help_screen(verb, tree, groups, as_json=verb in WITH_JSON, of_train=verb in WITH_TRAINS)
