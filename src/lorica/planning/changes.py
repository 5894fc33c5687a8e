"""What to change where a run does not fit: the cheapest changes that make it fit, as overrides to paste, each with its price."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

from lorica.checks import trained_layers
from lorica.config import LoraSettings, QuantizationSettings, TrainConfig
from lorica.planning.lengths import Lengths

SHORTEST = 128  # of model.max_length that is proposed
LEAST_RANK = 8  # of adapters that is proposed
ROUNDED = 0.1  # of a scale that may be lost where model.lora.lora_alpha, a whole number, is rounded
NF4 = "model.quantization={load_in_4bit:true}"
ADAPTERS, RATE = "model.lora={r:16,target_modules:all-linear}", "optimizer.lr=2e-4"
ADAPTED = "adapters of rank 16 on all linear layers learn, at their usual rate, and the weights stay as they are"


@dataclass(frozen=True)
class Change:
    """One change. overrides: to paste. price: what it costs. kind: changes of one kind replace each other."""

    kind: str
    overrides: tuple[str, ...]
    price: str
    apply: Callable[[TrainConfig], None]


def makes_fit(config: TrainConfig, lengths: Lengths | None, layers: int, fits: Callable[[TrainConfig], bool]) -> list[Change] | None:
    """The cheapest changes, in the order of their price, after which the run fits; None where none do.

    Args:
        layers: of the model. fits: whether a configuration does.
    """
    changes = list(ladder(config, lengths, layers))
    if not fits(changed(config, {change.kind: change for change in changes}.values())):
        return None  # not even with the furthest of every kind
    taken: dict[str, Change] = {}
    for change in changes:
        taken[change.kind] = change
        if fits(changed(config, taken.values())):
            break
    for kind in list(taken):  # dearest first are kept; what is not needed goes
        without = [c for c in taken.values() if c.kind != kind]
        if without and fits(changed(config, without)):
            del taken[kind]
    return list(taken.values())


def alone(config: TrainConfig, lengths: Lengths | None, layers: int, fits: Callable[[TrainConfig], bool]) -> list[Change]:
    """Each single change that is enough by itself, the mildest of its kind."""
    kinds: dict[str, list[Change]] = {}
    for change in ladder(config, lengths, layers):
        kinds.setdefault(change.kind, []).append(change)
    enough = [of_kind for of_kind in kinds.values() if fits(changed(config, of_kind[-1:]))]
    return [next(change for change in of_kind if change is of_kind[-1] or fits(changed(config, [change]))) for of_kind in enough]


def changed(config: TrainConfig, taken: Iterable[Change]) -> TrainConfig:
    """A copy of a configuration with changes."""
    copy = deepcopy(config)
    for change in taken:
        change.apply(copy)
    return copy


def ladder(config: TrainConfig, lengths: Lengths | None, layers: int) -> Iterator[Change]:
    """Every change that saves memory, cheapest first."""
    t, model = config.trainer, config.model
    if t.resident_weights:
        yield _set(
            "resident", "trainer.resident_weights=null", "the same numbers; 4-bit weights are made plain for each use, 5-15 % slower"
        )
    if t.gradient_checkpointing is not None and t.gradient_checkpointing != "offload" and t.gradient_checkpointing is not True:
        yield _set(
            "recompute", "trainer.gradient_checkpointing=null", "the same numbers; as many layers as needed run twice, up to 40 % slower"
        )
    if t.precision == "32-true":
        yield _set("precision", "trainer.precision=auto", "products in 16 bits, sums in 32: nearly the same loss, several times faster")
    if config.optimizer.name == "adamw":
        yield _set("optimiser", "optimizer.name=adamw_8bit", "moments in 8 bits: nearly the same loss")
    if not t.fit:
        yield _set("fit", "trainer.fit=true", "the same rows and loss a step, in as many parts as fit: shorter products, 5-30 % slower")
    if t.gradient_checkpointing != "offload":
        yield _set(
            "recompute",
            "trainer.gradient_checkpointing=offload",
            "the same numbers; every layer runs twice, its input waits in host memory",
        )
    if model.lora is None:
        yield Change("adapters", (ADAPTERS, RATE), ADAPTED, _adapted)
        if model.quantization is None:
            yield Change("adapters", (ADAPTERS, NF4, RATE), f"{ADAPTED}, in NF4 with 9 % error each", _both)
    elif model.quantization is None:
        yield Change("bits", (NF4,), "NF4 weights: 9 % error each, a loss a little higher", _quantised)
    if model.lora is not None:
        yield from _smaller_ranks(model.lora)
    yield from _fewer_layers(layers, trained_layers(model, layers))
    length = model.max_length // 2
    while length >= SHORTEST:
        yield _shorter(config, lengths, length)
        length //= 2


def _smaller_ranks(lora: LoraSettings) -> Iterator[Change]:
    """Half the rank and so on; the update is scaled as before."""
    r = lora.r // 2
    while r >= LEAST_RANK:
        alpha = lora.lora_alpha * (r / lora.r) ** (0.5 if lora.use_rslora else 1)
        if abs(round(alpha) / alpha - 1) <= ROUNDED:
            price = f"adapters of rank {r} in place of {lora.r}, scaled as before: fewer weights to learn with, enough for many tasks"
            yield _set("rank", f"model.lora.r={r}", price, f"model.lora.lora_alpha={round(alpha)}")
        r //= 2


def _fewer_layers(layers: int, learning: int) -> Iterator[Change]:
    """The last half of the layers that learn, the last quarter and so on, down to the last one."""
    while learning := learning // 2:
        price = f"the first {layers - learning} of {layers} layers learn nothing: fewer weights to learn with, faster"
        yield _set("layers", f"model.train_layers=last_{learning}", price)


def _shorter(config: TrainConfig, lengths: Lengths | None, length: int) -> Change:
    price = "cuts longer rows"
    if lengths is not None:
        rows, answers = lengths.shortened(length)
        price = f"cuts {rows:.1%} of the rows" + ("" if lengths.classified else f", {answers:.1%} of the answers")
    more = []
    if config.trainer.tokens_per_batch is not None:
        times = config.model.max_length // length
        more = [f"trainer.tokens_per_batch={length}"]
        before = max(1, config.trainer.tokens_per_batch // config.model.max_length)
        more.append(f"trainer.accumulate_grad_batches={config.trainer.accumulate_grad_batches * before * times}")
    return _set("length", f"model.max_length={length}", price, *more)


def _adapted(config: TrainConfig) -> None:
    config.model.lora = LoraSettings(target_modules="all-linear")


def _both(config: TrainConfig) -> None:
    _adapted(config)
    _quantised(config)


def _quantised(config: TrainConfig) -> None:
    config.model.quantization = QuantizationSettings()


def _set(kind: str, text: str, price: str, *more: str) -> Change:
    """A change of keys to plain values."""
    overrides = (text, *more)

    def apply(config: TrainConfig) -> None:
        for override in overrides:
            name, _, value = override.partition("=")
            *parents, last = name.split(".")
            owner: object = config
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, last, _value(value))

    return Change(kind, overrides, price, apply)


def _value(text: str) -> object:
    return {"null": None, "true": True, "false": False}.get(text, int(text) if text.isdigit() else text)
