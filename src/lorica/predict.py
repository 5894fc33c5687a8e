"""`lorica predict`: one text, or a csv or jsonl file of them, answered by a run, an adapter or a merged model."""

from __future__ import annotations

import csv
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.config import ConfigError, PredictConfig
from lorica.durable import write_text
from lorica.screen import Screen, quiet_libraries

BATCH = 32  # texts at once
ELEMENTS = 1 << 26  # of the hidden states of texts at once on a GPU, where labels are scored: 16,384 tokens of Mistral-7B
LETTERS = 4  # to a token, about
ADDED = ("prediction", "probability", "probabilities", "error")  # what an answered row has besides its own

quiet_libraries()

import numpy as np  # noqa: E402  (after the libraries' noise is off)
import torch  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from lorica import hardware  # noqa: E402
from lorica.config import OptimizerConfig, TrainerConfig  # noqa: E402
from lorica.data.asking import ask_row, ask_text, text_column  # noqa: E402
from lorica.data.batching import cut_batches  # noqa: E402
from lorica.data.collate import collate_candidates, collate_classifier  # noqa: E402
from lorica.data.encoding import ClassifierEncoder, Truncation, build_encoder  # noqa: E402
from lorica.data.examples import Example  # noqa: E402
from lorica.data.module import BadRow  # noqa: E402
from lorica.data.readers import Row, read_rows  # noqa: E402
from lorica.models.causal_lm import CausalLMModule  # noqa: E402
from lorica.models.sequence_classifier import SequenceClassifierModule  # noqa: E402
from lorica.models.trained import Trained, load_trained  # noqa: E402


@dataclass(frozen=True)
class Answer:
    """A label with its probability and all of them, or a text."""

    prediction: str
    probabilities: dict[str, float] | None = None

    @property
    def probability(self) -> float | None:
        """Of the predicted label."""
        return self.probabilities[self.prediction] if self.probabilities else None


def run(config: PredictConfig) -> int:
    """Answer, print or write. Returns 0, or 1 when rows of the input could not be answered (they say why).

    Raises:
        ConfigError: no weights, no text column, columns with the names of ours, a base that can't be had.
    """
    screen = Screen()
    machine = hardware.choose(TrainerConfig(accelerator=config.accelerator, devices=1))
    rows = list(read_rows(Path(config.input).expanduser())) if config.input is not None else []
    for name in ADDED:
        if any(name in row.fields for row in rows):
            raise ConfigError("input", config.input, f"has a column {name}, which the answers would be written over", "rename that column")
    predictor = Predictor(load_trained(Path(config.run).expanduser(), machine.device, config.base), config.max_new_tokens)
    if config.text is not None:
        answer = predictor.answer([ask_text(predictor.task, config.text)], config.batch_size)[0]
        print(_line(answer))
        return 0
    assert config.input is not None
    return _answer_file(config, screen, predictor, rows)


def _line(answer: Answer) -> str:
    if answer.probabilities is None:
        return answer.prediction
    others = ", ".join(f"{name} {p:.3f}" for name, p in sorted(answer.probabilities.items(), key=lambda x: -x[1]))
    return f"{answer.prediction}  ({others})"


class Predictor:
    """Answers examples with one trained model."""

    def __init__(self, trained: Trained, max_new_tokens: int | None = None) -> None:
        """max_new_tokens: of a written answer; None: as many as in training."""
        self.trained, self.task = trained, trained.task
        self.max_new_tokens = max_new_tokens or int(self.task.get("max_new_tokens") or 256)
        self.labels: list[str] | None = self.task.get("labels")
        self.encoder = build_encoder(self.task, trained.tokenizer)
        cls = SequenceClassifierModule if isinstance(self.encoder, ClassifierEncoder) else CausalLMModule
        self.module = cls(trained.model, OptimizerConfig(), 1).eval()
        self.pad_id = int(trained.tokenizer.pad_token_id)
        self._tokens = ELEMENTS // trained.model.config.get_text_config().hidden_size

    def warm_up(self, examples: Sequence[Example], batch_size: int | None) -> None:
        """Score about a batch of the examples on a GPU, for what a first forward loads and allocates."""
        if self.labels and self.trained.model.device.type == "cuda":
            letters = itertools.accumulate(len(e.text or e.prompt) for e in examples)
            self.answer([e for e, n in zip(examples, letters, strict=True) if n < self._tokens * LETTERS], batch_size)

    @torch.inference_mode()
    def answer(
        self, examples: Sequence[Example], batch_size: int | None = None, done: Callable[[int], None] = lambda n: None
    ) -> list[Answer]:
        """Answers in the order of the examples; batches are made by length.

        Args:
            batch_size: None: BATCH, or by ELEMENTS where labels are scored on a GPU. done: called with the size of each batch on its way.
        """
        padded = self.trained.padded
        if isinstance(self.encoder, ClassifierEncoder):
            encoded: Sequence[Any] = self.encoder.encode(examples, Truncation())
            lengths = [len(e.ids) for e in encoded]
            return self._scored(encoded, lengths, batch_size, done, lambda rows: collate_classifier(rows, self.pad_id, padded))
        if self.labels:
            encoded = self.encoder.candidates(examples)
            lengths = [sum(map(len, c.sequences)) for c in encoded]
            return self._scored(encoded, lengths, batch_size, done, lambda rows: collate_candidates(rows, self.pad_id, padded))
        return self._written([self.encoder.prompt_ids(e) for e in examples], batch_size or BATCH, done)

    def _scored(
        self,
        items: Sequence[Any],
        lengths: Sequence[int],
        batch_size: int | None,
        done: Callable[[int], None],
        collate: Callable[[list[Any]], dict[str, Any]],
    ) -> list[Answer]:
        """Labels with their probabilities. The scores stay on the device until all are there, so that it is never waited for."""
        assert self.labels is not None
        if not items:
            return []
        device = self.trained.model.device
        by_tokens = batch_size is None and device.type == "cuda"
        sizes = np.asarray(lengths)
        order = [int(i) for i in np.argsort(-sizes, kind="stable")]
        batches = cut_batches(sizes, order, None if by_tokens else batch_size or BATCH, self._tokens, self.trained.padded)
        scores, waiting = [], batches[::-1]
        while waiting:
            group = waiting.pop()
            try:
                scores.append(self._scores(collate([items[i] for i in group])))
            except torch.cuda.OutOfMemoryError:
                if len(group) == 1:
                    raise
                waiting += [group[len(group) // 2 :], group[: len(group) // 2]]
                continue
            done(len(group))
        place = np.empty(len(items), np.int64)
        place[order] = np.arange(len(items))
        rows = torch.cat(scores).float().exp().cpu()[torch.from_numpy(place)]
        best = rows.argmax(1).tolist()
        return [Answer(self.labels[k], dict(zip(self.labels, row, strict=True))) for k, row in zip(best, rows.tolist(), strict=True)]

    def _scores(self, batch: dict[str, Any]) -> torch.Tensor:
        device = self.trained.model.device
        if device.type == "cuda":
            batch = {k: v.pin_memory().to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with self._autocast():
            scores: torch.Tensor = self.module.evaluate(batch)["scores"]
        return scores

    def _written(self, prompts: list[list[int]], batch_size: int, done: Callable[[int], None]) -> list[Answer]:
        """Texts, the longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers: dict[int, Answer] = {}
        for at in range(0, len(order), batch_size):
            group = order[at : at + batch_size]
            answers |= dict(zip(group, self._write([prompts[i] for i in group]), strict=True))
            done(len(group))
        return [answers[i] for i in range(len(prompts))]

    def _autocast(self) -> Any:
        device = self.trained.model.device
        dtype = self.trained.model.dtype
        return torch.autocast(
            device.type, dtype if dtype != torch.float32 else torch.bfloat16, enabled=device.type == "cuda" and dtype != torch.float32
        )

    def _write(self, prompts: list[list[int]]) -> list[Answer]:
        assert isinstance(self.module, CausalLMModule)
        with self._autocast():
            generated = self.module.generate(prompts, self.pad_id, self.max_new_tokens)
        return [Answer(self.trained.tokenizer.decode(ids, skip_special_tokens=True).strip()) for ids in generated]


def _answer_file(config: PredictConfig, screen: Screen, predictor: Predictor, rows: list[Row]) -> int:
    assert config.input is not None
    source = Path(config.input).expanduser()
    target = Path(config.output).expanduser() if config.output else source.with_name(f"{source.stem}.scored{source.suffix}")
    if not target.parent.is_dir():
        raise ConfigError("output", target, "its folder does not exist", f"mkdir -p {target.parent}")
    sound = next((r for r in rows if not r.fault), None)
    column = config.text_column or (text_column(predictor.task, sound.fields) if sound else None)
    if sound is not None and column not in sound.fields and predictor.task.get("kind") not in ("chat", "instruction"):
        raise ConfigError(
            "text_column",
            column,
            f"{source.name} has no such column; it has {', '.join(sound.fields)}",
            f"text_column={next(iter(sound.fields))}",
        )
    examples: dict[int, Example] = {}
    faults: dict[int, str] = {}
    for i, row in enumerate(rows):
        try:
            if row.fault:
                raise BadRow(row.fault)
            examples[i] = ask_row(predictor.task, row.fields, config.text_column, row.origin)
        except BadRow as e:
            faults[i] = str(e)
    predictor.warm_up(list(examples.values()), config.batch_size)
    begun = time.perf_counter()
    columns = (TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen.console, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=len(examples))
        found = predictor.answer(list(examples.values()), config.batch_size, lambda n: bar.advance(task, n))
    answers = dict(zip(examples, found, strict=True))
    write_text(target, "".join(_output(target.suffix.lower(), rows, answers, faults)))
    seconds = time.perf_counter() - begun
    screen.print(f"{len(answers):,} rows answered in {seconds:.1f} s ({len(answers) / max(seconds, 1e-9):,.0f} rows/s): {target}")
    for i in list(faults)[:3]:
        screen.note(f"{rows[i].origin} {faults[i]}: no prediction")
    if len(faults) > 3:
        screen.note(f"and {len(faults) - 3:,} more; their rows say why in the column error")
    return 1 if faults else 0


def _output(ending: str, rows: list[Row], answers: dict[int, Answer], faults: dict[int, str]) -> Iterator[str]:
    """The input's rows in their order with prediction, probability and, for rows that could not be answered, error."""
    scored = any(a.probabilities for a in answers.values())
    if ending == ".jsonl":
        for i, row in enumerate(rows):
            record = dict(row.fields)
            if i in answers:
                record["prediction"] = answers[i].prediction
                if scored:
                    record |= {"probability": answers[i].probability, "probabilities": answers[i].probabilities}
            else:
                record |= {"prediction": None, "error": faults[i]}
            yield json.dumps(record, ensure_ascii=True, default=str) + "\n"
        return
    import io

    names = list(dict.fromkeys(name for row in rows for name in row.fields))
    added = ["prediction", *(["probability"] if scored else []), *(["error"] if faults else [])]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, *added])
    for i, row in enumerate(rows):
        answer = answers.get(i)
        cells = [row.fields.get(name, "") for name in names]
        cells.append(answer.prediction if answer else "")
        if scored:
            cells.append(f"{answer.probability:.6f}" if answer is not None and answer.probability is not None else "")
        if faults:
            cells.append(faults.get(i, ""))
        writer.writerow([json.dumps(v) if isinstance(v, (dict, list)) else v for v in cells])
    yield buffer.getvalue().encode("utf-8", "replace").decode("utf-8")
