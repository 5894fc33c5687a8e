"""Examples to token ids: what a model reads and which of its tokens are learnt.

A causal model learns completions only; `labels` is IGNORE elsewhere:

    tokens   <s> Is this text ...? Sentiment:  positive </s>
    labels    -  -  -    -          -          positive </s>

Too long an example keeps its eos and at least half of the length for its answer; what was cut is counted in `Truncation`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from lorica.config import ConfigError
from lorica.data import templates
from lorica.data.examples import Example, Message

IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index
MARK = (0, 0)  # the characters of what a tokenizer puts around a text
CHUNK = 1000  # examples tokenised by one call

Progress = Callable[[int], None]  # told how many more examples are encoded
R = TypeVar("R")


def silent(more: int) -> None:
    """The Progress that shows nothing."""


class Encoded:
    """One training row, 4 bytes a token.

    Attributes:
        ids: what the model reads. labels: the token to predict at each place, or IGNORE; empty for classifiers. label: the class, else -1.
        supervised: tokens learnt (the first token is never predicted); 1 for a labelled text.
    """

    __slots__ = ("ids", "label", "labels", "supervised")

    def __init__(self, ids: Sequence[int], labels: Sequence[int] = (), label: int = -1) -> None:
        self.ids, self.labels, self.label = array("i", ids), array("i", labels), label
        self.supervised = int(np.count_nonzero(np.frombuffer(self.labels, np.intc)[1:] != IGNORE)) if self.labels else 1


@dataclass(slots=True)
class Candidates:
    """One labelled text for a causal model to score: log p(label k) is the sum of the log-probabilities of `picks[k]`.

    sequences: the fewest token sequences that between them contain every label but its last token: one, when labels differ in
        their first token and are one token long.
    picks: for each label, (sequence, position, token): the token's log-probability is read at that position's output.
    """

    sequences: list[list[int]]
    picks: list[list[tuple[int, int, int]]]
    label: int


@dataclass
class Truncation:
    """What was cut to fit `max_length`, in rows: `rows` of any kind; a row's prompt and answer may both be shortened."""

    prompts: int = 0
    completions: int = 0
    turns: int = 0
    texts: int = 0
    tokens_cut: int = 0
    rows: int = 0

    def add(self, other: Truncation) -> None:
        """Count what another counted, too."""
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def count_prompt(self, tokens: int) -> None:
        """A row whose prompt has so many tokens too many; 0 and less are none."""
        if tokens > 0:
            self.rows += 1
            self.prompts += 1
            self.tokens_cut += tokens

    def __str__(self) -> str:
        parts = [
            f"{n:,} {what}"
            for n, what in ((self.texts, "texts"), (self.prompts, "prompts"), (self.completions, "answers"), (self.turns, "conversations"))
            if n
        ]
        return f"{', '.join(parts)} shortened ({self.tokens_cut:,} tokens)" if parts else "nothing shortened"


class ClassifierEncoder:
    """Texts for a sequence classifier."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def encode(self, examples: Sequence[Example], truncation: Truncation, progress: Progress = silent) -> list[Encoded]:
        """Token ids with the tokenizer's own special tokens, cut at the end of the text to max_length."""
        return _all(self.pieces(examples, truncation), progress)

    def pieces(self, examples: Sequence[Example], truncation: Truncation) -> Iterator[list[Encoded]]:
        """`encode`, CHUNK examples at a time."""
        for chunk, encodings in _one_ahead(self._tokenize, examples):
            rows = []
            for example, encoding in zip(chunk, encodings, strict=True):
                if overflow := encoding.overflowing:
                    truncation.rows += 1
                    truncation.texts += 1
                    truncation.tokens_cut += sum(len(o.ids) - sum(o.special_tokens_mask) for o in overflow)
                rows.append(Encoded(encoding.ids, label=-1 if example.label is None else example.label))
            yield rows

    def _tokenize(self, chunk: Sequence[Example]) -> tuple[Sequence[Example], list[Any]]:
        """The backend is asked itself: nobody needs to know which characters a token is of, which takes a fifth of its time."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.enable_truncation(self.max_length, direction=self.tokenizer.truncation_side)
        return chunk, backend.encode_batch_fast([e.text for e in chunk])


def _all(pieces: Iterator[list[R]], progress: Progress = silent) -> list[R]:
    """The rows of all pieces."""
    rows: list[R] = []
    for piece in pieces:
        rows += piece
        progress(len(piece))
    return rows


def _one_ahead(work: Callable[[Sequence[Example]], R], examples: Sequence[Example]) -> Iterator[R]:
    """`work` on every chunk, in order; the next one's is done meanwhile, for the tokenizer lets other Python run."""
    chunks = [examples[i : i + CHUNK] for i in range(0, len(examples), CHUNK)]
    if len(chunks) < 2:
        yield from map(work, chunks)
        return
    with ThreadPoolExecutor(1, "tokenize") as thread:
        coming = thread.submit(work, chunks[0])
        for chunk in chunks[1:]:
            done, coming = coming, thread.submit(work, chunk)
            yield done.result()
        yield coming.result()


@dataclass(slots=True)
class _Rendered:
    """Text with the stretches that are learnt, in characters."""

    text: str
    spans: list[tuple[int, int]]


class CausalEncoder:
    """Prompts, answers and conversations for a causal model.

    Args:
        use_chat_template: write turns with the tokenizer's own template where it has one.
        label_names: how a labelled set's classes are spelt in the answer.
    """

    def __init__(self, tokenizer: Any, max_length: int, use_chat_template: bool = True, label_names: Sequence[str] = ()) -> None:
        self.tokenizer, self.max_length, self.label_names = tokenizer, max_length, list(label_names)
        self.chat = bool(use_chat_template and getattr(tokenizer, "chat_template", None))
        if self.chat:
            templates.check(tokenizer)
        if tokenizer.eos_token_id is None:
            raise ConfigError("model.base", tokenizer.name_or_path, "its tokenizer has no end-of-sequence token")
        self.eos: int = tokenizer.eos_token_id

    # ------------------------------------------------------------------------------------------------------ rendering

    def turns(self, example: Example) -> list[Message]:
        """An example as a conversation that ends with the assistant."""
        if example.messages:
            return list(example.messages)
        answer = example.completion if example.label is None else self.label_names[example.label]
        return [Message("user", example.prompt), Message("assistant", answer)]

    def _template(self, turns: Sequence[Message], generate: bool) -> str:
        messages = [{"role": m.role, "content": m.content} for m in turns]
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except Exception as e:  # jinja2's TemplateError: the template itself refuses the roles
            raise ConfigError(
                "model.use_chat_template", True, f"the tokenizer's template refuses this conversation: {e}", "model.use_chat_template=false"
            ) from None
        return text

    def _templates(self, conversations: Sequence[Sequence[Message]], generate: bool) -> list[str]:
        """`_template` of each, by one call."""
        if all(conversations):  # an empty one is refused by itself only
            messages = [[{"role": m.role, "content": m.content} for m in turns] for turns in conversations]
            try:
                texts: list[str] = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            except Exception:  # one by one, to say which and why
                pass
            else:
                return texts
        return [self._template(turns, generate) for turns in conversations]

    def _render(self, examples: Sequence[Example]) -> list[_Rendered]:
        """The whole conversations, with what the assistant says (its end mark included) as spans."""
        return self._render_turns([self.turns(e) for e in examples], [not e.messages for e in examples])

    def _render_turns(self, conversations: Sequence[Sequence[Message]], bare: Sequence[bool]) -> list[_Rendered]:
        """As `_render`.

        Args:
            bare: a prompt and its answer, which without a template are written one after the other, with no names of speakers.
        """
        if not self.chat:
            return [self._render_plain(turns, alone) for turns, alone in zip(conversations, bare, strict=True)]
        answers = [(c, i) for c, turns in enumerate(conversations) for i, turn in enumerate(turns) if turn.role == "assistant"]
        texts = self._templates(conversations, generate=False)
        before = self._templates([conversations[c][:i] for c, i in answers], generate=True)
        inner = [(c, i) for c, i in answers if i + 1 < len(conversations[c])]
        upto = dict(zip(inner, self._templates([conversations[c][: i + 1] for c, i in inner], generate=False), strict=True))
        spans: list[list[tuple[int, int]]] = [[] for _ in conversations]
        for (c, i), start in zip(answers, before, strict=True):
            text, end = texts[c], upto.get((c, i), texts[c])
            if not text.startswith(start):
                start = self._template(conversations[c][:i], generate=False)
            if not (text.startswith(start) and text.startswith(end)):
                raise ConfigError(
                    "model.use_chat_template",
                    True,
                    "the tokenizer's template rewrites earlier turns, so that answers can't be told apart",
                    "model.use_chat_template=false",
                )
            spans[c].append((len(start), len(end.rstrip())))
        return [_Rendered(*parts) for parts in zip(texts, spans, strict=True)]

    def _render_plain(self, turns: Sequence[Message], bare: bool) -> _Rendered:
        if bare:
            prompt = turns[0].content.rstrip(" ")
            gap = "" if prompt[-1:].isspace() or not prompt else " "
            return _Rendered(prompt + gap + turns[1].content, [(len(prompt), len(prompt) + len(gap) + len(turns[1].content))])
        text, spans = "", []
        names = {"system": "System", "user": "User", "assistant": "Assistant"}
        eos = self.tokenizer.eos_token
        for turn in turns:
            text += f"{names[turn.role]}:"
            end = eos if turn.role == "assistant" else "\n"
            if turn.role == "assistant":
                spans.append((len(text), len(text) + 1 + len(turn.content) + len(eos)))
            text += f" {turn.content}{end}" + ("\n" if turn.role == "assistant" else "")
        return _Rendered(text.rstrip("\n"), spans)

    # ------------------------------------------------------------------------------------------------------- encoding

    def _tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[Any]]:
        """(token ids, `tokenizers.Encoding`) of every text. Offsets are asked of the Encoding, one by one: lists of them are slow."""
        batch = self.tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, add_special_tokens=not self.chat)
        ids: list[list[int]] = batch["input_ids"]
        encodings: list[Any] = batch.encodings
        if not self.chat:
            # Some tokenizers end every text with eos; ours is added where an answer ends.
            for row, encoding in zip(ids, encodings, strict=True):
                if row and row[-1] == self.eos and _is_mark(encoding, len(row) - 1):
                    del row[-1]
        return ids, encodings

    def _prepare(self, chunk: Sequence[Example]) -> tuple[list[_Rendered], list[list[int]], list[Any]]:
        rendered = self._render(chunk)
        return rendered, *self._tokenize([r.text for r in rendered])

    def encode(self, examples: Sequence[Example], truncation: Truncation, progress: Progress = silent) -> list[Encoded]:
        """Training rows; every one ends with eos, which is learnt (or, where whole turns were cut, with its template's own end mark)."""
        prepared = _one_ahead(self._prepare, examples)
        return _all(([self._row(*parts, truncation) for parts in zip(*whole, strict=True)] for whole in prepared), progress)

    def _row(self, rendered: _Rendered, tokens: list[int], encoding: Any, truncation: Truncation) -> Encoded:
        ids = array("i", tokens)
        labels = array("i", (IGNORE,)) * len(ids)
        answers: list[tuple[int, int]] = []  # token ranges of the assistant's turns
        for start, end in rendered.spans:
            first, last = _tokens_of(rendered.text, encoding, len(ids), start, end)
            if first < last:
                answers.append((first, last))
                labels[first:last] = ids[first:last]
        eos = self.eos
        if answers:
            last = answers[-1][1]
            del ids[last:], labels[last:]  # nothing after the last answer can be learnt from
            if ids[-1] != eos:
                ids.append(eos)
                labels.append(eos)
                answers[-1] = (answers[-1][0], last + 1)
        if len(ids) > self.max_length:
            ids, labels = self._shorten(ids, labels, answers, truncation)
        return Encoded(ids, labels)

    def _shorten(
        self, ids: array[int], labels: array[int], answers: list[tuple[int, int]], truncation: Truncation
    ) -> tuple[array[int], array[int]]:
        """Whole turns first; else the middle of the prompt and the end of the answer, which keeps half of the length and its eos."""
        limit, eos = self.max_length, self.eos
        truncation.rows += 1
        fitting = [end for _, end in answers if end <= limit]
        if fitting:
            truncation.turns += 1
            end = fitting[-1]
            truncation.tokens_cut += len(ids) - end
            return ids[:end], labels[:end]
        start, end = answers[0] if answers else (len(ids), len(ids))
        answer, prompt = end - start, start
        keep_answer = min(answer, max(limit - prompt, limit // 2))
        keep_prompt = limit - keep_answer
        truncation.tokens_cut += len(ids) - limit
        truncation.prompts += keep_prompt < prompt
        truncation.completions += keep_answer < answer
        head, tail = (keep_prompt - keep_prompt // 2, keep_prompt // 2) if keep_prompt < prompt else (prompt, 0)
        ids, labels = (row[:head] + row[prompt - tail : prompt] + row[start : start + keep_answer] for row in (ids, labels))
        if keep_answer:
            ids[-1] = labels[-1] = eos
        return ids, labels

    def prompt_ids(self, example: Example, truncation: Truncation | None = None) -> list[int]:
        """What the model reads before it writes: everything up to its last turn, the middle cut out where it is too long.

        Args:
            truncation: counts it where it is.
        """
        ids = self._tokenize([self.prompt_text(example)[0]])[0][0]
        if truncation is not None:
            truncation.count_prompt(len(ids) - self.max_length)
        return self._middle_cut(ids, self.max_length)

    def prompt_text(self, example: Example) -> tuple[str, bool]:
        """(that as text, whether the tokenizer's special tokens are put around it: a chat template has its own)."""
        turns = self.turns(example)[:-1]
        if self.chat:
            text = self._template(turns, generate=True)
        elif not example.messages:
            text = turns[0].content.rstrip(" ")
        else:
            text = self._render_plain([*turns, Message("assistant", "")], bare=False).text.removesuffix(f" {self.tokenizer.eos_token}")
        return text, not self.chat

    @staticmethod
    def _middle_cut(ids: list[int], limit: int) -> list[int]:
        return ids if len(ids) <= limit else ids[: limit - limit // 2] + ids[len(ids) - limit // 2 :]

    def candidates(
        self, examples: Sequence[Example], progress: Progress = silent, truncation: Truncation | None = None
    ) -> list[Candidates]:
        """Every label of a labelled set as the answer to each example.

        Args:
            truncation: counts prompts that are cut.
        """
        scored: list[Candidates] = []
        k, eos = len(self.label_names), self.eos
        for chunk, rendered, ids, encodings in _one_ahead(self._prepare_candidates, examples):
            for i, example in enumerate(chunk):
                group = [self._candidate(rendered[j], ids[j], encodings[j], self.label_names[j % k]) for j in range(i * k, i * k + k)]
                longest = max(len(ids) - start for ids, start in group)  # all labels follow the same prompt, however long they are
                if truncation is not None:
                    truncation.count_prompt(max(start for _, start in group) - self.max_length + longest)
                group = [self._fit(ids, start, self.max_length - longest) for ids, start in group]
                scored.append(_fewest_sequences(group, -1 if example.label is None else example.label, eos))
            progress(len(chunk))
        return scored

    def _prepare_candidates(self, chunk: Sequence[Example]) -> tuple[Sequence[Example], list[_Rendered], list[list[int]], list[Any]]:
        conversations = [[Message("user", e.prompt), Message("assistant", name)] for e in chunk for name in self.label_names]
        rendered = self._render_turns(conversations, [True] * len(conversations))
        return chunk, rendered, *self._tokenize([r.text for r in rendered])

    def _candidate(self, rendered: _Rendered, ids: list[int], encoding: Any, name: str) -> tuple[list[int], int]:
        """(prompt + label tokens, where the label begins)."""
        start = rendered.spans[-1][0]
        end = rendered.text.index(name, start) + len(name)
        inside = []
        for t in range(_ended(encoding, len(ids), start), len(ids)):
            a, b = _span(encoding, t)
            if a >= end:
                break
            if b > a and a >= start - _lead(rendered.text, a, b, start):
                inside.append(t)
        first, last = inside[0], inside[-1] + 1
        return ids[:last], first

    def _fit(self, ids: list[int], start: int, limit: int) -> tuple[list[int], int]:
        """A candidate whose prompt (its first `start` tokens) is cut to `limit` tokens."""
        prompt = self._middle_cut(ids[:start], max(1, limit))
        return prompt + ids[start:], len(prompt)


def _span(encoding: Any, token: int) -> tuple[int, int]:
    """A token's characters."""
    span: tuple[int, int] = encoding.token_to_chars(token) or MARK
    return span


def _is_mark(encoding: Any, token: int) -> bool:
    """Whether a token has no text of its own."""
    start, end = _span(encoding, token)
    return start == end


def _ended(encoding: Any, length: int, place: int) -> int:
    """How many of the first `length` tokens end at or before a character, marks at the end not counted."""
    span = encoding.token_to_chars
    while length:
        start, end = span(length - 1) or MARK
        if start < end:  # a mark's place would mislead the search
            break
        length -= 1
    if not length or end <= place:
        return length
    return bisect_right(range(length), place, key=lambda token: (span(token) or MARK)[1])


def _tokens_of(text: str, encoding: Any, length: int, start: int, end: int) -> tuple[int, int]:
    """Which of the first `length` tokens, as a range, lie within characters [start, end); white space before `start` may be part of
    the first."""
    first, last = _ended(encoding, length, start), _ended(encoding, length, end)
    while first < last:
        a, b = _span(encoding, first)
        if a >= start - _lead(text, a, b, start):
            break
        first += 1
    while first < last and _is_mark(encoding, last - 1):
        last -= 1
    return first, last


def _lead(text: str, a: int, b: int, start: int) -> int:
    """How far before `start` a token may begin and still count as the answer's: the white space that it swallowed."""
    return start - a if a < start < b and text[a:start].isspace() else 0


def _fewest_sequences(group: list[tuple[list[int], int]], label: int, eos: int) -> Candidates:
    """Merge the labels' sequences: those that are the beginning of another share its forward pass."""
    names = [tuple(ids[start:]) for ids, start in group]
    if any(a != b and b[: len(a)] == a for a in names for b in names):  # one label begins another: their ends must be told apart
        group = [([*ids, eos], start) for ids, start in group]
    inputs = sorted({tuple(ids[:-1]) for ids, _ in group}, key=len, reverse=True)
    kept: list[tuple[int, ...]] = []
    for one in inputs:
        if not any(longer[: len(one)] == one for longer in kept):
            kept.append(one)
    picks = []
    for ids, start in group:
        home = next(i for i, longer in enumerate(kept) if longer[: len(ids) - 1] == tuple(ids[:-1]))
        picks.append([(home, t - 1, ids[t]) for t in range(start, len(ids))])
    return Candidates([list(s) for s in kept], picks, label)


def build_encoder(task: dict[str, Any], tokenizer: Any) -> ClassifierEncoder | CausalEncoder:
    """The encoder that a model is trained and asked with.

    Args:
        task: as in lorica.json; what others made may lack a length (512) or say nothing of a template (it is used).
    """
    longest = int(task.get("max_length") or 512)
    if task["task"] == "sequence_classification":
        return ClassifierEncoder(tokenizer, longest)
    return CausalEncoder(tokenizer, longest, bool(task.get("use_chat_template", True)), task.get("labels") or ())
