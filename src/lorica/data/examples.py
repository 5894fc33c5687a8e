"""The task-neutral example, and splits made by content so that no duplicate crosses them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorica.config import ConfigError, DataConfig

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row, before it is known which model will read it.

    A labelled text has `text` and `label` (its number), and `prompt`, the question a causal model is asked about it. An
    instruction has `prompt` and `completion`. A conversation has `messages`, ending with the assistant.

    `origin` is file:line, for messages to the user.
    """

    origin: str
    text: str = ""
    label: int | None = None
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()

    @property
    def content(self) -> str:
        """What makes two examples the same question: the text, the prompt, or the whole conversation; case and spacing aside."""
        raw = self.text or self.prompt or "\n".join(m.content for m in self.messages)
        return " ".join(raw.casefold().split())


@dataclass
class Splits:
    """Examples by split, and what was done to get there."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    dropped_as_duplicates: dict[str, int] = field(default_factory=dict)  # split -> rows that also stood in a held-out split
    sources: dict[str, str] = field(default_factory=dict)  # split -> where its rows come from

    def __getitem__(self, split: str) -> list[Example]:
        assert split in SPLITS
        examples: list[Example] = getattr(self, split)
        return examples


def _order(content: str, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}|{content}".encode("utf-8", "surrogatepass")).digest()


def sample(examples: Sequence[Example], count: int | None, salt: str) -> list[Example]:
    """The `count` examples that come first in a salted hash order of their content, in their own order; all where count is None.

    A sample of 100 is part of the sample of 200 with the same salt.
    """
    if count is None or count >= len(examples):
        return list(examples)
    ranked = sorted(range(len(examples)), key=lambda i: (_order(examples[i].content, salt), i))
    return [examples[i] for i in sorted(ranked[:count])]


def hold_out(examples: Sequence[Example], fraction: float, salt: str) -> tuple[list[Example], list[Example]]:
    """(kept, held out): whole groups of equal content, in salted hash order, until `fraction` of the rows is held out."""
    wanted = round(len(examples) * fraction)
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.content, []).append(i)
    held: set[int] = set()
    for content in sorted(groups, key=lambda c: _order(c, salt)):
        if len(held) >= wanted:
            break
        held.update(groups[content])
    return [e for i, e in enumerate(examples) if i not in held], [examples[i] for i in sorted(held)]


def split_examples(given: dict[str, list[Example]], config: DataConfig, seed: int) -> Splits:
    """Train, validation and test from whatever splits the source has.

    Missing splits are cut from training (validation from test where `data.validation_from=test`), by content and by a fixed
    salt: the same rows are held out whatever the seed. Rows of training that also stand in a held-out split are dropped from
    training, rows of validation that stand in test from validation. `seed` chooses `data.max_train_examples` only.

    Raises:
        ConfigError: when nothing is left to train on.
    """
    sources = dict.fromkeys(given, "given")
    train, validation, test = (list(given.get(split, [])) for split in SPLITS)
    if config.max_examples is not None:
        train = sample(train, config.max_examples, "rows")
    if "test" not in given:
        train, test = hold_out(train, config.test_fraction, "test")
        sources["test"] = f"{config.test_fraction:.0%} of train"
    if "validation" not in given:
        # The share is of all rows, also when the test part was cut off first.
        if config.validation_from == "test":
            test, validation = hold_out(test, config.validation_fraction, "validation")
        else:
            cut = len(test) if "test" not in given else 0
            fraction = min(1.0, config.validation_fraction * (len(train) + cut) / max(1, len(train)))
            train, validation = hold_out(train, fraction, "validation")
        sources["validation"] = f"{config.validation_fraction:.0%} of {config.validation_from}"
    dropped: dict[str, int] = {}
    in_test = {e.content for e in test}
    kept = [e for e in validation if e.content not in in_test]
    dropped["validation"], validation = len(validation) - len(kept), kept
    held = in_test | {e.content for e in validation}
    kept = [e for e in train if e.content not in held]
    dropped["train"], train = len(train) - len(kept), kept
    splits = Splits(
        train=sample(train, config.max_train_examples, f"train-{seed}"),
        validation=sample(validation, config.max_validation_examples, "validation-rows"),
        test=sample(test, config.max_test_examples, "test-rows"),
        dropped_as_duplicates=dropped,
        sources=sources,
    )
    if not splits.train:
        raise ConfigError(
            f"data={config.name}", None, "no rows are left to train on", "check data.path, data.validation_fraction and data.test_fraction"
        )
    return splits
