"""docs/configuration.md, written from the schema and the YAML: `python -m lorica.configuration_page FILE`. No torch."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator, Set
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from lorica.config import DATA_SCHEMAS, LOGGER_SCHEMAS, VERBS, DataConfig, LoggerConfig, limits
from lorica.options import conf_dir, fields_of

HOW_TO = """# Configuration

Written by `make docs` from `src/lorica/config.py` and `conf/`; edit those.

## Setting values

```
python train.py model=roberta_lora data=sentiment            # group=option: a file of conf/
python train.py trainer.max_epochs=1 optimizer.lr=5e-4       # key=value, with dots between the levels
python train.py 'model.lora.target_modules=[query,key]'      # a list; the shell's quotes keep it off brackets and spaces
python train.py data=sentiment 'data.prompt_template="Rate: {text}"'    # a text with braces, colons or commas: quotes in quotes
python train.py experiment=chatdoctor                        # a recipe: groups and values together
python train.py experiment=chatdoctor --cfg job              # show what would run, and stop
python train.py -m model=minilm_lora,minilm_full model.lora.r=4,8       # a grid: every combination
python train.py --help                                       # groups, flags, keys with their values and meanings
python predict.py run=outputs/latest text="Late goal wins the cup, 3-2"
```

Values are written in Hydra's grammar, hence the quotes in quotes. `text`, `format` and the paths of
`predict`, `merge`, `export` and `doctor` are taken as they are: commas, apostrophes and umlauts need the shell's quotes only.

`lorica VERB ...` does the same where the package is installed; the verbs are `train`, `predict`, `merge`, `export`, `push`,
`compare`, `plan` and `doctor`. Groups and `-m` belong to `train`; `compare` takes its groups and keys too, for all of its models, and
`plan`, with `gpu=NAME` besides. Each
combination of a grid is a process and a run folder of its own, under `outputs/grids/`; one that is finished is not run again, and a
key is left out of combinations that have no use for it (`model.lora.r` with `model=minilm_full`).

A later source wins: the schema's default, the YAML of the chosen groups, `experiment=`, `debug=`, the keys on the command line. A
group named on the command line takes the place of the one that an experiment chooses, but the values that the experiment or
`debug=` sets still stand over its own (`experiment=chatdoctor model=mistral_lora` keeps the recipe's `model.lora.r=64`),
but for an adapter that the chosen model is without (`model=minilm_full`).
Where `optimizer.name`, `optimizer.lr`, `optimizer.warmup_ratio` or the micro-batch's size is null in the end, `model.recommended` fills
it in.
`resume=RUN_FOLDER` takes the run's own `config.yaml` in place of the groups; a finished run, or one without a checkpoint, is refused.

`--config-dir DIR` adds a folder laid out like `conf/`: `DIR/data/reviews.yaml` makes `data=reviews`. Its options stand beside those
below and can't have their names.

A key that does not exist, a wrong type, a value out of range and keys that contradict each other end the program before torch is
loaded, with the key, the value, the rule and what to type instead.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | training failed (train.log has the traceback), or runs of a grid, rows of a file, a check of `doctor`; a `plan` does not fit |
| 2 | the configuration, a file or the machine can't be used for this |
| 75 | asked to stop; what is done is kept: `train` goes on with `resume=auto`, `predict` with the same command |
| 130 | interrupted by Ctrl-C before there was anything to keep |

| environment variable | meaning |
|---|---|
| `LORICA_VERBOSE` | set to anything: what the libraries print is shown, and the traceback of a failed run |
| `LORICA_CACHE` | tokens, teachers' scores (10 GiB each), compiled layers; deletable; else `$XDG_CACHE_HOME/lorica`, `~/.cache/lorica` |
| `HF_HUB_OFFLINE` | 1: the Hugging Face hub is not asked; what its cache holds is used |
| `WANDB_API_KEY`, `WANDB_MODE` | W&B's own; `WANDB_MODE=offline` wins over `logger.mode` |

Completion in bash, in the clone with its environment active: after

```
eval "$(python train.py -sc install=bash)"
```

the tab key completes groups, their options and keys after `python train.py`, and keys after `python predict.py`, in that shell.

## Groups
"""
TYPES = {int: "int", float: "number", str: "text", bool: "true/false"}
SEVERAL = {  # keys that take values of more than one type
    "target_modules": "list of text, or `all-linear`,",
    "devices": "int, list of int, or `auto`",
    "val_check_interval": "int or number",
    "gradient_checkpointing": "true/false, int or `offload`",
}


def page() -> str:
    """The whole page as Markdown."""
    lines = [HOW_TO, *_groups()]
    for verb, schema in VERBS.items():
        lines += _section(schema, verb, "", 2)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _read(name: str) -> str:
    return (conf_dir() / name).read_text("utf-8")


def _groups() -> Iterator[str]:
    """Every group with its options and what each is."""
    entries = [entry for entry in yaml.safe_load(_read("train.yaml"))["defaults"] if isinstance(entry, dict)]
    for group, default in (pair for entry in entries for pair in entry.items()):
        yield f"### {group}\n\nDefault: " + ("none.\n" if default is None else f"`{group}={default}`.\n")
        yield "| option | what it is |\n|---|---|"
        for file in sorted((conf_dir() / group).glob("*.yaml")):
            yield f"| `{group}={file.stem}` | {_opening(file.read_text('utf-8'))} |"
        yield ""


def _opening(text: str) -> str:
    """The comment that opens a YAML file, or its values where it has none."""
    block = re.match(r"(?:#.*\n)*", text)
    comment = " ".join(line.strip("# ") for line in block[0].splitlines() if "@package" not in line) if block else ""
    return _prose(comment) or ", ".join(f"`{k}: {v}`" for k, v in yaml.safe_load(text).items() if k != "defaults")


def _section(schema: type, title: str, prefix: str, level: int, about: str = "") -> Iterator[str]:
    """A dataclass: what it is, its own keys, then the dataclasses in it. prefix: "" or `model.`, `model.lora.`"""
    shipped = yaml.safe_load(_read("trainer/default.yaml")) if title == "trainer" else {}
    yield f"{'#' * level} {title}\n\n{_prose(schema.__doc__ or '')}{about}\n"
    yield from _table(schema, prefix, shipped)
    for f, inner in fields_of(schema):
        if inner is not None:
            name = f"{prefix}{f.name}"
            meaning = f.metadata.get("meaning")
            yield from _section(inner, name, f"{name}.", level + 1, f"\n\n`{name}`: {_prose(meaning)}. Default: null." if meaning else "")
    for base, schemas in ((DataConfig, DATA_SCHEMAS), (LoggerConfig, LOGGER_SCHEMAS)):
        if schema is base:
            yield from _own_keys(typing.cast("dict[str, type]", schemas), base, title, level + 1)


def _own_keys(schemas: dict[str, type], base: type, group: str, level: int) -> Iterator[str]:
    """For each of our dataclasses on `base`: the options that use it, and the keys it adds. Other packages' are left out."""
    for schema in dict.fromkeys(s for s in schemas.values() if s is not base and s.__module__ == base.__module__):
        options = ", ".join(f"{group}={name}" for name, used in schemas.items() if used is schema)
        yield f"{'#' * level} {options}\n\n{_prose(schema.__doc__ or '')} Besides the keys above:\n"
        yield from _table(schema, f"{group}.", {}, {f.name for f in dataclasses.fields(base)})


def _table(schema: type, prefix: str, shipped: dict[str, Any], without: Set[str] = frozenset()) -> Iterator[str]:
    """The leaves of a dataclass. shipped: values that the default option's YAML gives. without: names to leave out."""
    hints = typing.get_type_hints(schema)
    leaves = [f for f, inner in fields_of(schema) if inner is None and f.name not in without]
    if leaves:
        yield "| key | type | unit, range | default | meaning |\n|---|---|---|---|---|"
    for f in leaves:
        default = _default(f, prefix) + (f" (`{prefix}{f.name}: {shipped[f.name]}` in conf/)" if f.name in shipped else "")
        cells = (f"`{prefix}{f.name}`", _type(f, hints[f.name]), limits(f.metadata), default, _prose(f.metadata.get("meaning", "")))
        yield f"| {' | '.join(cells)} |"
    yield ""


def _type(f: dataclasses.Field[Any], hint: Any) -> str:
    null = NoneType in typing.get_args(hint) or f.default is None
    kind = typing.get_args(hint)[0] if NoneType in typing.get_args(hint) else hint
    if choices := f.metadata.get("choices"):
        name = "one of " + ", ".join(f"`{c}`" for c in choices)
    elif kind is Any:
        name = SEVERAL[f.name]
    else:
        name = f"list of {TYPES[typing.get_args(kind)[0]]}" if typing.get_origin(kind) is list else TYPES[kind]
    return name + (" or null" if null else "")


def _default(f: dataclasses.Field[Any], prefix: str) -> str:
    value = f.default if f.default is not dataclasses.MISSING else typing.cast(Any, f.default_factory)()
    if value == "???":
        return f"by `{prefix.rstrip('.')}=`" if prefix else "must be given"
    plain = isinstance(value, str) and re.fullmatch(r"\S+", value)
    return "null" if value is None else f"`{value if plain else json.dumps(value)}`"


def _prose(text: str) -> str:
    """Text for a table cell: bars and, outside code, angle brackets are escaped."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
