"""What a mistake in a configuration meant: an unknown key, a value of the wrong type, and Hydra's and OmegaConf's exceptions as one
ConfigError. No torch."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any, NoReturn

from lorica import elsewhere
from lorica.checks import DATA_ENDINGS, REPOSITORY
from lorica.config import DATA_SCHEMAS, LOGGER_SCHEMAS, ConfigError, NotApplicable, TrainConfig, WandbLoggerConfig, as_typed
from lorica.options import group_options, schema_keys
from lorica.proposals import nearest, pasted
from lorica.secrets import REDACTED, is_secret_name, redact

OF_WANDB = {f.name for f in dataclasses.fields(WandbLoggerConfig)}  # keys, typed without their group, too


def refuse_unknown(name: str, value: Any, known: list[str], tree: Any, verb: str) -> NoReturn:
    """No such key: say which one was meant, or which choice would bring it.

    Args:
        known: the keys that there are. tree: what is composed so far.
    Raises:
        ConfigError, NotApplicable.
    """
    if is_secret_name(name):
        raise ConfigError(name, REDACTED, "secrets are never part of a configuration", "WANDB_API_KEY or HF_TOKEN in the environment")
    groups = group_options() if verb == "train" else {}
    if verb == "train":
        for section, schemas in (("data", DATA_SCHEMAS), ("logger", LOGGER_SCHEMAS)):
            owners = sorted(option for option, schema in schemas.items() if name in schema_keys(typing.cast(type, schema), f"{section}."))
            if owners:
                chosen = tree[section].name
                raise NotApplicable(
                    name, value, f"is a key of {section}={'|'.join(owners)}, not of {section}={chosen}", f"{section}={owners[0]}"
                )
    leaf = name.rpartition(".")[2]
    if verb == "train" and leaf in elsewhere.INSTEAD:
        raise ConfigError(name, value, *elsewhere.INSTEAD[leaf])
    if verb == "train" and leaf in elsewhere.CHOICES:
        raise ConfigError(name, value, "there is no such key", elsewhere.CHOICES[leaf].get(as_typed(value).lower(), "leave it out"))
    if verb == "train" and leaf in elsewhere.KEYS:
        raise ConfigError(name, value, "there is no such key", _in_ours(elsewhere.KEYS[leaf], value, groups))
    if verb == "train" and name in OF_WANDB and not any(k.endswith(f".{name}") for k in known):
        raise NotApplicable(name, value, "is a key of logger=wandb", f"logger=wandb {_meant(f'logger.{name}', value)}")
    if "." not in name and (group := nearest(name, groups)) and name not in groups and isinstance(value, str):
        meant = option_meant(group, value, groups[group])
        raise ConfigError(name, value, f"there is no such group or key; groups are {', '.join(groups)}", meant)
    if isinstance(value, dict):
        group = nearest(name, {k.rpartition(".")[0] for k in known} - {""})
        raise ConfigError(name, None, "there is no such group of keys", f"{group}={{...}}" if group else f"lorica {verb} --help")
    near = _nearest_key(name, known)
    raise ConfigError(name, value, "there is no such key", _meant(near, value) if near else f"lorica {verb} --help")


def option_meant(group: str, value: Any, options: list[str]) -> str:
    """What to type for an option that a group does not have: the one most like it, or the key that takes a file's or a base's name."""
    text, near = str(value), nearest(str(value), options)
    if group == "data" and text not in options:
        if Path(text).suffix.lower() in DATA_ENDINGS or ("/" in text and Path(text).expanduser().exists()):
            return f"data=classification {_meant('data.path', text)}"
        if re.fullmatch(REPOSITORY, text):
            return f"data=classification data.source=hub {_meant('data.hub_id', text)}"
    if group == "model" and text not in options and ("/" in text or near is None):
        return f"model={'roberta_lora' if 'bert' in text.lower() else 'mistral_qlora'} {_meant('model.base', text)}"
    return f"{group}={near or options[0]}"


def _in_ours(ours: str, value: Any, groups: dict[str, list[str]]) -> str:
    """One of `elsewhere.KEYS`' proposals with the value that was typed, as far as ours takes it."""
    key, others, _ = ours.partition("=...")
    if key in groups and not others:
        return option_meant(key, value, groups[key])
    if others and as_typed(value).lower() not in elsewhere.VALUES.get(key, {}):
        return ours
    return _meant(key, value) if key not in schema_keys(TrainConfig) or _takes(key, value) else f"{key}=..."


def _takes(key: str, value: Any) -> bool:
    """Whether a key of train can have the value, by its choices and, where it counts something, by its kind and its lower bound."""
    holder, leaf = schema_keys(TrainConfig)[key], key.rpartition(".")[2]
    hint, meta = typing.get_type_hints(holder)[leaf], next(f.metadata for f in dataclasses.fields(holder) if f.name == leaf)
    kinds = typing.get_args(hint) or (hint,)
    if value is None:
        return type(None) in kinds
    if meta.get("choices"):
        return value in meta["choices"] or as_typed(value).lower() in elsewhere.VALUES.get(key, {})
    counts = int in kinds and float not in kinds and str not in kinds
    return not counts or (isinstance(value, int) and not isinstance(value, bool) and value >= (meta.get("low") or value))


def _meant(key: str, value: Any) -> str:
    """What to paste, as ours call the value; a secret is not written again, in which another form of it would not be known for one."""
    value = elsewhere.VALUES.get(key, {}).get(as_typed(value).lower(), value)
    return pasted(key, value) if redact(as_typed(value)) == as_typed(value) else f"{key}=..."


def _nearest_key(name: str, known: list[str]) -> str | None:
    """The key with the same last part, else the one most like it: of the same section, then of any."""
    section, _, leaf = name.rpartition(".")
    leaves: dict[str, str] = {}  # last part -> key; this section's first, the models' recommendations last
    for k in sorted(known, key=lambda k: (k.rpartition(".")[0] != section, ".recommended." in k)):
        leaves.setdefault(k.rpartition(".")[2], k)
    if leaf in leaves:
        return leaves[leaf]
    own = [last for last, k in leaves.items() if k.rpartition(".")[0] == section]
    if not own and (whole := nearest(name, known)):
        return whole
    near = nearest(leaf, own) or nearest(leaf, leaves)
    return leaves[near] if near else None


def type_rule(error: Exception) -> str:
    """What a value must be, by OmegaConf's exception."""
    text = str(error).splitlines()[0]
    for python, words in (
        ("Integer", "a whole number"),
        ("Float", "a number"),
        ("Boolean", "true or false"),
        ("String", "a text"),
        ("List", "a list"),
    ):
        if f"to {python}" in text:
            return f"must be {words}"
    if "valid bool" in text:
        return "must be true or false"
    if "Union" in text:
        return f"has the wrong type ({text})"
    if "not Optional" in text:
        return "can't be null"
    if "not a list" in text.lower() or "ListConfig" in text:
        return "must be a list, as [a,b]"
    return text


def translate(error: BaseException) -> ConfigError:
    """Hydra's and OmegaConf's exceptions as one ConfigError; what is neither is re-raised as it is."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    if isinstance(error, ConfigError):
        return error
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for e in chain:
        if isinstance(e, ConfigError):
            return e
        if isinstance(e, MissingConfigException):
            group, _, option = (e.missing_cfg_file or "").rpartition("/")
            options = e.options or group_options().get(group, [])
            near = nearest(option, options)
            return ConfigError(group or "config", option, f"must be one of {', '.join(options)}", f"{group}={near}" if near else "")
        if isinstance(e, (ConfigKeyError, ConfigAttributeError)) and e.full_key:
            fields = (
                [f.name for f in dataclasses.fields(e.object_type)] if e.object_type and dataclasses.is_dataclass(e.object_type) else []
            )
            near = nearest(str(e.key), fields)
            parent = str(e.full_key).rpartition(".")[0]
            return ConfigError(str(e.full_key), None, "there is no such key", f"{parent}.{near}".lstrip(".") if near else "")
        if isinstance(e, OmegaConfBaseException) and e.full_key:
            return ConfigError(str(e.full_key), None, type_rule(e))
    if isinstance(error, (HydraException, OmegaConfBaseException)) or type(error).__module__.startswith(("yaml", "omegaconf", "hydra")):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return ConfigError("configuration", None, "; ".join(lines[:3]) or type(error).__name__)
    raise error
