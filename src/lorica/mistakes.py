"""What a mistake in a configuration meant: an unknown key, a value of the wrong type, and Hydra's and OmegaConf's exceptions as one
ConfigError. No torch."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, NoReturn

from lorica import elsewhere
from lorica.config import DATA_SCHEMAS, LOGGER_SCHEMAS, ConfigError, NotApplicable, WandbLoggerConfig, as_typed
from lorica.options import group_options, schema_keys
from lorica.proposals import nearest, pasted
from lorica.secrets import REDACTED, is_secret_name, redact

LOGGED = {f.name for f in dataclasses.fields(WandbLoggerConfig)}  # typed without their group, too


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
    if verb == "train" and leaf in elsewhere.KEYS:
        ours = elsewhere.KEYS[leaf]
        raise ConfigError(name, value, "there is no such key", ours if "=" in ours else _meant(ours, value))
    if verb == "train" and name in LOGGED and not any(k.endswith(f".{name}") for k in known):
        raise NotApplicable(name, value, "is a key of logger=wandb", f"logger=wandb {_meant(f'logger.{name}', value)}")
    if "." not in name and (group := nearest(name, groups)) and name not in groups and isinstance(value, str):
        raise ConfigError(name, value, f"there is no such group or key; groups are {', '.join(groups)}", _meant(group, value))
    if isinstance(value, dict):
        group = nearest(name, {k.rpartition(".")[0] for k in known} - {""})
        raise ConfigError(name, None, "there is no such group of keys", f"{group}={{...}}" if group else f"lorica {verb} --help")
    near = _nearest_key(name, known)
    raise ConfigError(name, value, "there is no such key", _meant(near, value) if near else f"lorica {verb} --help")


def _meant(key: str, value: Any) -> str:
    """What to paste; a secret is not written again, in which another form of it would not be known for one."""
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
