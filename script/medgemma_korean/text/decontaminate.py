"""Find exam items inside documents: the one definition of contamination.

Text is folded (NFKC, lower case, spaces and punctuation dropped) and cut into character 13-grams. An item is touched by
a document in which at least half of the item's own 13-grams stand; an item shorter than 13 folded characters is touched
when the folded whole stands there. An item has several texts, and any one of them decides:

* the question with its options, as printed: bare, numbered 1-5 (①, 1) and 1. all fold to the digit) or lettered A-E.
  Without the numbered forms a page with "① …" would break every 13-gram that crosses two options.
* the question alone, because copies often drop, shorten or shuffle the options. Here half of the 13-grams that no other
  item's question holds must stand too: "가장 심각한 합병증은 무엇인가?" may be half of a short question and still
  identifies none.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from medgemma_korean.text.clean import limit_marks

GRAM = 13
# Share of an item's own 13-grams.
MIN_SHARE = 0.5
OPTIONS = "ABCDE"

# 2^24 bits are 2 MB and stay in the processor's cache; 2 million grams set one bit in nine.
_BITMAP_BITS = 24
# Hashing in pieces that fit the cache is four times as fast as hashing a whole batch.
_CHUNK = 1 << 15
_BATCH_CHARACTERS = 1_000_000
_BASE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Symbols keep the meaning of an option (↑ and ↓, + and <), so only these count as punctuation: tildes and bars, which
# writers exchange for hyphens and commas, and the letter that Koreans type as a middle dot.
_LIKE_PUNCTUATION = "~∼|\u119e\u318d"


def fold(text: str) -> str:
    """Return `text` in NFKC and lower case without spaces, punctuation, control characters and modifier signs."""
    points = _fold_points(text)
    return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _fold_points(text: str) -> np.ndarray:
    if not unicodedata.is_normalized("NFKC", text):
        text = unicodedata.normalize("NFKC", limit_marks(text))
    points = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    # The table covers the first plane; "clip" reads its last entry for everything above, which is letters and emoji.
    return points.compress(_kept_points().take(points, mode="clip"))


@cache
def _kept_points() -> np.ndarray:
    """Return bool [65536]: whether a code point survives folding."""
    kept = np.ones(0x10000, dtype=bool)
    for point in range(0xFFFF):
        category = unicodedata.category(chr(point))
        kept[point] = category[0] not in "PZC" and category != "Sk" and chr(point) not in _LIKE_PUNCTUATION
    return kept


def grams(folded: str, n: int = GRAM) -> np.ndarray:
    """Return one 64-bit hash per character n-gram of a folded text, in order: uint64 [max(len - n + 1, 0)].

    Polynomial hash (Karp and Rabin 1987) modulo 2^64; equal n-grams have equal hashes in every process.
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, found {n}")
    return _hash_grams(np.frombuffer(folded.encode("utf-32-le", "surrogatepass"), dtype=np.uint32), n)


def _hash_grams(points: np.ndarray, n: int) -> np.ndarray:
    count = max(len(points) - n + 1, 0)
    hashes = np.empty(count, dtype=np.uint64)
    for low in range(0, count, _CHUNK):
        high = min(low + _CHUNK, count)
        hashes[low:high] = _hash_chunk(points[low : high + n - 1].astype(np.uint64), n)
    return hashes


def _hash_chunk(points: np.ndarray, n: int) -> np.ndarray:
    """Hash by doubling: a hash of length 2k is two hashes of length k, so 13 characters take 5 steps, not 12."""
    result, length = points, 1
    for bit in bin(n)[3:]:
        power = np.uint64(pow(_BASE, length, _MASK + 1))
        result = result[: len(result) - length] * power + result[length:]
        length *= 2
        if bit == "1":
            result = result[:-1] * np.uint64(_BASE) + points[length:]
            length += 1
    return result


def item_options(item: Mapping[str, Any]) -> list[str]:
    """Return the options of an item in order; an item of four options lacks "E" or has it empty."""
    return [str(item[key]) for key in OPTIONS if item.get(key) not in (None, "")]


class ExamIndex:
    """Exam items by their 13-grams and by their folded question and options.

    `items` are mappings with "id", "question" and the options "A" to "E" ("E" may be missing or empty). Ids are
    returned as strings. Raises ValueError, naming the position, for an item without id or question.
    """

    def __init__(self, items: Iterable[Mapping[str, Any]]) -> None:
        self.ids: list[str] = []
        self._same: dict[tuple[str, frozenset[str]], str] = {}
        # A text of an item is one or two gram sets; it is found when half of each stands in the document.
        self._item_of_text: list[int] = []
        self._short: list[tuple[str, int]] = []
        gram_sets: list[np.ndarray] = []
        text_of_set: list[int] = []

        items = list(items)
        for position, item in enumerate(items):
            if item.get("id") in (None, "") or not item.get("question"):
                raise ValueError(f"exam item {position} needs an id and a question, found {sorted(item)}")
        questions = [fold(str(item["question"])) for item in items]
        question_grams = [np.unique(grams(question)) for question in questions]
        specific = _held_once(question_grams)
        for position, (item, question) in enumerate(zip(items, questions, strict=True)):
            options = [fold(option) for option in item_options(item)]
            identifier = str(item["id"])
            self.ids.append(identifier)
            self._same.setdefault((question, frozenset(options)), identifier)
            whole = question + "".join(options)
            if 0 < len(whole) < GRAM:
                self._short.append((whole, position))
            sets = [[np.unique(grams(text))] for text in _printed_forms(question, options) if len(text) >= GRAM]
            if len(specific[position]):
                sets.append([question_grams[position], specific[position]])
            for rows in sets:
                gram_sets += rows
                text_of_set += [len(self._item_of_text)] * len(rows)
                self._item_of_text.append(position)
        self._build(gram_sets, text_of_set)

    def _build(self, gram_sets: list[np.ndarray], text_of_set: list[int]) -> None:
        sizes = np.array([len(row) for row in gram_sets], dtype=np.int64)
        self._needed = np.ceil(sizes * MIN_SHARE).astype(np.int64)
        self._text_of_set = np.array(text_of_set, dtype=np.int64)
        self._sets_of_text = np.bincount(self._text_of_set, minlength=len(self._item_of_text))
        flat = np.concatenate(gram_sets) if gram_sets else np.empty(0, dtype=np.uint64)
        order = np.argsort(flat, kind="stable")
        # Compressed rows: the sets that hold hash k are _sets[_starts[k] : _starts[k + 1]].
        self._hashes, starts = np.unique(flat[order], return_index=True)
        self._starts = np.append(starts, len(flat))
        self._sets = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._bitmap = np.zeros(1 << (_BITMAP_BITS - 3), dtype=np.uint8)
        slots = _slots(self._hashes)
        np.bitwise_or.at(self._bitmap, slots >> 3, _bit(slots))

    def touched_by(self, text: str) -> list[str]:
        """Return the ids of the items that one document touches, in the order of the items, each once."""
        return self.touched_by_each([text])[0]

    def touched_by_each(self, texts: Sequence[str]) -> list[list[str]]:
        """Return `touched_by` of every document; many short documents at once are far faster than one by one."""
        touched: list[list[str]] = []
        for batch in _batches(texts):
            touched += self._touched_batch(batch)
        return touched

    def _touched_batch(self, texts: Sequence[str]) -> list[list[str]]:
        folded = [_fold_points(text) for text in texts]
        ends = np.cumsum([len(points) for points in folded])
        found: list[set[int]] = [set() for _ in texts]
        joined = np.concatenate(folded) if folded else np.empty(0, dtype=np.uint32)
        positions, rows = self._lookup(joined)
        documents = np.searchsorted(ends, positions, side="right")
        # A gram that crosses the end of its document belongs to none.
        inside = positions + GRAM <= ends[documents] if len(positions) else np.empty(0, dtype=bool)
        documents, rows = documents[inside], rows[inside]
        borders = np.flatnonzero(np.diff(documents)) + 1
        for group_documents, group_rows in zip(np.split(documents, borders), np.split(rows, borders), strict=True):
            if len(group_rows):
                found[group_documents[0]] = self._touched_items(np.unique(group_rows))
        for text, position in self._short:
            for document, points in enumerate(folded):
                if text in points.tobytes().decode("utf-32-le", "surrogatepass"):
                    found[document].add(position)
        # Two items may share an id; dict.fromkeys keeps the order and drops the repeat.
        return [list(dict.fromkeys(self.ids[position] for position in sorted(group))) for group in found]

    def _lookup(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the grams of the index stand in `points`, and which grams they are (rows of `_hashes`)."""
        positions, rows = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        count = max(len(points) - GRAM + 1, 0)
        for low in range(0, count if len(self._hashes) else 0, _CHUNK):
            hashes = _hash_chunk(points[low : min(low + _CHUNK, count) + GRAM - 1].astype(np.uint64), GRAM)
            slots = _slots(hashes)
            # The bitmap drops nine grams in ten or more; only the rest are searched for.
            candidates = np.flatnonzero(self._bitmap[slots >> 3] & _bit(slots))
            nearest = np.searchsorted(self._hashes, hashes[candidates])
            nearest[nearest == len(self._hashes)] = 0
            real = self._hashes[nearest] == hashes[candidates]
            positions.append(candidates[real] + low)
            rows.append(nearest[real])
        return np.concatenate(positions), np.concatenate(rows)

    def _touched_items(self, rows: np.ndarray) -> set[int]:
        """Return the positions of the items with a text of which enough distinct grams (`rows`) were found."""
        starts, lengths = self._starts[rows], self._starts[rows + 1] - self._starts[rows]
        # All ranges start .. start + length at once.
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        sets, counts = np.unique(self._sets[np.repeat(starts, lengths) + offsets], return_counts=True)
        texts, complete = np.unique(self._text_of_set[sets[counts >= self._needed[sets]]], return_counts=True)
        found = texts[complete == self._sets_of_text[texts]]
        return {self._item_of_text[text] for text in found.tolist()}

    def same_item(self, item: Mapping[str, Any]) -> str | None:
        """Return the id of the indexed item with the same folded question and set of folded options, or None."""
        options = frozenset(fold(option) for option in item_options(item))
        return self._same.get((fold(str(item["question"])), options))


def _printed_forms(question: str, options: list[str]) -> list[str]:
    """Return the folded texts of a whole item: options bare, numbered and lettered."""
    forms = [question + "".join(options)]
    for marks in ("12345", "abcde"):
        forms.append(question + "".join(mark + option for mark, option in zip(marks, options, strict=False)))
    return list(dict.fromkeys(forms))


def _held_once(gram_sets: list[np.ndarray]) -> list[np.ndarray]:
    """Return each set without the grams that another set holds too."""
    if not gram_sets:
        return []
    values, counts = np.unique(np.concatenate(gram_sets), return_counts=True)
    return [row[counts[np.searchsorted(values, row)] == 1] for row in gram_sets]


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = characters = 0
    for position, text in enumerate(texts):
        if characters and characters + len(text) > _BATCH_CHARACTERS:
            yield texts[start:position]
            start, characters = position, 0
        characters += len(text)
    if start < len(texts):
        yield texts[start:]


def _slots(hashes: np.ndarray) -> np.ndarray:
    # The high bits of a product depend on all lower bits; those of the polynomial itself barely on the last character.
    return ((hashes * np.uint64(0xC2B2AE3D27D4EB4F)) >> np.uint64(64 - _BITMAP_BITS)).astype(np.int64)


def _bit(slots: np.ndarray) -> np.ndarray:
    return np.left_shift(1, slots & 7).astype(np.uint8)
