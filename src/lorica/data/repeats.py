"""Which rows say the same: repeated, nearly repeated, in two splits at once, or with two labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from lorica.data.duplicates import Alike, near_duplicates, without_wording
from lorica.data.examples import SPLITS, Example, Splits
from lorica.data.oddities import visible
from lorica.data.personal import masked

LISTED = 1_000  # pairs that data_report.json lists
SHOWN = 10  # pairs with their text
SHOWN_ANSWERS = 6  # to one text
EXCERPT = 160  # characters
CROWD = 50  # equal texts of which every pair is listed; of more, each with the first of every split

Content = list[tuple[str, Example]]  # rows of the same content, each with its split


def words(contents: list[Content]) -> list[str]:
    """What each content is compared by and shown as: the text, the prompt, or what was said, without wording that many share."""
    firsts = [rows[0][1] for rows in contents]
    return without_wording([e.text or e.prompt or "\n".join(m.content for m in e.messages) for e in firsts])


def repeats(splits: Splits, contents: list[Content], texts: list[str], threshold: float | None) -> dict[str, Any]:
    """Exact and near duplicates within and across splits.

    Rows of the same content (case and spacing aside) are exact duplicates; they never stand in two splits, for the loader drops
    them (`dropped`). Near duplicates are other rows whose text is alike (`lorica.data.duplicates`).

    Args:
        contents: as `by_content` has them. texts: as `words` has them.
        threshold: least similarity of near duplicates; None: they are not looked for.
    Returns:
        exact: rows beyond the first of their content, by split. near: with `within` (rows that have a near duplicate in their split),
        `across` (a-b: rows of b that have one in a), `test_and_training` (pairs by origin) and `examples`; None without a threshold.
    """
    exact = dict.fromkeys(SPLITS, 0)
    for rows in contents:
        for split, n in Counter(split for split, _ in rows).items() if len(rows) > 1 else ():
            exact[split] += n - 1
    return {
        "exact": {"within": exact, "dropped": splits.dropped_as_duplicates},
        "near": None if threshold is None else _near(contents, texts, threshold),
    }


def by_content(splits: Splits) -> list[Content]:
    """All rows, those of the same content together."""
    groups: dict[str, Content] = {}
    for split in SPLITS:
        for example in splits[split]:
            groups.setdefault(example.content, []).append((split, example))
    return list(groups.values())


def _near(contents: list[Content], texts: list[str], threshold: float) -> dict[str, Any]:
    alike = near_duplicates(texts, threshold)
    pairs = _pairs(alike, contents)
    splits_of = [{split for split, _ in rows} for rows in contents]
    within: dict[str, int] = dict.fromkeys(SPLITS, 0)
    across: dict[str, int] = {f"{one}-{other}": 0 for one, other in combinations(SPLITS, 2)}
    for content, neighbours in _neighbours(alike, splits_of):
        for split in splits_of[content]:
            rows = len(_of(contents[content], split))
            within[split] += rows if split in neighbours else 0
            for one in SPLITS[: SPLITS.index(split)]:
                across[f"{one}-{split}"] += rows if one in neighbours else 0
    leaking = [
        (similarity, test, train)
        for a, b, similarity in pairs
        for one, two in ((contents[a], contents[b]), (contents[b], contents[a]))
        for test in _of(one, "test")
        for train in _of(two, "train")
    ]
    leaking.sort(key=lambda pair: (-pair[0], pair[1].origin, pair[2].origin))
    return {
        "similarity": threshold,
        "pairs": len(pairs),
        "pairs_with_another_label": sum(contents[a][0][1].label != contents[b][0][1].label for a, b, _ in pairs),
        "within": within,
        "across": across,
        "test_and_training": [
            {"test": test.origin, "train": train.origin, "similarity": round(s, 3)} for s, test, train in leaking[:LISTED]
        ],
        "examples": [_shown(contents, texts, *pair) for pair in _chosen(pairs, splits_of)],
    }


def _pairs(alike: Alike, contents: list[Content]) -> list[tuple[int, int, float]]:
    """(content, another, similarity) of near duplicates; of crowds only those with the first of every split."""
    pairs: list[tuple[int, int, float]] = []
    for group in alike.groups:  # equal but for case, punctuation, links and @names
        pairs += [(a, b, 1.0) for a, b in (combinations(group, 2) if len(group) <= CROWD else _star(group, contents))]
    for one, other, similarity in alike.links:
        few = len(alike.groups[one]) * len(alike.groups[other]) <= CROWD**2
        some, others = (alike.groups[g] if few else _per_split(alike.groups[g], contents) for g in (one, other))
        pairs += [(min(a, b), max(a, b), similarity) for a in some for b in others]
    return pairs


def _neighbours(alike: Alike, splits_of: list[set[str]]) -> Iterator[tuple[int, set[str]]]:
    """Each content that has near duplicates, with the splits that these are in."""
    of_group = [set().union(*(splits_of[c] for c in group)) for group in alike.groups]
    linked: dict[int, set[str]] = defaultdict(set)
    for one, other, _ in alike.links:
        linked[one] |= of_group[other]
        linked[other] |= of_group[one]
    for g, group in enumerate(alike.groups):
        if len(group) == 1 and g not in linked:
            continue
        with_split = Counter(split for content in group for split in splits_of[content])
        for content in group:
            others = {split for split, n in with_split.items() if n > (split in splits_of[content])}
            if found := others | linked.get(g, set()):
                yield content, found


def _star(group: list[int], contents: list[Content]) -> list[tuple[int, int]]:
    """Of a crowd of equal texts, each with the first of every split."""
    first = _per_split(group, contents)
    return [(min(a, b), max(a, b)) for a in first for b in group if a != b and (b not in first or a < b)]


def _per_split(group: list[int], contents: list[Content]) -> list[int]:
    """The first content of each split in a group."""
    found: dict[str, int] = {}
    for content in group:
        for split, _ in contents[content]:
            found.setdefault(split, content)
    return sorted(set(found.values()))


def _of(rows: Content, split: str) -> list[Example]:
    return [example for s, example in rows if s == split]


def _chosen(pairs: Sequence[tuple[int, int, float]], splits_of: list[set[str]]) -> list[tuple[int, int, float]]:
    """Pairs to show, those between splits before others, from alike to less alike."""
    between = [p for p in pairs if splits_of[p[0]] != splits_of[p[1]]]
    ranked = sorted(between or pairs, key=lambda p: (-p[2], p[0], p[1]))
    step = max(1, len(ranked) // SHOWN)
    return ranked[::step][:SHOWN]


def _shown(contents: list[Content], texts: list[str], a: int, b: int, similarity: float) -> dict[str, Any]:
    rows = [(*contents[i][0], excerpt(texts[i])) for i in (a, b)]
    return {
        "similarity": round(similarity, 3),
        "rows": [{"split": split, "origin": example.origin, "text": text} for split, example, text in rows],
    }


def excerpt(text: str) -> str:
    """The beginning of a text in one line, personal data masked."""
    line = " ".join(masked(text[: 4 * EXCERPT]).split())
    return visible(line if len(line) <= EXCERPT else line[: EXCERPT - 1] + "…")


def conflicts(contents: list[Content], texts: list[str], labels: Sequence[str] | None) -> dict[str, Any]:
    """Training rows of the same content that are answered differently: by label, or by completion.

    Args:
        contents: as `by_content` has them. texts: as `words` has them.
    Returns:
        texts: contents with more than one answer. rows: training rows of these. examples: with every answer and where it stands.
    """
    found: list[tuple[str, list[Example]]] = []
    for rows, text in zip(contents, texts, strict=True):
        training = _of(rows, "train") if len(rows) > 1 else []
        if len({_answer(e, labels) for e in training}) > 1:
            found.append((text, training))
    return {
        "texts": len(found),
        "rows": sum(len(rows) for _, rows in found),
        "examples": [
            {
                "text": excerpt(text),
                "answers": [{"origin": e.origin, "answer": excerpt(_answer(e, labels))} for e in rows[:SHOWN_ANSWERS]],
            }
            for text, rows in found[:SHOWN]
        ],
    }


def _answer(example: Example, labels: Sequence[str] | None) -> str:
    return labels[example.label] if labels is not None and example.label is not None else example.completion
