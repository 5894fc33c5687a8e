"""Near duplicates among texts: vectorised MinHash finds candidates, every one of which is then compared exactly.

Two texts are near duplicates where the sets of their runs of five characters (case, punctuation, links, @names and spacing aside)
have a Jaccard similarity of at least `threshold`. Candidates are pairs whose signatures agree in one whole band (Broder 1997;
Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3). Nothing is random: the same texts give the same pairs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

SHINGLE = 5  # characters
BANDS, ROWS = 24, 4  # a pair of similarity s is a candidate with probability 1 - (1 - s^4)^24: 0.999 at 0.7, 0.96 at 0.6
LEAST = 20  # normalised characters: shorter texts say too little to be compared in part
LONGEST = 4_000  # characters of a text that are looked at
BLOCK = 1 << 15  # shingles hashed at a time: what a core's cache holds
CHUNK = 1 << 22  # characters held at a time
COMMON_LINE, COMMON_SHARE = 10, 0.05  # a line in more texts than both is wording that they share
NEIGHBOURS = 8  # texts of one crowded bucket that each is compared with
CROWD = 24  # texts of one bucket that are all compared with each other
MOST = 16  # later texts that one is compared with exactly
SEED = 20_040_913

_ASIDE = re.compile(r"(?:https?://|www\.)\S+|(?<!\w)@\w+")
_MARKS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Alike:
    """Which of some texts are near duplicates of each other.

    groups: the numbers of the texts that are equal once normalised; each text that is long enough to be compared is in one.
    links: (group, another group, similarity below 1.0), the smaller number first, sorted.
    """

    groups: list[list[int]]
    links: list[tuple[int, int, float]]


def normalise(text: str) -> str:
    """What is compared: letters and digits in lower case, single spaces; links and @names left out."""
    text = text[:LONGEST].casefold()
    if "@" in text or "://" in text or "www." in text:
        text = _ASIDE.sub(" ", text)
    return _MARKS.sub(" ", text).strip()


def without_wording(texts: Sequence[str]) -> list[str]:
    """The texts without the lines that many have in common: headings of a prompt template, an instruction, a system message."""
    counts = Counter(line for text in texts for line in set(text.split("\n")))
    common = {line for line, n in counts.items() if n > max(COMMON_LINE, COMMON_SHARE * len(texts))}
    if not common:
        return list(texts)
    return ["\n".join(line for line in text.split("\n") if line not in common) for text in texts]


def near_duplicates(texts: Sequence[str], threshold: float) -> Alike:
    """Texts that are equal but for case, punctuation, links and @names, and pairs of such groups that are alike.

    Of more than CROWD groups that are all alike, each is compared with some of the others only, so that time stays in proportion.

    Args:
        threshold: least Jaccard similarity of a link; meant for 0.6 to 1.0.
    """
    members: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        members.setdefault(normalise(text), []).append(i)
    distinct = [text for text in members if len(text) >= LEAST]
    return Alike([members[text] for text in distinct], sorted(_alike(distinct, threshold)))


def _alike(texts: list[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Distinct texts that are alike: (one, another, similarity)."""
    if len(texts) < 2:
        return
    chunks = list(_chunks(texts))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # numpy lets go of the lock in loops over arrays
        signatures = np.concatenate(list(pool.map(_signatures, chunks)))
    candidates = _likeliest(signatures, _candidates(signatures), threshold - 0.25)  # five standard deviations of the estimate
    sets: dict[int, frozenset[int]] = {}

    def shingles_of(i: int) -> frozenset[int]:
        if i not in sets:
            sets[i] = frozenset(_hashes(texts[i]).tolist())
        return sets[i]

    for a, b in candidates.tolist():
        one, two = shingles_of(a), shingles_of(b)
        shared = len(one & two)
        similarity = shared / (len(one) + len(two) - shared)
        if similarity >= threshold:
            yield a, b, similarity


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    """Runs of texts of about CHUNK characters."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _hashes(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """A 32-bit number for each run of SHINGLE characters."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    mixed = np.zeros(len(codes) - SHINGLE + 1, np.uint32)
    for k in range(SHINGLE):
        mixed *= np.uint32(0x01000193)
        mixed ^= codes[k : len(codes) - SHINGLE + 1 + k] * np.uint32(0x9E3779B1)
        mixed ^= mixed >> np.uint32(15)
    return mixed


def _signatures(texts: list[str]) -> np.ndarray[tuple[int, int], np.dtype[np.uint32]]:
    """[text, BANDS x ROWS]: for each of so many hash functions the least value over a text's shingles."""
    draws = np.random.Generator(np.random.PCG64(SEED)).integers(0, 1 << 32, (BANDS * ROWS, 2), np.uint32)
    lengths = np.fromiter(map(len, texts), np.int64)
    hashes = _hashes("".join(texts))
    starts = np.concatenate([[0], lengths.cumsum()])
    found = np.empty((len(texts), len(draws)), np.uint32)
    row = 0
    while row < len(texts):  # blocks of whole texts
        upto = max(row + 1, int(np.searchsorted(starts, starts[row] + BLOCK, "right")) - 1)
        # A run over the border of two texts belongs to neither: the last SHINGLE - 1 places of each text are left out.
        block = hashes[starts[row] : starts[upto]]
        keep = np.ones(len(block), bool)
        ends = starts[row + 1 : upto + 1] - starts[row]
        for k in range(1, SHINGLE):
            keep[np.minimum(ends - k, len(keep) - 1)] = False
        block = block[keep[: len(block)]]
        begins = starts[row:upto] - starts[row] - np.arange(upto - row) * (SHINGLE - 1)
        for j, (a, b) in enumerate(draws):
            mixed = (block ^ a) * (b | np.uint32(1))
            mixed ^= mixed >> np.uint32(16)
            mixed *= np.uint32(0x85EBCA6B)
            found[row:upto, j] = np.minimum.reduceat(mixed, begins)
        row = upto
    return found


def _candidates(signatures: np.ndarray[tuple[int, int], np.dtype[np.uint32]]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Pairs [n, 2] of rows that agree in a whole band, each once, the smaller first."""
    found = []
    for band in range(BANDS):
        keys = np.zeros(len(signatures), np.uint64)
        for column in range(band * ROWS, (band + 1) * ROWS):  # in 64 bits: what falls together by chance is told apart later
            keys = (keys ^ signatures[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        new = np.ones(len(order), bool)
        new[1:] = ordered[1:] != ordered[:-1]
        bucket = new.cumsum()
        sizes = np.bincount(bucket)
        crowded = sizes[bucket] > CROWD
        for step in range(1, CROWD):
            same = bucket[step:] == bucket[:-step]
            if step > NEIGHBOURS:
                same &= ~crowded[step:]
            if not same.any():
                break
            found.append(np.stack([order[:-step][same], order[step:][same]], 1))
    if not found:
        return np.empty((0, 2), np.int64)
    pairs = np.concatenate(found)
    pairs.sort(axis=1)
    return np.unique(pairs, axis=0)


def _likeliest(
    signatures: np.ndarray[tuple[int, int], np.dtype[np.uint32]], pairs: np.ndarray[tuple[int, int], np.dtype[np.int64]], least: float
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Of each text's pairs with later ones the MOST whose signatures agree best, if they agree by `least`."""
    parts = [pairs[at : at + BLOCK] for at in range(0, len(pairs), BLOCK)]
    agreeing = np.concatenate([(signatures[p[:, 0]] == signatures[p[:, 1]]).mean(1) for p in parts] or [np.empty(0)])
    kept = agreeing >= least
    pairs, agreeing = pairs[kept], agreeing[kept]
    order = np.lexsort((pairs[:, 1], -agreeing, pairs[:, 0]))
    pairs = pairs[order]
    place = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])  # of a pair among those of its first text
    return pairs[place < MOST]
