"""What one layer keeps from forward for backward, and what backward needs beside it, in bytes a token: derived from what its operations
save, as torch's autograd and its compiler (min-cut partitioning, which keeps what products read and write) do it.

Derivations are in tests/planning/test_activations.py, which traces real layers. b: bytes of the arithmetic's numbers (2 in bf16).
"""

from __future__ import annotations

from dataclasses import dataclass

from lorica.planning.shapes import Linear, Shape


@dataclass(frozen=True)
class Way:
    """How layers run.

    Attributes:
        adapted: linears with adapters; empty where every weight is trained (`full`). r: rank.
        b: bytes of a number in products. compiled: else each operation runs by itself. flat: sequences end to end, else padded.
    """

    adapted: tuple[Linear, ...]
    full: bool
    r: int
    b: int
    compiled: bool
    flat: bool

    def reads(self, role: str) -> bool:
        """Whether what linears of a role read is kept for their gradients."""
        return self.full or any(one.role == role for one in self.adapted)


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer. a_token: for each token. once: whatever the tokens are. input: of the layer's input, for each token."""

    a_token: float
    once: float
    input: float


def residual(shape: Shape, way: Way) -> int:
    """Bytes of a number of what layers hand on: fp32 where fp32 weights are trained under autocast, and where a norm comes last, which
    CUDA's autocast computes in fp32; else the arithmetic's."""
    return 4 if way.full or not shape.decoder else way.b


def kept(shape: Shape, way: Way) -> Kept:
    """What a layer keeps that is not computed again, its input included."""
    own = _decoder(shape, way) if shape.decoder else _encoder(shape, way)
    low_rank = way.b * way.r * len(way.adapted)  # x A^T of each adapter
    adapters = way.r * sum(one.rows + one.columns for one in way.adapted)
    casts = way.b * (shape.of_layer if way.full else adapters if way.compiled else 0) if way.b < 4 else 0
    return Kept(own + low_rank, casts, residual(shape, way) * shape.hidden)


def _decoder(shape: Shape, way: Way) -> float:
    h, q, k, f, b = shape.hidden, shape.queries, shape.keys, shape.inner, way.b
    wide = 2 if shape.gated else 1
    attention = b * (q + 2 * k) + b * q + 4 * shape.heads
    narrowing = b * f * way.reads("narrowing")
    if way.compiled:
        # the layer's input; what attention's output product wrote, of which the norm is computed again; what the activation reads
        normed = b * h * (way.reads("queries") + way.reads("widening"))
        return residual(shape, way) * h + attention + b * h + normed + b * wide * f + narrowing + 8
    activation = b * (2 * wide - 1) * f  # gate, its activation, up
    if way.full and b < 4:
        casts = b * (len(_of(shape, "queries")) + len(_of(shape, "widening"))) * h  # one for each linear, by autocast
        return 4 * 4 * h + casts + attention + activation + narrowing + 8
    normed = b * h * (way.reads("queries") + way.reads("widening")) + 4 * 2 * h  # each norm's input in fp32
    return normed + attention + activation + narrowing + 8


def _encoder(shape: Shape, way: Way) -> float:
    h, f, b = shape.hidden, shape.inner, way.b
    attention = b * 3 * h + b * h + 4 * shape.heads
    masks = 2 * h if shape.dropout else 0  # a byte each
    norms = 4 * 2 * h + (8 if way.compiled else 16)
    narrowing, widening, queries = (way.reads(role) for role in ("narrowing", "widening", "queries"))
    if way.full:
        casts = b * h * (1 if way.compiled else len(_of(shape, "queries")))
        return attention + casts + b * h + norms + masks + b * 2 * f
    # of the fp32 input: one for each linear, by autocast, of which a compiler makes one
    casts = b * h * (queries if way.compiled else sum(one.role == "queries" for one in way.adapted))
    return attention + casts + norms + masks + b * f + b * h * widening + b * f * narrowing


def _of(shape: Shape, role: str) -> list[Linear]:
    return [one for one in shape.linears if one.role == role]


@dataclass(frozen=True)
class Needed:
    """Bytes that a layer's backward takes. a_token: for each token, at its widest. beside_weight: for each token, at its widest while a
    4-bit weight is plain. once: whatever the tokens are."""

    a_token: float
    beside_weight: float
    once: float


def backward(shape: Shape, way: Way, again: bool) -> Needed:
    """What the backward of one layer needs besides what was kept: gradients of its widest part, and, where the layer is computed
    `again`, what it would have kept."""
    h, f, b = shape.hidden, shape.inner, way.b
    own = kept(shape, way)
    once = 4.0 * shape.of_layer if way.full else 0.0  # gradients of its weights, before they are added
    freed = b * f * way.reads("narrowing")  # gone when the widest part's turn comes
    wide = b * f * (3 if shape.gated else 2)  # gradients of the widest part's result and of the two (or the one) that it is made of
    if not way.compiled:
        # one operation at a time: the product of a plain weight is over when the widest part's turn comes
        grads = wide - freed
        if not shape.decoder and again:
            grads = max(grads, b * f - freed + 10 * h)  # in the forward: both norms' results, and dropout's
        product = b * f
        more = own.a_token if again else 0.0
        return Needed(more + grads, more + product, once + (own.once if again else 0.0))
    grads = wide + b * h
    if again:
        both = own.a_token - own.input + grads - freed
        return Needed(both, both, once + own.once)
    if not shape.decoder:
        grads = b * f  # written over the other
    return Needed(grads, grads, once)
