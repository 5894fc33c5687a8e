"""Encoded rows to tensors: end to end with their boundaries where attention can take that, else padded.

Causal batches name the places to predict by index, so that the head is computed there and nowhere else, and the device never has
to be asked how many there are. Flat, two rows of 3 and 2 tokens:

    input_ids     [1, 5]   a b c d e
    position_ids  [1, 5]   0 1 2 0 1
    cu_seqlens    [3]      0 3 5        (int32)
    predict_at    [S]      positions in the flattened [B*T] whose next token is learnt
    targets       [S]      those tokens

`fill` makes flat batches of one size: fillers' tokens are read by nobody else, and their places count for nothing (IGNORE).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lorica.data.encoding import IGNORE, Candidates, Encoded
from lorica.data.shapes import Shape


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both int64 [B, T]: rows padded to the longest on one side; mask is 1 at real tokens."""
    longest = max(len(r) for r in rows)
    ids = np.full((len(rows), longest), value, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def flat(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rows end to end: input_ids and position_ids int64 [1, T], cu_seqlens int32 [B + 1], max_seqlen int."""
    lengths = np.array([len(r) for r in rows])
    ends = np.concatenate([[0], lengths.cumsum()])
    return {
        "input_ids": torch.from_numpy(_end_to_end(rows))[None],
        "position_ids": torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends[:-1], lengths))[None],
        "cu_seqlens": torch.from_numpy(ends.astype(np.int32)),
        "max_seqlen": int(lengths.max()),
    }


def _end_to_end(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [T]; of arrays by their bytes, which is five times as fast."""
    if all(isinstance(r, array) for r in rows):
        return np.frombuffer(b"".join(rows), np.intc).astype(np.int64)  # type: ignore[arg-type]  # arrays are buffers
    return np.concatenate([np.asarray(r, np.int64) for r in rows])


def fill(batch: dict[str, Any], shape: Shape, pad_id: int) -> dict[str, Any]:
    """A flat batch of training rows at exactly a shape's size: all its tensors have sizes that depend on the shape alone.

    The tokens that are missing become sequences of `pad_id`; those of `cu_seqlens`'s that are still missing are empty, at the end.
    """
    ends = batch["cu_seqlens"].numpy()
    missing = shape.tokens - int(ends[-1])
    full, rest = divmod(missing, shape.longest)
    fillers = np.array([shape.longest] * full + [rest] * bool(rest), np.int64)
    more = np.full(shape.sequences + 1 - len(ends), shape.tokens, np.int32)
    more[: len(fillers)] = ends[-1] + fillers.cumsum()
    places = np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in fillers)])
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.full((1, missing), pad_id)], 1)
    batch["position_ids"] = torch.cat([batch["position_ids"], torch.from_numpy(places)[None]], 1)
    batch["cu_seqlens"] = torch.from_numpy(np.concatenate([ends, more]))
    batch["max_seqlen"] = shape.longest
    for name, value in (("predict_at", 0), ("targets", IGNORE), ("labels", IGNORE)):
        if name in batch:
            batch[name] = torch.cat([batch[name], torch.full((shape.targets - len(batch[name]),), value)])
    if "teacher" in batch:
        batch["teacher"] = F.pad(batch["teacher"], (0, 0, 0, shape.targets - len(batch["teacher"])))
    return batch


def inputs(rows: Sequence[Sequence[int]], pad_id: int, padded: bool) -> tuple[dict[str, Any], list[int]]:
    """(model inputs, where each row begins in the flattened [B*T])."""
    if not padded:
        batch = flat(rows)
        return batch, batch["cu_seqlens"][:-1].tolist()
    ids, mask = pad(rows, pad_id)
    return {"input_ids": ids, "attention_mask": mask}, [i * ids.shape[1] for i in range(len(rows))]


def collate_causal(rows: Sequence[Encoded], pad_id: int, padded: bool) -> dict[str, Any]:
    """A causal micro-batch; see the module's drawing."""
    batch, starts = inputs([r.ids for r in rows], pad_id, padded)
    places, targets = [], []
    for row, start in zip(rows, starts, strict=True):
        following = np.asarray(row.labels)[1:]
        learnt = np.flatnonzero(following != IGNORE)
        places.append(start + learnt)
        targets.append(following[learnt])
    batch["predict_at"] = torch.from_numpy(np.concatenate(places))
    batch["targets"] = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    return batch


def collate_classifier(rows: Sequence[Encoded], pad_id: int, padded: bool = True, left: bool = False) -> dict[str, Any]:
    """Flat or padded inputs (see the module's drawing; left: padded on the left), and labels int64 [B]."""
    if padded:
        ids, mask = pad([r.ids for r in rows], pad_id, left)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    else:
        batch = flat([r.ids for r in rows])
    batch["labels"] = torch.tensor([r.label for r in rows])
    return batch


def collate_candidates(rows: Sequence[Candidates], pad_id: int, padded: bool) -> dict[str, Any]:
    """Labelled texts to score by a causal model.

    predict_at, targets int64 [P]: places and tokens to read. slot int64 [P]: example * labels + label that each is added to.
    labels, true_label_tokens int64 [B]: the true label and its number of tokens. classes: how many labels there are.
    """
    batch, starts = inputs([s for r in rows for s in r.sequences], pad_id, padded)
    k = len(rows[0].picks)
    places, targets, slots, first = [], [], [], 0
    for i, row in enumerate(rows):
        for label, picks in enumerate(row.picks):
            for sequence, position, token in picks:
                places.append(starts[first + sequence] + position)
                targets.append(token)
                slots.append(i * k + label)
        first += len(row.sequences)
    batch |= {"predict_at": torch.tensor(places), "targets": torch.tensor(targets), "slot": torch.tensor(slots)}
    batch["labels"], batch["classes"] = torch.tensor([r.label for r in rows]), k
    batch["true_label_tokens"] = torch.tensor([len(r.picks[r.label]) if r.label >= 0 else 0 for r in rows])
    return batch
