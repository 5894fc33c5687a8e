"""docs/configuration.md, written from the schema and the YAML: `python -m lorica.configuration_page FILE`. No torch."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lorica.cli import conf_dir
from lorica.config import (
    DATA_SCHEMAS,
    LOGGER_SCHEMAS,
    DataConfig,
    LoggerConfig,
    MergeConfig,
    ModelConfig,
    OptimizerConfig,
    PredictConfig,
    TrainConfig,
    TrainerConfig,
)

HOW_TO = """# Configuration

Written by `make docs` from `src/lorica/config.py` and `conf/`; edit those.

## Setting values

```
python train.py model=roberta_lora data=sentiment            # group=option: a file of conf/
python train.py trainer.max_epochs=1 optimizer.lr=5e-4       # key=value, dots between the levels
python train.py 'model.lora.target_modules=[query,key]'      # a list; quotes keep the shell off brackets, spaces and |
python train.py 'data.prompt_template="Rate: {text}\\nStars:"' data=sentiment    # a text with spaces: quotes inside quotes
python train.py experiment=chatdoctor                        # a recipe: groups and values together
python train.py -m model=minilm_lora,minilm_full seed=0,1    # a grid: every combination, each in a process and a folder of its own
python train.py experiment=chatdoctor --cfg job              # show what would run, and stop
python train.py --help                                       # groups, flags, keys and their values
python predict.py run=outputs/latest text="..."
```

`lorica VERB ...` does the same where the package is installed; the verbs are `train`, `predict` and `merge`. Groups, `-m` and
experiments belong to `train`.

A later source wins over an earlier one: the schema's default, the YAML of the chosen groups, `experiment=`, `debug=`, then the
command line, wherever on it a word stands. A group named on the command line also wins over the one that an experiment chooses.
Where `optimizer.name`, `optimizer.lr`, `optimizer.warmup_ratio`, the micro-batch's size or `trainer.gradient_checkpointing` is
still null after that, `model.recommended` fills it. `resume=RUN_FOLDER` takes the run's own `config.yaml` in place of the groups.

`--config-dir DIR` adds a folder laid out like `conf/`: `DIR/data/reviews.yaml` makes `data=reviews`. Its options stand beside ours and
can't have the name of one of ours.

A key that does not exist, a value of the wrong type or out of range, and keys that contradict each other stop the program
before anything is loaded, with one line that names the key, the value, the rule and what to type instead.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed: training (the traceback is in train.log), runs of a grid, or rows of an input file that have no prediction |
| 2 | the configuration, a file or the machine can't be used for this |
| 130 | interrupted |

For completion in bash, type this once a shell, in the clone and with the environment active:

```
eval "$(python train.py -sc install=bash)"
```

Then the tab key after `python train.py ` completes groups and their options.

| environment variable | meaning |
|---|---|
| `LORICA_VERBOSE` | set: what the libraries print is shown, and a failed run's traceback |
| `HF_HUB_OFFLINE` | 1: the Hugging Face hub is not asked; its cache is used |
| `WANDB_API_KEY`, `WANDB_MODE` | W&B's own; `WANDB_MODE=offline` wins over `logger.mode` |

## Groups
"""
TYPES = {int: "int", float: "number", str: "text", bool: "true/false"}
ANY = {  # keys that take values of several types
    "target_modules": "list of text, or text",
    "devices": "int, list of int, or `auto`",
    "val_check_interval": "int or number",
}


def page() -> str:
    """The whole page as Markdown."""
    parts = [HOW_TO, *_groups()]
    parts += ["## train\n", *_table(TrainConfig, ""), *_nested(ModelConfig, "model"), *_data()]
    shipped = yaml.safe_load((conf_dir() / "trainer" / "default.yaml").read_text("utf-8"))
    parts += [*_section(TrainerConfig, "trainer", shipped), *_section(OptimizerConfig, "optimizer")]
    parts += [*_section(LoggerConfig, "logger"), *_own_keys(LOGGER_SCHEMAS, LoggerConfig, "logger")]
    parts += ["## predict\n", *_table(PredictConfig, ""), "## merge\n", *_table(MergeConfig, "")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def _groups() -> Iterator[str]:
    """Every group with its options and what each is, by the comment that opens its file."""
    chosen = {
        k: v
        for entry in yaml.safe_load((conf_dir() / "train.yaml").read_text("utf-8"))["defaults"]
        if entry != "_self_"
        for k, v in entry.items()
    }
    for group, default in chosen.items():
        yield f"### {group}=\n"
        yield "Nothing is chosen by default.\n" if default is None else f"Default: `{group}={default}`.\n"
        yield "| option | |\n|---|---|"
        for file in sorted((conf_dir() / group).glob("*.yaml")):
            yield f"| `{file.stem}` | {_opening(file.read_text('utf-8'))} |"
        yield ""


def _opening(text: str) -> str:
    """The comment that opens a YAML file; its keys and values where it has none."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    if lines:
        return _prose(" ".join(lines))
    return ", ".join(f"`{k}: {v}`" for k, v in yaml.safe_load(text).items() if k != "defaults")


def _section(schema: type, name: str, shipped: dict[str, Any] | None = None) -> list[str]:
    return [f"## {name}\n", f"{_prose(schema.__doc__ or '')}\n", *_table(schema, f"{name}.", shipped=shipped)]


def _nested(schema: type, name: str) -> list[str]:
    """A section, and one for each dataclass in it."""
    parts = _section(schema, name)
    for f, inner in _fields(schema):
        if inner is not None:
            meaning = f"{_prose(f.metadata['meaning'])}. Default: null.\n" if f.metadata.get("meaning") else ""
            parts += [f"### {name}.{f.name}\n", f"{_prose(inner.__doc__ or '')}\n", meaning, *_table(inner, f"{name}.{f.name}.")]
    return parts


def _data() -> list[str]:
    """The keys of every data set, then those that each kind adds."""
    return [*_section(DataConfig, "data"), *_own_keys(DATA_SCHEMAS, DataConfig, "data")]


def _own_keys(schemas: dict[str, type], base: type, group: str) -> Iterator[str]:
    """For each of our dataclasses on `base`: the options that use it, and the keys it adds."""
    for schema in dict.fromkeys(s for s in schemas.values() if s is not base and s.__module__ == base.__module__):
        options = [name for name, used in schemas.items() if used is schema]
        yield f"### {', '.join(f'{group}={name}' for name in options)}\n"
        yield f"{_prose(schema.__doc__ or '')} Besides the keys above:\n"
        yield from _table(schema, f"{group}.", without=base)


def _fields(schema: type) -> Iterator[tuple[dataclasses.Field[Any], type | None]]:
    """Each field with the dataclass that it holds, or None."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        inner = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)]
        yield f, typing.cast("type | None", inner[0] if inner else None)


def _table(schema: type, prefix: str, *, without: type | None = None, shipped: dict[str, Any] | None = None) -> Iterator[str]:
    """A dataclass's leaves. without: leave out this base's. shipped: values that the default option's YAML gives."""
    hints = typing.get_type_hints(schema)
    known = {f.name for f in dataclasses.fields(without)} if without else set()
    yield "| key | type | unit, range | default | meaning |\n|---|---|---|---|---|"
    for f, inner in _fields(schema):
        if inner is None and f.name not in known:
            default = _default(f) + (f"; `{shipped[f.name]}` in the YAML" if shipped and f.name in shipped else "")
            cells = (f"`{prefix}{f.name}`", _type(f, hints[f.name]), _range(f.metadata), default, _prose(f.metadata.get("meaning", "")))
            yield f"| {' | '.join(cells)} |"
    yield ""


def _type(f: dataclasses.Field[Any], hint: Any) -> str:
    members = [t for t in typing.get_args(hint) if t is not types.NoneType] if types.NoneType in typing.get_args(hint) else [hint]
    (kind,) = members
    if choices := f.metadata.get("choices"):
        name = "one of " + ", ".join(f"`{c}`" for c in choices)
    elif kind is Any:
        name = ANY[f.name]
    elif typing.get_origin(kind) is list:
        name = f"list of {TYPES[typing.get_args(kind)[0]]}".replace("of number", "of numbers")
    else:
        name = TYPES[kind]
    return name + (" or null" if types.NoneType in typing.get_args(hint) or f.default is None else "")


def _range(metadata: typing.Mapping[str, Any]) -> str:
    low, high, above = (metadata.get(k) for k in ("low", "high", "above"))
    bounds = [f"{low:.12g} to {high:.12g}" if low is not None and high is not None else f"at least {low:.12g}" if low is not None else ""]
    bounds += [f"above {above:.12g}" if above is not None else "", f"at most {high:.12g}" if high is not None and low is None else ""]
    return ", ".join(filter(None, (metadata.get("unit", ""), *bounds)))


def _default(f: dataclasses.Field[Any]) -> str:
    value = f.default if f.default is not dataclasses.MISSING else typing.cast(Any, f.default_factory)()
    if value == "???":
        return "must be given"
    return (
        "null"
        if value is None
        else f"`{value}`"
        if isinstance(value, str) and value.isprintable() and " " not in value
        else f"`{json.dumps(value)}`"
    )


def _prose(text: str) -> str:
    """Text for a table cell: angle brackets and bars as they are, outside code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
