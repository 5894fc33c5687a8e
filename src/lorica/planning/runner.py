"""`lorica plan`: will it fit, on this card, and how long; and what to change where it does not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from lorica.checks import check_layers, check_step
from lorica.config import ClassificationDataConfig, ConfigError, PlanConfig, TrainConfig
from lorica.planning import cards, changes, memory, parts
from lorica.planning.cards import GIB, Card
from lorica.planning.jobs import Batches, cards_used, job_of
from lorica.planning.lengths import Lengths, look
from lorica.planning.pace import Pace, pace
from lorica.planning.shapes import Shape, find_shape, targets
from lorica.screen import Screen, counted, duration, short

FP8_CAPABILITY = 8.9  # hardware.check_fp8
LEAST = 0.005  # GiB that a cell shows


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it begins."""

    shape: Shape
    card: Card
    lengths: Lengths | None
    size: parts.Size
    fit: memory.Fit
    sizes: Batches
    pace: Pace


def make(config: TrainConfig, card: Card, shape: Shape, lengths: Lengths | None) -> Plan:
    """The plan of a run on a card: of the fastest way that fits, or, where none does, of the one that takes least."""
    chosen = parts.fastest(config, shape, card, lengths) or parts.smallest(config, shape, card, lengths)
    took = pace(chosen.fit.job, chosen.sizes, card, cards_used(config), *_tokens(config, job_of(config, shape, card, lengths)[1], lengths))
    return Plan(shape, card, lengths, chosen.size, chosen.fit, chosen.sizes, took)


def _tokens(config: TrainConfig, asked: Batches, lengths: Lengths | None) -> tuple[float | None, float | None]:
    """(tokens of an epoch, and of the run, which ends with its epochs or with its steps); None where that is not known."""
    t = config.trainer
    epoch = lengths.rows * asked.mean if lengths is not None else None
    ends = [epoch * t.max_epochs] if epoch is not None and t.max_epochs > 0 else []
    if t.max_steps >= 0:
        ends.append(t.max_steps * t.accumulate_grad_batches * cards_used(config) * asked.rows * asked.mean)
    return epoch, min(ends, default=None)


def run(config: PlanConfig, train: TrainConfig, as_numbers: bool = False) -> int:
    """Print the plan; 0 where the run fits, 1 where it does not.

    Args:
        as_numbers: as JSON.
    Raises:
        ConfigError: no such card; a base or rows that can't be had.
    """
    card = cards.choose(config.gpu)
    if train.trainer.devices == -1:
        if card.count is None:
            raise ConfigError(
                "trainer.devices", -1, "how many there are is known only of a machine with its GPUs at hand", "trainer.devices=2"
            )
        train = replace(train, trainer=replace(train.trainer, devices=card.count))
    lengths = look(train, config.rows)
    labels = lengths.labels if lengths is not None else _labels(train)
    shape = find_shape(train.model, labels)
    if train.model.lora is not None and not targets(shape, train.model.lora.target_modules):
        raise ConfigError(
            "model.lora.target_modules",
            train.model.lora.target_modules,
            f"names none of the layers of {train.model.base}",
            f"model.lora.target_modules=[{','.join(dict.fromkeys(one.name for one in shape.linears))}]",
        )
    if shape.positions is not None and train.model.max_length > shape.positions:
        raise ConfigError(
            "model.max_length",
            train.model.max_length,
            f"{train.model.base} has {shape.positions} positions",
            f"model.max_length={shape.positions}",
        )
    check_layers(train.model, shape.layers)
    if train.trainer.fp8 and card.capability < FP8_CAPABILITY:
        raise ConfigError("trainer.fp8", True, f"{card.name} has no products in FP8 (Ada, Hopper and Blackwell have)", "trainer.fp8=false")
    if lengths is not None and not lengths.estimated:
        check_step(train.trainer, lengths.rows, cards_used(train))
    plan = make(train, card, shape, lengths)
    found = None if plan.fit.fits else proposals(train, card, shape, lengths)
    if as_numbers:
        print(json.dumps(as_json(plan, found), indent=2))
    else:
        _show(plan, train, config, found)
    return 0 if plan.fit.fits else 1


def _labels(train: TrainConfig) -> int:
    given = train.data.labels if isinstance(train.data, ClassificationDataConfig) else None
    return len(given) if given is not None else 4


@dataclass(frozen=True)
class Proposal:
    """Changes that make a run fit. plan: with them."""

    taken: list[changes.Change]
    plan: Plan


def proposals(train: TrainConfig, card: Card, shape: Shape, lengths: Lengths | None) -> list[Proposal]:
    """The cheapest ones, and single ones that are enough by themselves."""

    def fits(config: TrainConfig) -> bool:
        return make(config, card, shape, lengths).fit.fits

    if (cheapest := changes.makes_fit(train, lengths, shape.layers, fits)) is None:
        return []
    ways = [cheapest]
    known = [[change.overrides for change in way] for way in ways]
    ways += [[one] for one in changes.alone(train, lengths, shape.layers, fits) if [one.overrides] not in known]
    return [Proposal(way, make(changes.changed(train, way), card, shape, lengths)) for way in ways]


def by_phase(plan: Plan) -> dict[str, memory.Parts]:
    """Bytes of each phase, by what they are; a model that is trained whole has nothing to merge."""
    job = plan.fit.job
    return {name: of_phase(job, plan.card) for name, of_phase in memory.PHASES.items() if name != "merge" or not job.way.full}


def as_json(plan: Plan, found: list[Proposal] | None) -> dict[str, Any]:
    """Everything as numbers: bytes and seconds."""
    job = plan.fit.job
    return {
        "fits": plan.fit.fits,
        "peak_bytes": round(plan.fit.peak),
        "needed_bytes": round(plan.fit.most),
        "usable_bytes": plan.card.usable,
        "card": asdict(plan.card),
        "model": {"weights": plan.shape.weights, "trained": job.trained, "exact": plan.shape.exact},
        "micro_batch": {**asdict(plan.sizes), "parts": plan.size.parts},
        "layers": {
            "compiled": job.way.compiled,
            "flat": job.way.flat,
            "recomputed": job.recomputed,
            "offload": job.offload,
            "resident": job.resident,
            "host_embeddings": plan.size.host_embeddings,
        },
        "phases": {name: {part: round(size) for part, size in found.items()} for name, found in by_phase(plan).items()},
        "rows": None if plan.lengths is None else {"rows": plan.lengths.rows, "tokens_counted": plan.lengths.counted},
        "time": asdict(plan.pace),
        "changes": None
        if found is None
        else [
            {
                "overrides": [o for c in p.taken for o in c.overrides],
                "price": [c.price for c in p.taken],
                "peak_bytes": round(p.plan.fit.peak),
            }
            for p in found
        ],
    }


def _show(plan: Plan, train: TrainConfig, config: PlanConfig, found: list[Proposal] | None) -> None:
    screen, card = Screen(), plan.card
    screen.facts(f"lorica plan: {train.data.name} with {train.model.name}", _facts(plan, train, config))
    screen.print(_table(plan))
    needed = f"peak {plan.fit.most / GIB:.2f} GiB ({plan.fit.phase}, with {memory.PIECES:.0%} for pieces)"
    screen.print(f"{'fits' if plan.fit.fits else 'does NOT fit'}: {needed}, {card.usable / GIB:.2f} GiB usable on {card.name}")
    if found is None:
        for verb, size in _later(plan):
            screen.print(f"lorica {verb} takes {size / GIB:.2f} GiB, more than this card has: with accelerator=cpu it runs in host memory")
        return
    if not found:
        screen.print("nothing that Lorica can change makes it fit: a smaller model.base, or a larger card")
    for i, proposal in enumerate(found):
        screen.print("what makes it fit, cheapest first:" if i == 0 else "or by itself:" if i == 1 else "or:")
        screen.print("  " + " ".join(o for change in proposal.taken for o in change.overrides))
        for change in proposal.taken:
            screen.print(f"    {change.overrides[0].partition('=')[0]}: {change.price}")
        seconds = proposal.plan.pace.epoch
        slow = f", {duration(seconds)} an epoch" if seconds is not None else ""
        screen.print(f"    then {proposal.plan.fit.most / GIB:.2f} GiB{slow}")


def _later(plan: Plan) -> list[tuple[str, float]]:
    """The verbs that answer with what was trained and take more bytes than the card has, each with its bytes."""
    sizes = {name: memory.total(found) for name, found in by_phase(plan).items() if name in ("merge", "predict")}
    return [(name, size) for name, size in sizes.items() if size > plan.card.usable]


def _facts(plan: Plan, train: TrainConfig, config: PlanConfig) -> list[tuple[str, str]]:
    job, card, lengths, took = plan.fit.job, plan.card, plan.lengths, plan.pace
    guess = "" if plan.shape.exact else " (its layers are not known: a rough figure)"
    rows = [("model", f"{train.model.base}, {short(plan.shape.weights)} weights, {short(job.trained)} trained{guess}")]
    if lengths is not None:
        cut, answers = lengths.shortened(train.model.max_length)
        about = "" if lengths.counted else "about "
        mean = float((lengths.prompts + lengths.answers).mean())
        told = (
            f"{lengths.rows:,} training rows of {about}{mean:,.0f} tokens; model.max_length={train.model.max_length} cuts {cut:.1%} of them"
        )
        rows.append(("data", told + ("" if lengths.classified else f", {answers:.1%} of the answers")))
    else:
        rows.append(("data", f"not at hand: rows of model.max_length={train.model.max_length} are assumed"))
    divided = f" a part x {plan.size.parts} parts" if plan.size.parts > 1 else ""
    laid = "end to end" if job.way.flat else "padded"
    rows.append(("micro-batch", f"{job.tokens:,} tokens{divided} x {train.trainer.accumulate_grad_batches} accumulated, {laid}"))
    if plan.size != parts.asked(train):
        told = parts.told(plan.size, train, plan.shape, card, lengths)
        rows.append(("fitted", told if plan.fit.fits else f"at the least: {told.partition(', ')[2]}"))
    precision = train.trainer.precision
    if precision in ("auto", "bf16-mixed"):
        precision = "bf16-mixed" if card.bf16 else "16-mixed, as this card has no bf16"
    steps = plan.sizes.micro_steps
    few = steps is not None and train.trainer.compile is None and job.way.flat and not job.way.compiled
    why = f"; {counted(steps or 0, 'micro-step')}: too few to compile layers for" if few else ""
    rows.append(("layers", f"{memory.layers_line(job)}; precision {precision}{why}"))
    count = f"{cards_used(train)} x " if cards_used(train) > 1 else ""
    rows.append(
        (
            "card",
            f"{count}{card.name}: {card.memory / GIB:.2f} GiB, {card.usable / GIB:.2f} usable beside CUDA's own"
            + (f" and {card.busy / GIB:.2f} in use" if card.busy else ""),
        )
    )
    source = "by rates measured on an H200" if took.measured else "estimated from rates measured on an H200, +-40 %"
    if card.like:
        source = f"as of a {card.like}, {source}; gpu=NAME is surer"
    if took.whole is not None and took.joules is not None:
        epoch = f"{duration(took.epoch)} an epoch, " if took.epoch is not None else ""
        rows.append(("time", f"{epoch}{duration(took.whole)} of training; {took.tokens:,.0f} tokens/s ({source})"))
        kwh = took.joules / 3.6e6
        costs = [f"{kwh:.3g} kWh" if kwh >= 1 else f"{1000 * kwh:.3g} Wh"]
        if config.price_per_kwh is not None:
            costs.append(f"{kwh * config.price_per_kwh:.2f} for electricity")
        if config.price_per_hour is not None:
            costs.append(f"{took.whole / 3600 * config.price_per_hour:.2f} for the card")
        rows.append(("energy", ", ".join(costs)))
    else:
        rows.append(("time", f"{took.tokens:,.0f} tokens/s ({source})"))
    return rows


def _table(plan: Plan) -> Any:
    """GiB by phase and by what they are."""
    from rich.table import Table

    found = by_phase(plan)
    names = list(dict.fromkeys(part for of_phase in found.values() for part in of_phase))
    table = Table(title="GiB", title_justify="left", title_style="bold")
    table.add_column("")
    for phase in found:
        table.add_column(phase, justify="right")
    for name in names:
        cells = [found[phase].get(name, 0.0) / GIB for phase in found]
        if any(cell >= LEAST for cell in cells):
            table.add_row(name, *(f"{cell:.2f}" if cell >= LEAST else "" for cell in cells))
    table.add_section()
    table.add_row("at the peak", *(f"{memory.total(found[phase]) / GIB:.2f}" for phase in found))
    return table
