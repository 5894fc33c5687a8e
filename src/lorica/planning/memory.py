"""A run's memory on a GPU, phase by phase, from the sizes of its model and of its batches.

What torch's allocator hands out at its peak (`torch.cuda.max_memory_allocated`, which runs report as memory/peak_gib), in bytes. Beside
it lie CUDA's context and what the allocator can't use for its pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorica.planning.activations import Needed, Way, backward, kept, residual
from lorica.planning.cards import Card
from lorica.planning.shapes import Shape

# As the product does it; tests/planning/test_memory.py holds these against the code that they are of.
TILE_ELEMENTS = 1 << 25  # kernels.loss
EVALUATION_ELEMENTS = 1 << 23  # kernels.loss
PREDICTED_ELEMENTS = 1 << 26  # answering
SPARE, SPARE_BYTES, PLENTY = 0.06, 256 << 20, 2  # models.fitting
BLOCK, BLOCK2 = 64, 256  # bitsandbytes' NF4: weights to a scale, scales to a scale of theirs
BACKWARD = "backward of a layer"
PIECES = 0.02  # share of the peak that the allocator holds besides, in pieces
# torch's c10/core/AllocatorConfig.h: what is left of a segment goes with the last tensor unless it is more than SMALL; tensors up to LARGE
# share segments of SEGMENT bytes, larger ones have their own, a multiple of ROUND.
SMALL, LARGE, SEGMENT, ROUND = 1 << 20, 10 << 20, 20 << 20, 2 << 20


@dataclass(frozen=True)
class Job:
    """What decides a run's memory.

    Attributes:
        four_bit, double: the linears in NF4, its scales quantised too. trained: weights under training, adapters or all.
        tokens: of the largest micro-batch, padding included. rows: sequences in it. targets: places of it that are learnt.
        evaluated: tokens of the largest evaluation batch. recomputed: layers computed again in backward. offload: their inputs in host
            memory meanwhile. resident: 4-bit weights kept plain as well. host_embeddings: the input embeddings in host memory.
        frozen: first layers, which no gradient flows through. capturable: micro-steps may be captured, as far as memory allows. random:
            layers draw random numbers, and can't be captured where they are computed again. room_for_evaluation: evaluation
            has its memory beside captured micro-steps, in batches that are no larger than theirs, but for single rows.
    """

    shape: Shape
    way: Way
    four_bit: bool
    double: bool
    trained: int
    optimizer: str
    tokens: int
    rows: int
    targets: int
    evaluated: int
    labels: int
    recomputed: int = 0
    offload: bool = False
    resident: bool = False
    host_embeddings: bool = False
    fp8: bool = False
    frozen: int = 0
    capturable: bool = False
    random: bool = False
    room_for_evaluation: bool = False

    @property
    def learning(self) -> int:
        """Layers that are trained or have adapters: the only ones that keep anything for backward."""
        return self.shape.layers - self.frozen


Parts = dict[str, float]


def handed_out(size: float) -> float:
    """Bytes that the allocator counts for a tensor, on average."""
    if size < SMALL:
        return size
    if size < LARGE:
        left = SEGMENT % size
        return size + (left / (SEGMENT // size) if left <= SMALL else 0.0)
    left = -size % ROUND
    return size + (left if left <= SMALL else 0.0)


def in_blocks(job: Job) -> float:
    """Times their own bytes that a layer's tensors of a number a token take."""
    shape, of = job.shape, job.way.b * job.tokens
    sizes = [of * n for n in (*[shape.hidden] * 4, *[shape.keys] * 2, *[shape.inner] * (3 if shape.gated else 2))]
    return sum(map(handed_out, sizes)) / sum(sizes)


def total(parts: Parts) -> float:
    """Bytes of a phase at its peak."""
    return sum(parts.values())


def weights(job: Job) -> Parts:
    """The model as it lies on the card."""
    shape, b = job.shape, 4 if job.way.full else job.way.b
    own = shape.weights - (shape.embeddings if job.host_embeddings else 0)
    if not job.four_bit:
        blocks = 0.0 if job.way.full else shape.layers * sum(handed_out(b * one.weights) - b * one.weights for one in shape.linears)
        return {"weights": b * own + blocks}
    coded = shape.in_linears
    scales = coded / BLOCK * (1 + 4 / BLOCK2 if job.double else 4)
    return {"weights": b * (own - coded) + coded / 2, "quantisation state": scales}


def plain_weights(job: Job) -> float:
    """Bytes of the 4-bit weights under adapters, plain (or in FP8, with their transposes)."""
    adapted = job.learning * sum(one.weights for one in job.way.adapted)
    return float(adapted * job.way.b)


def state(job: Job) -> float:
    """Bytes of the optimiser's state on the card; paged states leave it where every layer is computed again."""
    if job.optimizer == "paged_adamw_8bit" and job.recomputed >= job.learning:
        return 0.0
    each = {"sgd": 0.0, "adamw": 8.0}.get(job.optimizer, 2 * (1 + 4 / 256))
    return each * job.trained


def stays(job: Job) -> Parts:
    """What training holds all along."""
    trained = {"gradients": 4.0 * job.trained, "optimiser": state(job)}
    found = {**weights(job), **({} if job.way.full else {"adapters": 4.0 * job.trained}), **trained}
    if job.resident:
        found["4-bit weights kept plain"] = plain_weights(job)
    return found


def logits(job: Job) -> float:
    """Bytes of the output head's largest moment: a tile's logits in fp32 and two of their size for the gradient; hidden states of the
    places that are learnt, and their gradients. Under training also the head's copy in the arithmetic's type and the sum in fp32 of the
    tiles' gradients for it (each tile makes its own copy: Lightning's autocast keeps none); or, when the logits are gone, that gradient in
    both types."""
    shape, b = job.shape, job.way.b
    if not shape.decoder:
        return 3 * 4.0 * job.rows * max(job.labels, 1)
    if job.labels and shape.head == job.labels * shape.hidden:  # a causal base with a classifier's head
        return 3 * 4.0 * job.rows * job.labels
    places = max(1, TILE_ELEMENTS // shape.vocabulary)
    hidden = 2.0 * residual(shape, job.way) * job.targets * shape.hidden
    tile = 12.0 * min(job.targets, places) * shape.vocabulary
    if not job.way.full or b == 4:
        return tile + hidden
    head = shape.vocabulary * shape.hidden
    return max(tile + (b + (0 if job.targets <= places else 4)) * head, (b + 4.0) * head) + hidden


def ends(job: Job) -> float:
    """Bytes that the head's moment finds besides the layers': the last norm's input in fp32 and its result, positions; where every weight
    is trained also the normed input, all in fp32."""
    shape, b = job.shape, job.way.b
    if shape.decoder:
        norm = 3 * 4 * shape.hidden if job.way.full else (4 * shape.hidden if b < 4 else 0) + b * shape.hidden
        return float(job.tokens * (norm + 2 * 2 * b * shape.queries // shape.heads))
    return float(job.tokens * residual(shape, job.way) * shape.hidden)


def beginning(job: Job) -> float:
    """Bytes that trained embeddings keep for backward: an encoder's norm and dropout."""
    shape = job.shape
    return float(job.tokens * (4 + (1 if shape.dropout else 0)) * shape.hidden) if job.way.full and not shape.decoder else 0.0


def train(job: Job, card: Card) -> Parts:
    """A micro-step's peak, over its moments: the head's gradient with every layer's activations there, the last layer's backward, the
    backward of the layers that are computed again; of a backward the widest part, and a product with a weight that is made plain for it."""
    shape, way = job.shape, job.way
    own = kept(shape, way)
    layers, again = job.learning, min(job.recomputed, job.learning)
    waiting = (0.0 if job.offload else own.input * job.tokens * again) + beginning(job)
    whole = (own.a_token * job.tokens * in_blocks(job) + own.once) * (layers - again) + waiting
    passed = residual(shape, way) * shape.hidden * job.tokens  # the gradient between two layers
    plain = sum(dequantised(job).values())
    moments = [("logits", whole + ends(job), logits(job), 0.0)]

    def add(at: float, needed: Needed) -> None:
        moments.append((BACKWARD, at + passed, needed.a_token * job.tokens + needed.once, 0.0))
        moments.append((BACKWARD, at + passed, needed.beside_weight * job.tokens + needed.once, plain))

    if again < layers:
        add(whole, backward(shape, way, again=False))
    if again:
        returned = own.input * job.tokens if job.offload and way.compiled else 0.0
        add(waiting + returned, backward(shape, way, again=True))
    name, lying, working, weight = max(moments, key=lambda moment: sum(moment[1:]))
    return {
        **stays(job),
        "activations": lying,
        name: working,
        **({"a dequantised weight": weight} if weight else {}),
        "library workspaces": float(card.workspace),
    }


def largest_plain(job: Job) -> float:
    """Bytes of a layer's largest matrix in the arithmetic's type."""
    return float(job.way.b * max(one.weights for one in job.shape.linears))


def dequantised(job: Job) -> Parts:
    """A 4-bit weight made plain for one product."""
    if not job.four_bit or (job.resident and not job.frozen):
        return {}
    return {"a dequantised weight": largest_plain(job)}


def forward(job: Job, tokens: int) -> float:
    """Bytes that a forward without gradients takes at its widest."""
    shape, b = job.shape, job.way.b
    wide = (3 if shape.gated else 2) * shape.inner
    heads = shape.queries + 2 * shape.keys + shape.queries
    return float(tokens * (2 * residual(shape, job.way) * shape.hidden + b * max(wide + shape.hidden, heads + 2 * shape.hidden)))


def evaluate(job: Job, card: Card) -> Parts:
    """Validation between steps: gradients and the optimiser's state stay; batches shrink until they take no more than training does.
    Trained fp32 weights have copies in the arithmetic's type until the forward is over."""
    shape, b = job.shape, job.way.b
    held = {**stays(job), **dequantised(job), "library workspaces": float(card.workspace)}
    most = max(0.0, total(train(job, card)) - total(held))
    tile = 12.0 * min(job.evaluated, EVALUATION_ELEMENTS // max(1, shape.vocabulary)) * shape.vocabulary if shape.decoder else 0.0
    head = shape.vocabulary * shape.hidden if shape.decoder else 0
    casts = b * (shape.layers * shape.of_layer + head) if job.way.full and b < 4 else 0
    return {**held, "activations": min(most, forward(job, job.evaluated) + tile + casts)}


def with_evaluation(job: Job, card: Card) -> float:
    """Bytes of a micro-step's peak with an evaluation batch beside what captured micro-steps hold on to."""
    return total(train(job, card)) + evaluate(job, card)["activations"]


def load(job: Job, card: Card) -> Parts:
    """Reading the weights: each is on the card as it is in its file, and then in 4 bits."""
    if not job.four_bit:
        return weights(job)
    return {**weights(job), "a weight before it is quantised": largest_plain(job)}


def save(job: Job, card: Card) -> Parts:
    """Writing the state: copies go to host memory one by one."""
    return stays(job)


def merge(job: Job, card: Card) -> Parts:
    """`lorica merge`: the adapter's model and the merged one answer the same rows, one after the other."""
    plain = replace(job, four_bit=False, resident=False, way=replace(job.way, full=False), host_embeddings=False)
    return {**weights(plain), "activations": forward(plain, 2048), "library workspaces": float(card.workspace)}


def predict(job: Job, card: Card) -> Parts:
    """`lorica predict` with the adapter, where labels are scored: in batches that are halved until they fit, down to single rows
    (`scoring`). Generation keeps keys and values besides."""
    held = {
        **weights(replace(job, host_embeddings=False)),
        **({} if job.way.full else {"adapters": 4.0 * job.trained}),
        **dequantised(replace(job, resident=False)),
        "library workspaces": float(card.workspace),
    }
    tokens, row = max(1, PREDICTED_ELEMENTS // job.shape.hidden), job.tokens // max(1, job.rows)
    while tokens >= 2 * row and (total(held) + forward(job, tokens)) * (1 + PIECES) > card.usable:
        tokens //= 2
    return {**held, "activations": forward(job, tokens)}


PHASES = {"load": load, "train": train, "evaluate": evaluate, "save": save, "merge": merge, "predict": predict}


@dataclass(frozen=True)
class Fit:
    """How a job runs on a card.

    Attributes:
        peak: bytes in training. most: of the phase of a run that takes most, with the allocator's pieces. phase: its name. fits: whether
            that is within the card's memory.
    """

    job: Job
    peak: float
    most: float
    phase: str
    fits: bool


def limit(card: Card) -> float:
    """Bytes that a run takes where it has a choice (`models.fitting`)."""
    return card.usable * (1 - SPARE) - SPARE_BYTES


def settle(job: Job, card: Card, asked: bool | int | str | None, resident: bool | None) -> Fit:
    """How the run's layers will run on a card, as `models.fitting` finds out by trying.

    Args:
        asked: `trainer.gradient_checkpointing`. resident: `trainer.resident_weights`.
    """
    layers = job.learning

    def ran(**changes: object) -> Job:
        return replace(job, **changes)  # type: ignore[arg-type]

    def peak(one: Job) -> float:
        return with_evaluation(one, card) if one.room_for_evaluation else total(train(one, card))

    if job.four_bit and resident is not False and not asked:
        plain = ran(resident=True, recomputed=0, offload=False)
        room = PLENTY * plain_weights(plain) < card.usable - total(stays(job)) + total({"gradients": 4.0 * job.trained})
        if resident or (room and peak(plain) < limit(card)):
            return _fit(plain, card)
    if asked is not None:
        all_of_them = asked is True or asked == "offload"
        count = layers if all_of_them else 0 if asked is False else min(int(asked), layers)
        return _fit(ran(recomputed=count, offload=asked == "offload", resident=bool(resident)), card)
    for count in range(layers + 1):
        one = ran(recomputed=count, offload=False, resident=bool(resident))
        if peak(one) <= limit(card):
            return _fit(one, card)
    found = _fit(ran(recomputed=layers, offload=False), card)
    return found if found.fits else _fit(ran(recomputed=layers, offload=True), card)


def _fit(job: Job, card: Card) -> Fit:
    peaks = {phase: total(PHASES[phase](job, card)) for phase in ("train", "load", "evaluate", "save")}
    phase = max(peaks, key=peaks.__getitem__)
    most = peaks[phase] * (1 + PIECES)
    return Fit(job, peaks["train"], most, phase, most <= card.usable)


def layers_line(job: Job) -> str:
    """How the layers run, in words."""
    ways = ["compiled" if job.way.compiled else "not compiled"]
    if job.resident:
        ways.append("4-bit weights kept plain as well")
    if not job.recomputed:
        ways.append("activations kept")
    elif job.recomputed == job.learning:
        ways.append(
            f"every {'trained ' if job.frozen else ''}layer computed again in backward"
            + (", its input in host memory meanwhile" if job.offload else "")
        )
    else:
        ways.append(f"{job.recomputed} of {job.learning} {'trained ' if job.frozen else ''}layers computed again in backward")
    return ", ".join(ways)
