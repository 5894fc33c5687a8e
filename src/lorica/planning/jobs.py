"""From a run's configuration to the job that its memory is counted of: which way its layers can run on a card, and its batches' sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorica.checks import trained_layers
from lorica.config import TrainConfig
from lorica.data.batching import pieces
from lorica.planning.activations import Way
from lorica.planning.cards import Card
from lorica.planning.lengths import Lengths
from lorica.planning.memory import Job
from lorica.planning.shapes import Shape, targets, targets_head

STEP = 64  # data.shapes: sizes are multiples
EVALUATED, LEAST_EVALUATED = 4, 1024  # train: evaluation's batches to training's
WORTH_COMPILING = 60  # models.fitting
ASSUMED_LEARNT = 0.5  # share of tokens that are learnt where nothing is known of the rows
UNEVEN = 1.1  # the most learnt tokens of any batch, to the mean's


@dataclass(frozen=True)
class Batches:
    """Micro-batches of a run.

    Attributes:
        tokens: of the largest, padding included. mean: of a row, without padding. rows: sequences of the largest. targets: places learnt in
            it. micro_steps: of the whole run; None where that is not known. longest: tokens of a row. pieces: that each is packed of
            (`data.batching.pieces`); 1 where it is not packed.
    """

    tokens: int
    mean: float
    rows: int
    targets: int
    micro_steps: int | None
    longest: int
    pieces: int = 1


def batches(config: TrainConfig, lengths: Lengths | None, flat: bool) -> Batches:
    """What the batch plan will make of the rows; of rows at `model.max_length` where nothing is known of them."""
    t, most = config.trainer, config.model.max_length
    if lengths is None or not len(lengths.prompts):
        size = t.tokens_per_batch or (t.batch_size or 1) * most
        rows = t.batch_size or max(1, size // most)
        return Batches(
            size,
            size / rows,
            rows,
            round(ASSUMED_LEARNT * size),
            t.max_steps * t.accumulate_grad_batches if t.max_steps > 0 else None,
            most,
        )
    tokens, learnt = lengths.cut(most)
    longest, mean = int(tokens.max()), float(tokens.mean())
    in_all = mean * lengths.rows
    if t.tokens_per_batch is not None:
        size = min(t.tokens_per_batch, int(in_all) + STEP)
        size = -(-size // STEP) * STEP if flat else size
        rows = max(1, round(size / mean))
        of_epoch = -(-in_all // size)
    else:
        rows = min(t.batch_size or 1, lengths.rows)
        top = np.sort(tokens)[::-1][:rows]
        size = int(top.sum() + (rows - len(top)) * mean) if flat else rows * longest
        size = -(-size // STEP) * STEP if flat else size
        of_epoch = -(-lengths.rows // rows)
    places = min(size, round(UNEVEN * size * float(learnt.sum() / tokens.sum())))
    steps = of_epoch * max(1, t.max_epochs)
    if t.max_steps >= 0:
        steps = min(steps, t.max_steps * t.accumulate_grad_batches) if t.max_epochs > 0 else t.max_steps * t.accumulate_grad_batches
    budget = t.tokens_per_batch if flat and t.group_by_length else None
    each = pieces(tokens, budget) if budget is not None and size >= budget else 1
    return Batches(size, mean, rows, max(1, places), int(steps), longest, each)


def runs_flat(config: TrainConfig, card: Card) -> bool:
    """Whether batches lie end to end: variable-length attention in bf16."""
    flat = ("auto", "varlen", "flash_attention_3", "flash_attention_4")
    return card.bf16 and config.trainer.precision in ("auto", "bf16-mixed") and config.model.attn_implementation in flat


def job_of(config: TrainConfig, shape: Shape, card: Card, lengths: Lengths | None) -> tuple[Job, Batches]:
    """The job on that card, before it is settled how its layers run (`memory.settle`)."""
    model, t, lora = config.model, config.trainer, config.model.lora
    flat = runs_flat(config, card)
    sizes = batches(config, lengths, flat)
    compiled = t.compile if t.compile is not None else flat and (sizes.micro_steps is None or sizes.micro_steps >= WORTH_COMPILING)
    b = 4 if t.precision == "32-true" else 2
    adapted = targets(shape, lora.target_modules) if lora is not None else ()
    head = lora is not None and shape.decoder and targets_head(lora.target_modules)
    four_bit = model.quantization is not None and model.quantization.load_in_4bit
    learning = trained_layers(model, shape.layers)
    trained = shape.weights
    if learning < shape.layers:  # and what comes after the layers
        trained = learning * shape.of_layer + shape.rest + shape.head
    if lora is not None:
        each = lora.r * sum(one.rows + one.columns for one in adapted) + (sum(one.rows for one in adapted) if lora.use_dora else 0)
        beside = shape.trained_head() if model.task == "sequence_classification" else 0
        whole = {"lm_head": shape.vocabulary * shape.hidden, "embed_tokens": shape.embeddings}
        beside += sum(whole.get(name.rpartition(".")[2], 0) for name in lora.modules_to_save or [])
        trained = learning * each + beside + (lora.r * (shape.vocabulary + shape.hidden) if head else 0)
    way = Way(adapted, lora is None, lora.r if lora else 0, b, bool(compiled), flat)
    evaluated = EVALUATED * max(t.tokens_per_batch or 0, min((t.batch_size or 1) * sizes.longest, 4096), LEAST_EVALUATED)
    return (
        Job(
            shape=shape,
            way=way,
            four_bit=bool(four_bit),
            double=bool(four_bit and model.quantization is not None and model.quantization.bnb_4bit_use_double_quant),
            trained=trained,
            optimizer=str(config.optimizer.name),
            tokens=sizes.tokens,
            rows=sizes.rows,
            targets=sizes.targets,
            evaluated=evaluated,
            labels=lengths.labels if lengths is not None and model.task == "sequence_classification" else 0,
            host_embeddings=t.offload_embeddings,
            fp8=t.fp8,
            frozen=shape.layers - learning,
            capturable=t.cuda_graphs is not False
            and not t.detect_anomaly
            and t.precision != "16-mixed"
            and cards_used(config) == 1
            and t.devices != -1,
            random=shape.dropout,  # adapters' dropout follows from a seed of the micro-step
        ),
        sizes,
    )


def cards_used(config: TrainConfig) -> int:
    """GPUs that a run trains on, as far as its configuration says."""
    devices = config.trainer.devices
    of_machine = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) and devices > 0 else 1
    return of_machine * config.trainer.num_nodes
