"""What a merge is measured by: the adapter on the base it was trained on, and a merged model, read the same rows.

At each position both give a distribution (over the next token, or over the classes); the certificate is how far these are apart.
The adapter's logits are kept in files, so that only one of the two models is in memory, and one batch's logits.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lorica.config import ConfigError
from lorica.data.asking import ask_answered_row, ask_text
from lorica.data.chat import parse_messages
from lorica.data.collate import collate_candidates, collate_classifier, inputs
from lorica.data.encoding import IGNORE, CausalEncoder, ClassifierEncoder, Encoded, Truncation, build_encoder
from lorica.data.examples import Example, Message
from lorica.data.readers import read_rows
from lorica.data.rows import BadRow
from lorica.models.causal_lm import CausalLM
from lorica.models.sequence_classifier import SequenceClassifier
from lorica.models.trained import Trained

POSITIONS = 64  # of a row that are compared: its last, the answer among them
BATCH = 16  # rows at once: 16 x 64 logits of 32,000 tokens are 0.13 GB
TURN = re.compile(r"^(system|user|assistant): ", re.MULTILINE)  # as predictions.jsonl writes conversations

# Where there is nothing else to read: everyday sentences of several kinds.
PROMPTS = (
    "The museum is free on the first Sunday of the month and closed on Mondays.",
    "I waited two hours and nobody answered the phone. Never again!",
    "Shares fell by three percent after the company lowered its forecast for the year.",
    "What should I do when my knee hurts after running?",
    "The home side won 3-1 with two goals in the last ten minutes.",
    "Please write a short letter that thanks a neighbour for looking after the garden.",
    "Researchers found water ice in a crater near the pole of the moon.",
    "The soup was cold, but the staff were kind and brought a new bowl at once.",
)


@dataclass(frozen=True)
class Sample:
    """Rows to compare on, and where they come from, in words. Examples without an answer have an empty completion and no label."""

    examples: list[Example]
    origin: str


@dataclass(frozen=True)
class Figures:
    """How one model did on the sample.

    kl: mean Kullback-Leibler divergence of a position from the adapter's distribution, in nats. agreement: share of the positions with
    the same most likely token or class; differing: the number of the others. largest: largest difference of a logit. loss: mean
    cross-entropy of an answer's token or of a label, perplexity: its exponential; accuracy: share of labels found. None: not measured.
    in_memory: of the adapter beside weights that it was to be merged into, not of a model that was written.
    """

    positions: int
    loss: float | None
    perplexity: float | None
    accuracy: float | None
    kl: float | None = None
    agreement: float | None = None
    differing: int | None = None
    largest: float | None = None
    in_memory: bool = False

    def broken(self, max_kl: float, min_agreement: float) -> str:
        """Which limit this merge breaks, in words; "" for none. One position that differs is always let through."""
        assert self.kl is not None and self.agreement is not None and self.differing is not None
        if not self.kl <= max_kl:
            return f"its mean KL divergence from the adapter is {self.kl:.2g} nats a position"
        if self.differing > 1 and self.agreement < min_agreement:
            return f"its most likely answer is the adapter's at {self.agreement:.2%} of the positions only"
        return ""

    def as_json(self) -> dict[str, float | None]:
        """For the report: what was measured."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "in_memory"}


# ---------------------------------------------------------------------------------------------------------------- sample


def sample(task: dict[str, Any], run: Path, file: str | None, rows: int) -> Sample:
    """At most so many rows: of a given file; else the run's own test rows; else the built-in prompts.

    Args:
        run: run folder or adapter folder. file: csv or jsonl, with the columns of the training data.
    Raises:
        ConfigError: no row of the file can be used.
    """
    if file is not None:
        path = Path(file).expanduser()
        found = [e for row in read_rows(path) if not row.fault and (e := _from_file(task, row.fields, row.origin)) is not None]
        if not found:
            raise ConfigError("sample", file, "has no row with a text", "a file with the columns of the training data")
        return Sample(_spread(found, rows), f"rows of {path.name}")
    for home in (run, run.parent if run.name == "adapter" else run):
        if (home / "predictions.jsonl").is_file() and task.get("kind") is not None:
            lines = (home / "predictions.jsonl").read_text("utf-8").splitlines()
            found = [e for line in lines if (e := _from_predictions(task, json.loads(line))) is not None]
            if found:
                return Sample(_spread(found, rows), "the run's own test rows")
    return Sample([ask_text(task, text, "built in") for text in PROMPTS][:rows], "built-in prompts, for the run's test rows are not there")


def _spread(examples: list[Example], rows: int) -> list[Example]:
    """So many of them, at equal distances: sets are often sorted."""
    return [examples[i * len(examples) // rows] for i in range(rows)] if len(examples) > rows else examples


def _from_file(task: dict[str, Any], fields: dict[str, Any], origin: str) -> Example | None:
    try:
        return ask_answered_row(task, fields, origin)
    except BadRow:
        return None


def _from_predictions(task: dict[str, Any], row: dict[str, Any]) -> Example | None:
    """A test row as the run read it; a conversation is told from its text, as well as that can be."""
    text, origin, answer = str(row.get("text") or ""), str(row.get("origin") or ""), str(row.get("reference") or "")
    if not text.strip():
        return None
    if task.get("kind") == "classification":
        names = task.get("labels") or []
        return dataclasses.replace(ask_text(task, text, origin), label=names.index(row["label"]) if row.get("label") in names else None)
    if task.get("kind") == "chat":
        parts = TURN.split(text)[1:]
        turns = [{"role": role, "content": content} for role, content in zip(parts[::2], parts[1::2], strict=True)]
        try:
            return Example(origin, messages=(*parse_messages(turns), Message("assistant", answer)))
        except BadRow:
            return None
    return Example(origin, prompt=text, completion=answer)


# --------------------------------------------------------------------------------------------------------------- measure


def encoded(encoder: ClassifierEncoder | CausalEncoder, example: Example) -> Encoded:
    """A row with its answer, or what the model reads before it answers."""
    if isinstance(encoder, CausalEncoder):
        answer = example.messages[-1].content if example.messages else example.completion
        if example.label is None and not answer:
            ids = encoder.prompt_ids(example)
            return Encoded(ids, [IGNORE] * len(ids))
    return encoder.encode([example], Truncation())[0]


class Reader:
    """A model's logits on rows of a sample."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.encoder = build_encoder(trained.task, trained.tokenizer)
        cls = SequenceClassifier if isinstance(self.encoder, ClassifierEncoder) else CausalLM
        self.forward = cls(trained.model.eval())
        self.pad_id = int(trained.tokenizer.pad_token_id)

    def logits(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """(logits fp32 [S, vocabulary or classes], what is right there, int64 [S], IGNORE where nothing is known), on the CPU."""
        if isinstance(self.forward, SequenceClassifier):
            with self.trained.arithmetic():
                out = self.forward.logits(self._here(collate_classifier(rows, self.pad_id, self.trained.padded)))
            return out.float().cpu(), torch.tensor([row.label if row.label >= 0 else IGNORE for row in rows])
        assert isinstance(self.forward, CausalLM)
        batch, starts = inputs([row.ids for row in rows], self.pad_id, self.trained.padded)
        spans = [(max(0, len(row.ids) - 1 - POSITIONS), max(1, len(row.ids) - 1)) for row in rows]
        places = torch.cat([start + torch.arange(*span) for start, span in zip(starts, spans, strict=True)])
        targets = torch.cat([torch.tensor([*row.labels[1:], IGNORE])[slice(*span)] for row, span in zip(rows, spans, strict=True)])
        with self.trained.arithmetic():
            out = self.forward.logits_at(self._here({**batch, "predict_at": places, "targets": targets}))
        return out.float().cpu(), targets

    def predicted(self, examples: Sequence[Example], logits: torch.Tensor) -> list[int]:
        """The numbers of the labels that `predict` would give."""
        if isinstance(self.encoder, ClassifierEncoder):
            return [int(k) for k in logits.argmax(-1)]
        batch = collate_candidates(self.encoder.candidates(examples), self.pad_id, self.trained.padded)
        with self.trained.arithmetic():
            return [int(k) for k in self.forward.evaluate(self._here(batch))["scores"].argmax(-1)]

    def _here(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.trained.model.device
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


@torch.inference_mode()
def measure(trained: Trained, rows: Sample, logits: Path, reference: bool, progress: Callable[[int, int], None]) -> Figures:
    """Read the sample: keep the logits (reference), or compare with those that were kept.

    Args:
        logits: the folder with a file for each batch of rows. progress: told (rows read, of how many).
    """
    labels: list[str] | None = trained.task.get("labels")
    reader = Reader(trained)
    losses: list[torch.Tensor] = []
    kl, largest, differing, positions, right, known = 0.0, 0.0, 0, 0, 0, 0
    for at in range(0, len(rows.examples), BATCH):
        examples = rows.examples[at : at + BATCH]
        values, targets = reader.logits([encoded(reader.encoder, e) for e in examples])
        positions += len(values)
        answered = targets != IGNORE
        losses.append(F.cross_entropy(values[answered], targets[answered], reduction="none"))
        if labels and any(e.label is not None for e in examples):
            pairs = [(e.label, k) for e, k in zip(examples, reader.predicted(examples, values), strict=True) if e.label is not None]
            known, right = known + len(pairs), right + sum(true == k for true, k in pairs)
        if reference:
            np.save(logits / f"{at}.npy", values.numpy())
        else:
            theirs = torch.from_numpy(np.load(logits / f"{at}.npy"))
            kl += divergence(theirs, values)
            differing += int((theirs.argmax(-1) != values.argmax(-1)).sum())
            largest = max(largest, float((theirs - values).abs().max()))
        progress(at + len(examples), len(rows.examples))
    every = torch.cat(losses)
    loss = float(every.mean()) if len(every) else None
    perplexity = float(np.exp(loss)) if loss is not None and not labels else None
    found = Figures(positions, loss, perplexity, right / known if known else None)
    if reference:
        return found
    return dataclasses.replace(found, kl=kl / positions, agreement=1 - differing / positions, differing=differing, largest=largest)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum over positions of KL(p || q), in nats, in double precision. p, q: logits [S, classes]."""
    total = 0.0
    for log_p, log_q in zip(p.split(POSITIONS), q.split(POSITIONS), strict=True):
        log_p, log_q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


def best(candidates: dict[str, Figures]) -> str:
    """The name of the candidate that is nearest to the adapter."""
    return min(candidates, key=lambda name: (_number(candidates[name].kl), name != "dequantised"))


def _number(value: float | None) -> float:
    return float("inf") if value is None or value != value else value


def table(names: Sequence[str], figures: Sequence[Figures]) -> list[list[str]]:
    """Rows of text: each candidate with its figures."""
    return [
        [name, _text(f.kl, ".1e"), _text(f.agreement, ".2%"), _text(f.largest, ".2g"), _text(f.loss, ".4f"), _text(f.accuracy, ".1%")]
        for name, f in zip(names, figures, strict=True)
    ]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
