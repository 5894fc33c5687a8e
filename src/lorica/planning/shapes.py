"""What a model is made of, by its config.json alone: layers, widths, and every weight counted.

Architectures whose layers are known here are counted by hand; any other that transformers knows is built without weights (on the meta
device), which takes seconds, and what is found is kept for the next time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lorica import caches, hub
from lorica.beside_weights import read_object
from lorica.config import ConfigError, ModelConfig
from lorica.durable import write_json
from lorica.planning.known import KNOWN

SEPARATE = ("mistral", "llama", "qwen2", "qwen3", "gemma", "smollm3", "granite")
FUSED = ("phi3",)
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert")
MOST_LAYERS = 1000
MOST = 1 << 24  # of every other number of a config.json
# What PEFT gives adapters to where model.lora.target_modules is null.
DEFAULT_TARGETS = {"phi3": ("qkv_proj",), "qwen3": ("q_proj", "v_proj")}


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        name: as LoRA's target_modules name it. role: what its input is: queries (the layer's normed input, of queries, keys and
            values), mixed (attention's result), widening (the normed input of the wide part), narrowing (the wide part's result).
    """

    name: str
    role: str
    rows: int
    columns: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Of the matrix, without its bias."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        decoder: causal, with gated wide parts where `gated`; else an encoder. queries, keys: numbers of all heads' queries, and of all
            heads' keys. inner: width of the wide part. small: weights of a layer outside of its linears (norms and biases).
        embeddings: of the inputs, all tables. rest: other weights outside of the layers. head: of the output head's own matrix, 0 where
            it is the embeddings' or where there is none. positions: longest sequence; None: no bound.
        dropout: whether layers have dropout. exact: whether all of this is the architecture's, not a guess by its linears.
    """

    decoder: bool
    model_type: str
    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    inner: int
    gated: bool
    linears: tuple[Linear, ...]
    small: int
    vocabulary: int
    embeddings: int
    rest: int
    head: int
    positions: int | None
    dropout: bool
    exact: bool = True

    def trained_head(self) -> int:
        """Weights of a classifier's head, which is trained whole beside adapters: RoBERTa's kin have a dense layer in theirs."""
        new = self.head
        return new + (self.rest if not self.decoder and self.model_type != "bert" else 0)

    @property
    def of_layer(self) -> int:
        """Weights of one layer."""
        return sum(linear.weights for linear in self.linears) + self.small

    @property
    def in_linears(self) -> int:
        """Weights of all layers' linears: what 4 bits are for."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def weights(self) -> int:
        """All of them."""
        return self.layers * self.of_layer + self.embeddings + self.rest + self.head


def find_shape(model: ModelConfig, labels: int) -> Shape:
    """The shape of a run's model.

    Args:
        labels: classes of a classifier.
    Raises:
        ConfigError: the base is not here and the hub can't be asked; its configuration says too little.
    """
    return shape_of(find_config(model), model, labels)


def find_config(model: ModelConfig) -> dict[str, Any]:
    """The base's config.json: of its folder, of a package, one that is known, or the hub's (a few kilobytes).

    Raises:
        ConfigError: none can be had.
    """
    folder = Path(model.base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError("model.base", model.base, "has no config.json", "a folder that from_pretrained can load")
        return read_object(folder / "config.json", "model.base")
    if (home := hub.packaged(model.base)) is not None:
        return read_object(Path(home) / "config.json", "model.base")
    if model.base in KNOWN and model.revision is None:
        return dict(KNOWN[model.base])
    return _of_hub(model)


def _of_hub(model: ModelConfig) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    revision = hub.resolve_revision(model.base, model.revision, "model", "model.base")
    with hub.hub_errors("model.base", model.base):
        file = hf_hub_download(model.base, "config.json", revision=revision, etag_timeout=hub.CONNECT_SECONDS)
    return read_object(Path(file), "model.base")


def shape_of(config: dict[str, Any], model: ModelConfig, labels: int) -> Shape:
    """What a config.json describes, for a task.

    Raises:
        ConfigError: a number is missing or can't be one, or transformers does not know the architecture.
    """
    kind = config.get("model_type")
    classifier = model.task == "sequence_classification"
    try:
        if kind in ENCODERS:
            return _encoder(config, str(kind), labels if classifier else 0)
        if kind in SEPARATE or kind in FUSED:
            return _decoder(config, str(kind), labels if classifier else 0)
    except KeyError as e:
        raise ConfigError("model.base", model.base, f"its config.json lacks {e}") from None
    except ValueError as e:
        raise ConfigError("model.base", model.base, f"its config.json has {e}") from None
    return _built(config, model, labels)


def _number(config: dict[str, Any], name: str, instead: int | None = None, least: int = 1) -> int:
    """A number of a config.json. instead: where there is none.

    Raises:
        KeyError: there is none. ValueError: it is something else, or out of all bounds.
    """
    value = config[name] if instead is None else config.get(name)
    if value is None and instead is not None:
        return instead
    most = MOST_LAYERS if name == "num_hidden_layers" else MOST
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}={repr(value)[:40]}, not a whole number from {least} to {most:,}")
    return value


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """(width, layers, heads, width of the wide part, vocabulary)."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    hidden, layers, heads, inner, vocabulary = (_number(config, name) for name in names)
    return hidden, layers, heads, inner, vocabulary


def _decoder(config: dict[str, Any], kind: str, labels: int) -> Shape:
    hidden, layers, heads, inner, vocabulary = _sizes(config)
    size = _number(config, "head_dim", max(1, hidden // heads))
    queries, keys = heads * size, _number(config, "num_key_value_heads", heads) * size
    biased = bool(config.get("attention_bias", kind == "qwen2"))
    wide = bool(config.get("mlp_bias", False))
    if kind in FUSED:
        linears = [
            Linear("qkv_proj", "queries", queries + 2 * keys, hidden),
            Linear("o_proj", "mixed", hidden, queries),
            Linear("gate_up_proj", "widening", 2 * inner, hidden),
            Linear("down_proj", "narrowing", hidden, inner),
        ]
    else:
        linears = [
            Linear("q_proj", "queries", queries, hidden, biased),
            Linear("k_proj", "queries", keys, hidden, biased),
            Linear("v_proj", "queries", keys, hidden, biased),
            Linear("o_proj", "mixed", hidden, queries, biased and kind != "qwen2"),
            Linear("gate_proj", "widening", inner, hidden, wide),
            Linear("up_proj", "widening", inner, hidden, wide),
            Linear("down_proj", "narrowing", hidden, inner, wide),
        ]
    small = 2 * hidden + sum(linear.rows for linear in linears if linear.bias) + (2 * size if kind == "qwen3" else 0)
    tied = bool(config.get("tie_word_embeddings", kind == "gemma"))
    head = labels * hidden if labels else 0 if tied else vocabulary * hidden
    given = config.get("max_position_embeddings")
    positions = _number(config, "max_position_embeddings") if isinstance(given, int) else None
    return Shape(
        True, kind, layers, hidden, heads, queries, keys, inner, True, tuple(linears), small, vocabulary, vocabulary * hidden, hidden,
        head, positions, bool(config.get("attention_dropout")),
    )  # fmt: skip


def _encoder(config: dict[str, Any], kind: str, labels: int) -> Shape:
    hidden, layers, heads, inner, vocabulary = _sizes(config)
    positions = _number(config, "max_position_embeddings")
    linears = (
        *(Linear(name, "queries", hidden, hidden, True) for name in ("query", "key", "value")),
        Linear("attention.output.dense", "mixed", hidden, hidden, True),
        Linear("intermediate.dense", "widening", inner, hidden, True),
        Linear("output.dense", "narrowing", hidden, inner, True),
    )
    tables = (vocabulary + positions + _number(config, "type_vocab_size", 2)) * hidden + 2 * hidden
    pooler = hidden * hidden + hidden  # BERT's; RoBERTa's head has one of that size
    usable = positions
    if kind != "bert":
        usable -= _number(config, "pad_token_id", 1, least=0) + 1
    return Shape(
        False, kind, layers, hidden, heads, hidden, hidden, inner, False, linears,
        4 * hidden + sum(linear.rows for linear in linears), vocabulary, tables, pooler, (hidden + 1) * labels, usable,
        config.get("hidden_dropout_prob", 0.1) != 0,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- architectures of all other kinds


def _built(config: dict[str, Any], model: ModelConfig, labels: int) -> Shape:
    """The shape of an architecture that is not known here, by its modules without weights; kept on disk."""
    key = sha256(json.dumps([config, model.task, labels], sort_keys=True, default=str).encode()).hexdigest()[:32]
    kept = caches.folder("shapes") / f"{key}.json"
    if kept.is_file():
        try:
            saved = json.loads(kept.read_text("utf-8"))
            return Shape(**{**saved, "linears": tuple(Linear(**one) for one in saved["linears"])})
        except (ValueError, TypeError, KeyError):
            pass  # damaged, or of another version: it is made anew
    from lorica.planning.built import build

    shape = build(config, model, labels)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, asdict(shape))
    except OSError:
        pass
    return shape


# ------------------------------------------------------------------------------------------------------------------ adapters


def targets(shape: Shape, asked: Any) -> tuple[Linear, ...]:
    """The linears of one layer that get an adapter.

    Args:
        asked: `model.lora.target_modules`.
    """
    if asked == "all-linear":
        return shape.linears
    names = asked or DEFAULT_TARGETS.get(shape.model_type) or (("q_proj", "v_proj") if shape.decoder else ("query", "value"))
    return tuple(
        one for one in shape.linears if any(one.name == n or one.name.endswith(f".{n}") or n.endswith(f".{one.name}") for n in names)
    )


def targets_head(asked: Any) -> bool:
    """Whether a causal model's output head is among them."""
    return isinstance(asked, list) and any(name.rpartition(".")[2] in ("lm_head", "embed_out") for name in asked)
