"""`trainer.fit`: the size of a run's micro-batches for the GPU at hand, chosen before weights are read; and the memory that is expected of
the run as it was set up. Both by `planning`."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch

from lorica.config import ConfigError, TrainConfig
from lorica.data.batching import batch_tokens
from lorica.data.module import LoricaDataModule
from lorica.hardware import Machine, memory_limit
from lorica.models.fitting import Fit
from lorica.planning import changes, memory, parts
from lorica.planning.cards import GIB, Card, of_device
from lorica.planning.jobs import job_of
from lorica.planning.lengths import Lengths
from lorica.planning.parts import Size
from lorica.planning.shapes import Shape, shape_of


def card_at_hand(machine: Machine) -> Card:
    """The run's GPU with what this process may have of it."""
    major, minor = torch.cuda.get_device_capability(machine.device)
    return of_device(torch.cuda.get_device_name(machine.device), memory_limit(machine.device), major + minor / 10)


def lengths_of(data: LoricaDataModule, config: TrainConfig) -> Lengths:
    """Of the training rows as they are encoded."""
    tokens = np.array([len(row.ids) for row in data.train_rows])
    classified = config.model.task == "sequence_classification"
    learnt = np.zeros_like(tokens) if classified else np.array([row.supervised for row in data.train_rows])
    return Lengths(tokens - learnt, learnt, len(tokens), True, len(data.labels or []), classified)


def choose(config: TrainConfig, data: LoricaDataModule, machine: Machine, architecture: dict[str, Any]) -> tuple[int, bool, str]:
    """`Size` of the fastest way that fits, and what to tell the user where it is not what was asked for.

    Args:
        architecture: the base's config.json.
    Raises:
        ConfigError: nothing fits; with what would.
    """
    if machine.device.type != "cuda" or not config.trainer.fit or config.trainer.max_steps == 0:
        return *astuple(parts.asked(config)), ""
    shape = shape_of(architecture, config.model, len(data.labels or []))
    if not shape.exact:
        return *astuple(parts.asked(config)), ""  # its figures are rough: trying decides
    card, lengths = card_at_hand(machine), lengths_of(data, config)
    found = parts.fastest(config, shape, card, lengths)
    if found is None:
        raise refusal(config, shape, card, lengths)
    told = parts.told(found.size, config, shape, card, lengths) if found.size != parts.asked(config) else ""
    return *astuple(found.size), told


def going_on(config: TrainConfig, data: LoricaDataModule, machine: Machine, architecture: dict[str, Any], into: int) -> Size:
    """The size of a run that goes on: in as many parts as it began with, its input embeddings in host memory where it fits only so."""
    asked = Size(into, config.trainer.offload_embeddings)
    if machine.device.type != "cuda" or not config.trainer.fit or asked.host_embeddings:
        return asked
    shape = shape_of(architecture, config.model, len(data.labels or []))
    if not shape.exact or not parts.movable(config, shape):
        return asked
    card, lengths = card_at_hand(machine), lengths_of(data, config)
    fits = parts.sized(config, shape, card, lengths, asked).fit.fits
    return asked if fits else Size(into, True)


def refusal(config: TrainConfig, shape: Shape, card: Card, lengths: Lengths) -> ConfigError:
    """What the run needs at least, and the cheapest changes that make it fit."""
    least = parts.smallest(config, shape, card, lengths)
    ways = changes.makes_fit(config, lengths, shape.layers, lambda one: parts.fastest(one, shape, card, lengths) is not None)
    return ConfigError(
        "trainer.fit",
        True,
        f"the run needs {least.fit.peak / GIB:.1f} GiB in the smallest parts, of {card.usable / GIB:.1f} (`lorica plan` shows what for)",
        " ".join(o for change in ways for o in change.overrides) if ways else "a smaller model.base, or a larger card",
    )


def expected(config: TrainConfig, data: LoricaDataModule, machine: Machine, architecture: dict[str, Any], size: Size) -> memory.Fit | None:
    """How the run's layers will run and what memory it will take, by the sizes of its real batches; None where that is not known: on a
    CPU, and of architectures that are not counted."""
    if machine.device.type != "cuda" or not len(data.plan):
        return None
    shape = shape_of(architecture, config.model, len(data.labels or []))
    if not shape.exact:
        return None
    card = card_at_hand(machine)
    job, sizes = job_of(config, shape, card, lengths_of(data, config))
    return parts.settled(config, _planned(job, data, size), sizes, card)


def _planned(job: memory.Job, data: LoricaDataModule, size: Size) -> memory.Job:
    """The job with the sizes of the plan's own micro-batches."""
    if data.shapes:
        largest = data.shapes[-1]
        sizes = largest.tokens, largest.sequences, largest.targets
    else:
        plan, padded = data.plan, data.batching.padded
        every = (plan.micro_batch(k, rank).rows or (0,) for k in range(len(plan)) for rank in range(plan.world_size))
        rows = max(every, key=lambda own: batch_tokens(plan.lengths, own, padded))
        sizes = batch_tokens(plan.lengths, rows, padded), len(rows), int(plan.supervised[list(rows)].sum())
    return replace(job, tokens=sizes[0], rows=sizes[1], targets=sizes[2], host_embeddings=size.host_embeddings)


def after_trying(before: memory.Fit, found: Fit, data: LoricaDataModule, size: Size, machine: Machine) -> float:
    """GiB that are expected of the run as real batches had it set up."""
    way = replace(before.job.way, compiled=found.compiled)
    job = replace(_planned(before.job, data, size), way=way, recomputed=found.recomputed, offload=found.offload, resident=found.resident)
    return memory.total(memory.train(job, card_at_hand(machine))) / GIB
