"""From groups and overrides to typed configuration, by Hydra; torch loads after every check.

Groups are composed by Hydra; dotted overrides are then applied one by one to the typed tree, so that each mistake is named by its
own key with the nearest valid one.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica import plain_yaml
from lorica.checks import HOW_TO_GIVE, check
from lorica.config import (
    DATA_SCHEMAS,
    LOGGER_SCHEMAS,
    VERBS,
    ConfigError,
    NotApplicable,
    PredictConfig,
    TrainConfig,
    fill_recommended,
)
from lorica.mistakes import option_meant, refuse_unknown, translate, type_rule
from lorica.options import conf_dir, group_options, schema_keys
from lorica.proposals import in_shell, nearest, quoted, uncut
from lorica.secrets import is_secret_name
from lorica.states import last_state

LISTS = ("model.lora.target_modules", "trainer.devices")  # or a word, or a number
OPTIONAL_GROUPS = ("experiment", "debug")  # null unless chosen
# Sentences, paths and names, taken as they are typed: Hydra's grammar would stumble over their commas, apostrophes and umlauts.
VERBATIM = {
    "predict": ("text", "run", "input", "output", "text_column", "base"),
    "merge": ("run", "output", "base", "sample"),
    "export": ("run", "format", "base", "sample", "llama_cpp"),
    "push": ("run", "repo"),
    "doctor": ("base", "outputs"),
}
LICENCES = {
    "model.license": ("model.base",),
    "data.license": ("data.hub_id", "data.path"),
}  # what was typed may have another than the YAML's
NEVER_NULL = ("text", "run")  # `text=null` asks about the word


def compose(verb: str, args: Sequence[str], config_dir: str | None = None) -> Any:
    """Typed and checked configuration of one verb.

    Args:
        args: Hydra overrides, `group=option` and `key.path=value`.
        config_dir: a folder with more YAML of the same groups.
    Raises:
        ConfigError, NotApplicable.
    """
    config = _typed(compose_tree(verb, args, config_dir))
    if isinstance(config, TrainConfig):
        fill_recommended(config)
    check(config)
    if isinstance(config, TrainConfig) and config.distillation.teacher is not None:
        config.distillation.teacher = _behind_link(config.distillation.teacher)
    if isinstance(config, PredictConfig) and config.text is not None:
        _check_text(config)
    return config


def compose_tree(verb: str, args: Sequence[str], config_dir: str | None = None) -> Any:
    """The OmegaConf tree of a verb: schema, then YAML, then the dotted overrides, each checked as it is applied."""
    from omegaconf import OmegaConf

    groups, values = _parse(verb, args, config_dir)
    resumed = dict(values).get("resume") if verb == "train" else None
    if isinstance(resumed, str) and (Path(resumed).expanduser() / "config.yaml").is_file():
        if groups:
            raise ConfigError(
                "resume", resumed, f"restores the run's own configuration; {groups[0]} can't be chosen again", "a new run without resume"
            )
        if any(k == "run_dir" for k, _ in values):
            raise ConfigError("run_dir", dict(values)["run_dir"], f"resume={resumed} goes on in that folder", "leave it out")
        folder = Path(resumed).expanduser().resolve()  # outputs/latest may point elsewhere by the time of writing
        loaded = _load_run(Path(resumed).expanduser() / "config.yaml")
        _check_resumable(resumed, folder)
        values = [*((k, v) for k, v in values if k != "resume"), ("resume", _as_text(str(folder))), ("run_dir", _as_text(str(folder)))]
    else:
        loaded = _compose_yaml(verb, groups, config_dir)
        if verb == "train" and _stays_whole(groups, values, loaded, config_dir):
            loaded.model.lora = None
    try:
        schema = _schema(verb, loaded)
    except Exception as e:
        raise translate(e) from None
    try:
        tree = OmegaConf.merge(schema, loaded)
    except Exception as e:
        for name, value in typing.cast(dict[str, Any], OmegaConf.to_container(loaded)).items():
            _apply(schema, verb, str(name), value)  # one by one: says which key, its value and the nearest valid one
        raise translate(e) from None
    for name in OmegaConf.missing_keys(loaded):  # a recipe's ??? takes no default away in a merge
        OmegaConf.update(tree, name, "???")
    for name, value in values:
        plain_yaml.check_value(name, value)
        _apply(tree, verb, name, value)
    for licence, of in LICENCES.items() if verb == "train" else ():
        if any(name in of for name, _ in values) and licence not in dict(values):
            OmegaConf.update(tree, licence, None)
    plain_yaml.check_tree(OmegaConf.to_container(tree))
    return tree


def complete(verb: str, args: list[str]) -> int:
    """Hydra's own completion, given every key of the schema beside the YAML's (untyped: all data sets' and loggers' keys at once)."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    keys = dict(schema_keys(VERBS[verb]))
    for section, schemas in (("data", DATA_SCHEMAS), ("logger", LOGGER_SCHEMAS)) if verb == "train" else ():
        for schema in schemas.values():
            keys |= schema_keys(typing.cast(type, schema), f"{section}.")
    node = OmegaConf.create()
    for key in keys:
        OmegaConf.update(node, key, None)
    store = ConfigStore.instance()
    store.store(group="schema", name=verb, node=node)
    store.store(name="completion", node={"defaults": [{"schema@_here_": verb}, verb]})
    sys.argv = [sys.argv[0], *args]
    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="completion")(lambda _: None)()
    return 0


# --------------------------------------------------------------------------------------------------- from text to a tree


def _parse(verb: str, args: Sequence[str], config_dir: str | None) -> tuple[list[str], list[tuple[str, Any]]]:
    """Split overrides into group choices (for Hydra) and (key, value) pairs (for us); values of `VERBATIM` keys stay as typed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    options = group_options(config_dir) if verb == "train" else {}
    groups: list[str] = []
    values: list[tuple[str, Any]] = []
    parser = OverridesParser.create()
    for place, text in enumerate(args):
        key, assigned, typed = text.partition("=")
        if assigned and key.lstrip("+") in VERBATIM.get(verb, ()):
            values.append((key.lstrip("+"), _verbatim(key.lstrip("+"), typed)))
            continue
        try:
            override = parser.parse_override(text)
        except HydraException as e:
            where, _, value = text.partition("=")
            if "=" not in text:
                group = next((g for g, names in options.items() if where in names), None)
                fix = _as_text_of(verb, args, place) or (f"{group}={where}" if group else f"{where}=...")
                raise ConfigError(where, None, "is not key=value", fix) from None
            if fix := quoted(where, value, parser):
                raise ConfigError(where, value, "can't be read: what is not plain letters and digits needs quotes", fix) from None
            why = str(e).splitlines()[0].partition(" expecting")[0]
            raise ConfigError(where, value, f"can't be read ({why})", "docs/configuration.md says how values are written") from None
        name = override.key_or_group
        if override.is_delete():
            instead = "..." if name in options and name not in OPTIONAL_GROUPS else "null"
            raise ConfigError(f"~{name}", None, "keys can't be removed; every key of the schema has a value", f"{name}={instead}")
        if override.package is not None:
            raise ConfigError(f"{name}@{override.package}", override.value(), "groups stay where they are", f"{name}={override.value()}")
        if override.is_sweep_override():
            value, fix = override.get_value_string(), f"-m {text}" if verb == "train" else "one value"
            if re.fullmatch(r"-?0,\d+", value) and _is_fraction(verb, name):
                fix = f"{name}={value.replace(',', '.')} where a number was meant, else {fix}"
            if _is_list(verb, name):
                fix = f"{in_shell(f'{name}=[{value}]')} for a list{f', {fix} for a grid' if verb == 'train' else ''}"
            raise ConfigError(name, value, "several values make a grid", fix)
        if name in options and not isinstance(override.value(), dict):
            value = override.value()
            if value not in options[name] and not (value is None and name in OPTIONAL_GROUPS):
                raise ConfigError(name, value, f"must be one of {', '.join(options[name])}", option_meant(name, value, options[name]))
            if value is None:
                groups = [g for g in groups if not g.startswith(f"{name}=")]
            else:
                groups.append(f"{name}={value}")
        else:
            values.append((name, override.value()))
    return groups, values


def _verbatim(name: str, typed: str) -> str | None:
    """What was typed after `name=`, without one pair of double quotes around it all.

    `"A" and "B"` has no such pair; `""A""` stands for `"A"`.
    """
    if typed == "null" and name not in NEVER_NULL:
        return None
    inner = typed[1:-1]
    if len(typed) >= 2 and typed[0] == typed[-1] == '"':
        if len(inner) >= 2 and inner[0] == inner[-1] == '"':
            typed = inner
        elif not re.search(r'(?<!\\)"', inner):
            typed = inner.replace(r"\"", '"')
    return _as_text(typed)


def _as_text(value: str) -> str:
    """A text for OmegaConf, which would look up what stands in `${...}`."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def refuse_cut(verb: str, words: Sequence[str]) -> None:
    """Refuse a value that a shell cut at its spaces.

    Raises:
        ConfigError: there is one.
    """
    whole = uncut(words)
    key, _, value = (whole or "").partition("=")
    if whole is None or is_secret_name(key) or key in VERBATIM.get(verb, ()):
        return
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()

    def reads(word: str) -> bool:
        try:
            parser.parse_override(word)
        except HydraException:
            return False
        return True

    if all(map(reads, words)):  # a bracket is within quotes
        return
    if fix := in_shell(whole) if reads(whole) else quoted(key, value, parser):
        raise ConfigError(key, value, "a shell cuts it at its spaces", fix)


def _as_text_of(verb: str, words: Sequence[str], at: int) -> str:
    """text=... around a word that is no key's and those beside it, where a text is asked for; quotes around a path with spaces."""
    keys = [word.partition("=")[0] for word in words]
    before = next((i for i in reversed(range(at)) if "=" in words[i]), None)
    after = next((i for i in range(at, len(words)) if "=" in words[i] and keys[i] in schema_keys(VERBS[verb])), len(words))
    if before is not None and keys[before] in VERBATIM.get(verb, ()):
        whole = " ".join(words[before:after])
        if keys[before] == "text" or Path(whole.partition("=")[2]).exists():
            return in_shell(whole)
    path = Path(words[at]).expanduser()
    if path.is_file() and verb == "predict":
        return in_shell(f"input={words[at]}")
    if path.is_dir() and "run" in VERBATIM.get(verb, ()):
        return in_shell(f"run={words[at]}")
    if " " in words[at]:
        return in_shell(f"text={words[at]}") if verb == "predict" else "quotes around a value with spaces"
    return ""


def _is_fraction(verb: str, key: str) -> bool:
    """Whether a key of the schema takes numbers with decimals."""
    return float in _kinds(verb, key)


def _is_list(verb: str, key: str) -> bool:
    """Whether a key of the schema takes a list."""
    return key in LISTS or any(typing.get_origin(kind) is list for kind in _kinds(verb, key))


def _kinds(verb: str, key: str) -> tuple[Any, ...]:
    """A key's type and what that is made of; none of a key that is not in the schema."""
    holder = schema_keys(VERBS[verb]).get(key)
    if holder is None:
        return ()
    hint = typing.get_type_hints(holder)[key.rpartition(".")[2]]
    return (hint, *typing.get_args(hint))


def _check_text(config: PredictConfig) -> None:
    """Rules for a text on the command line, which is no file."""
    assert config.text is not None
    if not config.text.strip():
        raise ConfigError("text", repr(config.text), "is empty: give a value or leave it out")
    if config.text_column is not None:
        raise ConfigError("text_column", config.text_column, "names a column of an input file; text= has none", "leave it out")
    try:
        config.text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("text", repr(config.text), "has bytes that are not UTF-8") from None


def _check_resumable(typed: str, folder: Path) -> None:
    """Refuse to go on with a run that is finished, or that has no state to go on from."""
    if (folder / "metrics.json").exists():
        raise ConfigError("resume", typed, "that run is finished (it has a metrics.json)", "a new run without resume")
    if last_state(folder) is None:
        raise ConfigError("resume", typed, "that run has no checkpoint to go on from", "a new run without resume")


def _load_run(file: Path) -> Any:
    """A run's config.yaml. It was written resolved: a `${` in it is text."""
    from omegaconf import OmegaConf

    saved = plain_yaml.read(file, "resume", "resume=auto")
    if not isinstance(saved, dict) or not {"model", "data", "logger"} <= set(saved):
        raise ConfigError("resume", file, "is not the configuration of a run", "resume=auto")
    saved = _literal(saved)
    plain_yaml.check_value("", saved)
    return OmegaConf.create(saved)


def _behind_link(folder: str) -> str:
    """The folder itself where a link is named: outputs/latest will soon point to the run that this is for."""
    path = Path(folder).expanduser()
    return str(path.resolve()) if path.is_symlink() else folder


def _literal(node: Any) -> Any:
    """Plain values with interpolation marks escaped."""
    if isinstance(node, dict):
        return {k: _literal(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_literal(v) for v in node]
    return _as_text(node) if isinstance(node, str) else node


def _compose_yaml(verb: str, groups: list[str], config_dir: str | None) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    # Hydra's own launcher, sweeper, logging and help serve `hydra.main`, not us: without them half as many files are read.
    ConfigStore.instance().repo["hydra"]["config.yaml"].node.defaults = []
    _read_plainly()
    search = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3", job_name=verb):
            return hydra_compose(verb, overrides=[*groups, *search])
    except Exception as e:
        raise translate(e) from None


def _stays_whole(groups: list[str], values: list[tuple[str, Any]], loaded: Any, config_dir: str | None) -> bool:
    """Whether a model was chosen for having no adapter, which a recipe's settings would give it without a word."""
    recipes = [g for g in groups if g.startswith("experiment=")]
    said = any(name.startswith("model.lora") or (name == "model" and "lora" in value) for name, value in values)
    if said or not recipes or loaded.model.get("lora") is None or not any(g.startswith("model=") for g in groups):
        return False
    return _compose_yaml("train", [g for g in groups if g not in recipes], config_dir).model.get("lora") is None


def _read_plainly() -> None:
    """Have every file that Hydra reads, but for our own, looked at first, wherever a defaults list led."""
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    class PlainFiles(FileConfigSource):
        def load_config(self, config_path: str) -> Any:
            file = Path(self.path) / self._normalize_file_name(config_path)
            if file.is_file() and not file.resolve().is_relative_to(conf_dir()):
                plain_yaml.check_file(file, "--config-dir")
            return super().load_config(config_path)

    Plugins.instance()  # registers its own source, once
    SourcesRegistry.instance().types["file"] = PlainFiles


def _schema(verb: str, loaded: Any) -> Any:
    """The verb's dataclass as a typed tree; `data` and `logger` by the dataclasses that the YAML names."""
    from omegaconf import OmegaConf

    sections = {}
    if verb == "train":
        for section, key, schemas in (("data", "module", DATA_SCHEMAS), ("logger", "name", LOGGER_SCHEMAS)):
            kind = OmegaConf.select(loaded, f"{section}.{key}")
            if kind not in schemas:
                raise ConfigError(
                    f"{section}.{key}",
                    kind,
                    f"must be one of {', '.join(schemas)}",
                    f"{section}.{key}={nearest(str(kind), schemas) or next(iter(schemas))}",
                )
            sections[section] = schemas[kind]()
    return OmegaConf.structured(VERBS[verb](**sections))


def _typed(tree: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise ConfigError(missing[0], None, "must be given", HOW_TO_GIVE.get(missing[0], f"{missing[0]}=..."))
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as e:
        raise translate(e) from None


# ----------------------------------------------------------------------------------------------------- keys and mistakes


def _known_keys(tree: Any, verb: str) -> list[str]:
    """Keys that the composed tree can take: those of the schema with the chosen data set's and logger's own."""
    from omegaconf import OmegaConf

    keys = dict(schema_keys(VERBS[verb]))
    if verb == "train":
        keys |= schema_keys(typing.cast(type, OmegaConf.get_type(tree.data)), "data.")
        keys |= schema_keys(typing.cast(type, OmegaConf.get_type(tree.logger)), "logger.")
    return list(keys)


def _apply(tree: Any, verb: str, name: str, value: Any) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = _known_keys(tree, verb)
    sections = {k.rpartition(".")[0] for k in known} - {""}
    if name not in known and name not in sections:
        refuse_unknown(name, value, known, tree, verb)
    if name in sections and isinstance(value, dict):
        if OmegaConf.select(tree, name) is None:
            section, _, leaf = name.rpartition(".")
            OmegaConf.update(tree, section, {leaf: {}}, merge=True)  # its defaults
        for inner_name, inner_value in value.items():
            _apply(tree, verb, f"{name}.{inner_name}", inner_value)
        return
    if name in sections and value is not None:
        inner = [k for k in known if k.startswith(f"{name}.")]
        without = name in ("model.lora", "model.quantization") and str(value).lower() in ("none", "false", "no", "off", "")
        fix = f"{name}=null" if without else f"{nearest(f'{name}.{value}', inner) or inner[0]}=..."
        raise ConfigError(name, value, "is a group of keys, not a value", fix)
    parent = name.rpartition(".")[0]
    if parent and OmegaConf.select(tree, parent) is None:
        chosen = OmegaConf.select(tree, "model.name") if parent.startswith("model.") else None
        raise NotApplicable(
            name, value, f"{parent} is null" + (f" in model={chosen}" if chosen else ""), f"leave it out, or set {parent}={{...}}"
        )
    try:
        OmegaConf.update(tree, name, value, merge=True)
        if isinstance(OmegaConf.select(tree, name), bool) and str(value).isdigit() and int(value) > 1:
            raise ConfigError(name, value, "must be true or false")
    except OmegaConfBaseException as e:
        raise ConfigError(name, value, type_rule(e), "") from None
