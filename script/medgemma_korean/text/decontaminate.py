"""Find exam items inside documents: the one definition of contamination.

Text is folded (NFKC, lower case, spaces and punctuation dropped) and cut into character 13-grams. An item is touched by
a document in which at least half of the item's own 13-grams stand; an item shorter than 13 folded characters is touched
when the folded whole stands there, options in any order. An item has several texts, and any one of them decides:

* the question with its options, as printed: bare, numbered 1-5 (①, 1) and 1. all fold to the digit) or lettered A-E.
  Without the numbered forms a page with "① …" would break every 13-gram that crosses two options.
* the question alone, because copies often drop, shorten or shuffle the options. Here half of the 13-grams that no other
  item's question holds must stand too: "가장 심각한 합병증은 무엇인가?" may be half of a short question and still
  identifies none.
* a question that identifies none ("옳은 것은?") with all options near it, in any order; a few grams tell where to look.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from medgemma_korean.text.clean import INVISIBLE, limit_marks
from medgemma_korean.text.points import batches, points_of

GRAM = 13
# Share of an item's own 13-grams.
MIN_SHARE = 0.5
OPTIONS = "ABCDE"
_LABELS = ("12345", "abcde")

# 2^19 words of 64 bits are 4 MB and stay in the processor's cache; twice as many take twice the time. A gram has two
# bits of one word: 2 million grams let one strange gram in 70 pass to the search, with one bit it would be one in 16.
_WORD_BITS = 19
# Hashing in pieces that fit the cache is four times as fast as hashing a whole batch.
_CHUNK = 1 << 15
_BASE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Symbols keep the meaning of an option (↑ and ↓, + and <), so only these count as punctuation: tildes and bars, which
# writers exchange for hyphens and commas, and the letter that Koreans type as a middle dot.
_LIKE_PUNCTUATION = "~∼|\u119e\u318d"
# What the folding table holds beside code points: the end of a text, a character that goes, and a mark on those whose
# folding needs more than a table.
_END, _DROPPED, _UNSTABLE = 0, 1 << 21, 1 << 22
# A call to normalise costs as much as this many characters more in one call.
_GAP = 8
_LONGEST = "\ufdfa"


def fold(text: str) -> str:
    """Return `text` in NFKC and lower case without spaces, punctuation, control characters and modifier signs."""
    return _folded([text])[0]


def _folded(texts: Sequence[str]) -> list[str]:
    return _decoded(_fold_all(texts))


def _decoded(points: np.ndarray) -> list[str]:
    """Return the texts of `_fold_all`."""
    return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass").split("\0")[:-1]


def _fold_all(texts: Sequence[str]) -> np.ndarray:
    """Return the code points of all folded texts, uint32, each followed by a 0.

    Normalising costs five times the rest, so a table does it where a character's form depends on no other one.
    """
    table, joined = _fold_table(), "\0".join([*texts, ""])
    codes = table.take(points_of(joined), mode="wrap")
    if np.count_nonzero(codes == _END) != len(texts):
        # Another control character, which is dropped too, but ends no text.
        return _fold_all([text.replace("\0", "\1") for text in texts])
    unstable = np.flatnonzero(codes >= _UNSTABLE)
    if len(unstable):
        # Eighteen characters from one, which normalising takes its time for.
        if _LONGEST in joined:
            return _fold_all([text.replace(_LONGEST, unicodedata.normalize("NFKC", _LONGEST)) for text in texts])
        codes = table.take(points_of(_normalised(joined, unstable)), mode="wrap") & ~np.uint32(_UNSTABLE)
    return codes.compress(codes != _DROPPED)  # three times as fast as codes[...]


def _normalised(text: str, unstable: np.ndarray) -> str:
    """Return `text` in NFKC and lower case where its characters at `unstable` and the ones before them stand."""
    edges = np.flatnonzero(np.diff(unstable) > _GAP)
    lows = unstable[np.append(0, edges + 1)].tolist()
    highs = unstable[np.append(edges, -1)].tolist()
    pieces, done = [], 0
    for low, high in zip(lows, highs, strict=True):
        start = max(low - 1, done)
        pieces.append(text[done:start])
        pieces.append(unicodedata.normalize("NFKC", limit_marks(text[start : high + 1])).lower())
        done = high + 1
    return "".join([*pieces, text[done:]])


@cache
def _fold_table() -> np.ndarray:
    """Return uint32 [0x110000]: what a code point is folded to, or _DROPPED, or itself marked as _UNSTABLE.

    Unstable is what becomes several characters and what may join the character before it: marks, vowels of jamo.
    """
    table = np.arange(0x110000, dtype=np.uint32)
    # Left out are ideographs, Hangul syllables, Tangut and other large scripts, which fold to themselves; the last
    # range is the compatibility ideographs.
    edges = (
        0,
        0x3400,
        0x4DC0,
        0x4E00,
        0xA000,
        0xAC00,
        0xD7A4,
        0x12000,
        0x13430,
        0x13460,
        0x16100,
        0x17000,
        0x18D00,
        0x20000,
    )
    points = [p for low, high in zip(edges[::2], edges[1::2], strict=True) for p in range(low, high)]
    points += range(0x2F800, 0x2FA20)
    decompositions = (unicodedata.decomposition(chr(point)) for point in points)
    joining = {chr(int(form.split()[1], 16)) for form in decompositions if " " in form and "<" not in form}
    joining.update(map(chr, (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))))
    joining.update(chr(point) for point in points if unicodedata.combining(chr(point)))
    # Nothing joins a 0, so that all characters are normalised at once.
    forms = unicodedata.normalize("NFKC", "\0".join(map(chr, points[1:]))).lower().replace("ς", "σ").split("\0")
    for point, form in zip(points[1:], forms, strict=True):
        left = [character for character in form if _survives(character)]
        if len(left) > 1 or not joining.isdisjoint(form):
            table[point] |= _UNSTABLE
        else:
            table[point] = ord(left[0]) if left else _DROPPED
    # Tags, variation selectors and private use.
    table[0xE0000:] = _DROPPED
    return table


def _survives(character: str) -> bool:
    """Whether a character in NFKC is kept; above the first plane all are that show, which are letters and emoji."""
    category = unicodedata.category(character)
    if character > "\uffff":
        return category != "Cf"
    return (
        category[0] not in "PZC"
        and category != "Sk"
        and character not in _LIKE_PUNCTUATION
        and not INVISIBLE.match(character)
    )


def grams(folded: str, n: int = GRAM) -> np.ndarray:
    """Return one 64-bit hash per character n-gram of a folded text, in order: uint64 [max(len - n + 1, 0)].

    Polynomial hash (Karp and Rabin 1987) modulo 2^64; equal n-grams have equal hashes in every process.
    Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, found {n}")
    return _hash_grams(points_of(folded), n)


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


class _Loose:
    """An item whose question identifies none: it stands where the question and all options do, whatever their order.

    Texts are folded; `_tellable` says which items can be told that way.
    """

    def __init__(self, question: str, options: list[str]) -> None:
        self.question, self.options = question, options
        size = len(question) + sum(map(len, options))
        # Labels stand between the options, and perhaps a remark.
        self.reach = size + 4 * len(options) + min(size, 150)
        # An option may be part of another one, or of the question.
        self.counts = {text: sum(whole.count(text) for whole in (question, *options)) for text in options}

    def hints(self) -> list[str]:
        """Return grams, of which one stands wherever the item does: a long option, or what follows the question."""
        tail = self.question[-max(GRAM // 2, GRAM - sum(map(len, self.options))) :]
        found = {option[:GRAM] for option in self.options if len(option) >= GRAM}
        for labels in ("", *_LABELS):
            # The labels count the options as they stand, or were shuffled with them.
            for counting in (True, False):
                found.update(self._begun(tail, labels, counting))
        return sorted(found)

    def _begun(self, tail: str, labels: str, counting: bool) -> set[str]:
        """Return the first gram of `tail` and options behind it, in every order that there is."""
        begun, found = [(tail, ())], set()
        while begun:
            text, used = begun.pop()
            if len(text) >= GRAM:
                found.add(text[:GRAM])
                continue
            for number, option in enumerate(self.options):
                if number not in used:
                    label = labels[len(used) if counting else number] if labels else ""
                    begun.append((text + label + option, (*used, number)))
        return found

    def stands_in(self, folded: str) -> bool:
        """Whether the item stands in a folded document; linear, because it goes from one longest option to the next."""
        longest, at = max(self.options, key=len), -1
        while (at := folded.find(longest, at + 1)) >= 0:
            asked = folded.find(self.question, max(at - self.reach, 0))
            if asked < 0:
                return False
            if asked > at:
                # Nothing before this question has one near it.
                at = asked
                continue
            near = folded[max(at - self.reach, 0) : at + self.reach]
            if all(near.count(text) >= count for text, count in self.counts.items()):
                return True
        return False


class _Short:
    """An item too short for a gram: it stands only where its options follow the question at once, in any order."""

    def __init__(self, question: str, options: list[str]) -> None:
        self.question = question
        self.counts = {text: sum(whole.count(text) for whole in options) for text in options}
        option = "|".join(re.escape(text) for text in sorted(options, key=len, reverse=True))
        label = f"[{''.join(_LABELS)}]?"
        self.printed = re.compile(f"{re.escape(question)}((?:{label}(?:{option})){{{len(options)}}})")

    def stands_in(self, folded: str) -> bool:
        return self.question in folded and any(
            all(match[1].count(text) >= count for text, count in self.counts.items())
            for match in self.printed.finditer(folded)
        )


def _tellable(question: str, options: list[str]) -> bool:
    """Whether an item of these folded texts is more than a phrase and a few labels, such as 가, 나 and 다."""
    letters = sum(map(len, options))
    return (
        question != ""
        and len(question) + letters >= GRAM
        and 1 < len(options) <= len(OPTIONS)
        and (letters >= 2 * len(options) or not set("".join(options)) <= {*"".join(_LABELS), *"가나다라마ㄱㄴㄷㄹㅁ"})
    )


class ExamIndex:
    """Exam items by their 13-grams and by their folded question and options.

    `items` are mappings with "id", "question" and the options "A" to "E" ("E" may be missing or empty). Ids are
    returned as strings. Raises ValueError, naming the position, for an item without id or question.
    """

    def __init__(self, items: Iterable[Mapping[str, Any]]) -> None:
        items = list(items)
        for position, item in enumerate(items):
            if item.get("id") in (None, "") or not item.get("question"):
                raise ValueError(f"exam item {position} needs an id and a question, found {sorted(item)}")
        self.ids = [str(item["id"]) for item in items]
        self._same: dict[tuple[str, frozenset[str]], str] = {}
        self._short: list[tuple[_Short, int]] = []
        # Items whose question identifies none, by their positions.
        self._loose: dict[int, _Loose] = {}
        questions = _folded([str(item["question"]) for item in items])
        options = iter(_folded([option for item in items for option in item_options(item)]))
        forms, owners, options_of = [], [], []
        for position, (item, question) in enumerate(zip(items, questions, strict=True)):
            own = list(itertools.islice(options, len(item_options(item))))
            options_of.append(own)
            self._same.setdefault((question, frozenset(own)), self.ids[position])
            whole = question + "".join(own)
            if 0 < len(whole) < GRAM:
                self._short.append((_Short(question, own), position))
            for text in _printed_forms(question, own):
                forms.append(text)
                owners.append(position)
        self._build(forms, owners, questions, options_of)

    def _build(self, forms: list[str], owners: list[int], questions: list[str], options: list[list[str]]) -> None:
        """Number the texts of the items: printed forms, questions that have grams of their own, the other questions.

        A form is one set of grams; a question is two, all of its grams and its own. A text is found when half of each
        of its sets stands in the document. Of a question that identifies none the set holds hints, of which one makes
        a document worth a closer look.
        """
        hashes, sets = _distinct_grams(forms)
        asked, askers = _distinct_grams(questions)
        own = np.ones(len(asked), dtype=bool)
        shared = asked[1:] == asked[:-1]
        own[1:] &= ~shared
        own[:-1] &= ~shared
        specific = np.unique(askers[own])
        rank = np.full(len(questions), -1, dtype=np.int32)
        rank[specific] = len(forms) + np.arange(len(specific))
        identified = rank[askers] >= 0
        for position in np.flatnonzero(rank < 0).tolist():
            if _tellable(questions[position], options[position]):
                self._loose[position] = _Loose(questions[position], options[position])
        hints_of = [loose.hints() for loose in self._loose.values()]
        hints, hinted = _distinct_grams(list(itertools.chain(*hints_of)))
        hinted = np.repeat(np.arange(len(hints_of), dtype=np.int32), [len(group) for group in hints_of])[hinted]
        first_loose = len(forms) + len(specific)
        flat = np.concatenate([hashes, asked[identified], asked[own], hints])
        own_sets = rank[askers[own]] + np.int32(len(specific) + len(self._loose))
        sets = np.concatenate([sets, rank[askers[identified]], own_sets, hinted + np.int32(first_loose)])

        self._item_of_text = owners + specific.tolist() + list(self._loose)
        self._first_loose = first_loose
        self._text_of_set = np.concatenate([np.arange(len(self._item_of_text)), rank[specific]])
        self._sets_of_text = np.bincount(self._text_of_set, minlength=len(self._item_of_text))
        sizes = np.bincount(sets, minlength=len(self._text_of_set))
        self._needed = np.ceil(sizes * MIN_SHARE).astype(np.int64)
        self._needed[first_loose : len(self._item_of_text)] = 1
        order = np.argsort(flat)
        flat, sets = flat[order], sets[order]
        fresh = _first_of_equals(flat)
        # Compressed rows: the sets that hold hash k are _sets[_starts[k] : _starts[k + 1]].
        self._hashes, self._sets = flat[fresh], sets
        self._starts = np.append(np.flatnonzero(fresh), len(flat))
        self._bitmap = np.zeros(1 << _WORD_BITS, dtype=np.uint64)
        np.bitwise_or.at(self._bitmap, *_place(self._hashes))

    def touched_by(self, text: str) -> list[str]:
        """Return the ids of the items that one document touches, in the order of the items, each once."""
        return self.touched_by_each([text])[0]

    def touched_by_each(self, texts: Sequence[str]) -> list[list[str]]:
        """Return `touched_by` of every document; many short documents at once are far faster than one by one."""
        return touched_by_all((self,), texts)[0]

    def _touched(self, documents: np.ndarray, hashes: np.ndarray, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Return (document, position of an item) where enough distinct grams of each set of a text were found.

        `hashes` are grams that may stand in the index, sorted; `documents` are the numbers of theirs in `texts`.
        """
        if not len(self._hashes):
            return
        rows = np.searchsorted(self._hashes, hashes)
        rows[rows == len(self._hashes)] = 0
        real = self._hashes[rows] == hashes
        documents, rows, _ = _distinct(documents[real], rows[real], len(self._hashes))
        starts, lengths = self._starts[rows], self._starts[rows + 1] - self._starts[rows]
        # All ranges start .. start + length at once.
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        sets = self._sets[np.repeat(starts, lengths) + offsets]
        documents, sets, counts = _distinct(np.repeat(documents, lengths), sets, len(self._needed))
        enough = counts >= self._needed[sets]
        documents, numbers = documents[enough], self._text_of_set[sets[enough]]
        documents, numbers, complete = _distinct(documents, numbers, len(self._sets_of_text))
        whole = complete == self._sets_of_text[numbers]
        looked, folded = -1, ""
        for document, number in zip(documents[whole].tolist(), numbers[whole].tolist(), strict=True):
            position = self._item_of_text[number]
            if number >= self._first_loose:
                if document != looked:
                    looked, folded = document, fold(texts[document])
                if not self._loose[position].stands_in(folded):
                    continue
            yield document, position

    def _short_in(self, folded: np.ndarray) -> Iterator[tuple[int, int]]:
        """Return (document, position of an item) where an item too short for a gram stands as a whole."""
        for document, text in enumerate(_decoded(folded)) if self._short else ():
            yield from ((document, position) for short, position in self._short if short.stands_in(text))

    def same_item(self, item: Mapping[str, Any]) -> str | None:
        """Return the id of the indexed item with the same folded question and set of folded options, or None."""
        options = frozenset(fold(option) for option in item_options(item))
        return self._same.get((fold(str(item["question"])), options))


def touched_by_all(indexes: Sequence[ExamIndex], texts: Sequence[str]) -> list[list[list[str]]]:
    """Return, for each index, `touched_by_each` of the documents, which are folded and hashed once for all."""
    found: list[list[set[int]]] = [[set() for _ in texts] for _ in indexes]
    bitmap = functools.reduce(np.bitwise_or, [index._bitmap for index in indexes])
    documents, hashes, first = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)], 0
    for batch in batches(texts):
        folded = _fold_all(batch)
        ends = np.flatnonzero(folded == _END)
        # No gram of an item holds the 0 between two documents.
        for low in range(0, max(len(folded) - GRAM + 1, 0), _CHUNK):
            chunk = _hash_chunk(folded[low : low + _CHUNK + GRAM - 1].astype(np.uint64), GRAM)
            words, bits = _place(chunk)
            # The bitmap drops nearly all grams; only the rest are searched for.
            candidates = np.flatnonzero((bitmap.take(words, mode="wrap") & bits) == bits)
            documents.append(np.searchsorted(ends, candidates + low) + first)
            hashes.append(chunk[candidates])
        for index, of_index in zip(indexes, found, strict=True):
            for document, position in index._short_in(folded):
                of_index[first + document].add(position)
        first += len(batch)
    # In order, because neighbours in the index are found in the processor's cache.
    order = np.argsort(np.concatenate(hashes))
    candidates, found_hashes = np.concatenate(documents)[order], np.concatenate(hashes)[order]
    for index, of_index in zip(indexes, found, strict=True):
        for document, position in index._touched(candidates, found_hashes, texts):
            of_index[document].add(position)
    # Two items may share an id; dict.fromkeys keeps the order and drops the repeat.
    return [
        [list(dict.fromkeys(index.ids[position] for position in sorted(group))) if group else [] for group in of_index]
        for index, of_index in zip(indexes, found, strict=True)
    ]


def _distinct(first: np.ndarray, second: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct pairs of two int64 arrays, in order, and how often each occurs; `second` is below `size`."""
    pairs = first * size + second
    pairs.sort()
    starts = np.flatnonzero(_first_of_equals(pairs))
    return *np.divmod(pairs[starts], size), np.diff(starts, append=len(pairs))


def _first_of_equals(ordered: np.ndarray) -> np.ndarray:
    """Return bool: where a sorted array has another value than before."""
    fresh = np.ones(len(ordered), dtype=bool)
    fresh[1:] = ordered[1:] != ordered[:-1]
    return fresh


def _printed_forms(question: str, options: list[str]) -> list[str]:
    """Return the folded texts of a whole item: options bare, numbered and lettered."""
    forms = [question + "".join(options)]
    for marks in _LABELS:
        forms.append(question + "".join(mark + option for mark, option in zip(marks, options, strict=False)))
    return list(dict.fromkeys(forms))


def _distinct_grams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all folded texts' grams, uint64, and the numbers of their texts: distinct pairs, sorted."""
    points = points_of("\0".join([*texts, ""]))
    hashes = _hash_grams(points, GRAM)
    ends = np.flatnonzero(points == _END)
    numbers = np.repeat(np.arange(len(texts), dtype=np.int32), np.diff(ends, prepend=-1))[: len(hashes)]
    whole = np.arange(GRAM, len(hashes) + GRAM) <= ends[numbers]
    hashes, numbers = hashes[whole], numbers[whole]
    # A stable sort would give the pairs at once, and takes four times as long as numpy's default and a second sort.
    order = np.argsort(hashes)
    hashes = hashes[order]
    fresh = _first_of_equals(hashes)
    ranks, numbers, _ = _distinct(np.cumsum(fresh) - 1, numbers[order], max(len(texts), 1))
    return hashes[fresh][ranks], numbers.astype(np.int32)


def _place(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the word of the bitmap that each hash has, int64, and its two bits in there, uint64."""
    # The high bits of a product depend on all lower bits; those of the polynomial itself barely on the last character.
    mixed = hashes * np.uint64(0xC2B2AE3D27D4EB4F)
    one, low = np.uint64(1), np.uint64(63)
    bits = one << (mixed >> np.uint64(58 - _WORD_BITS) & low)
    bits |= one << (mixed >> np.uint64(52 - _WORD_BITS) & low)
    return (mixed >> np.uint64(64 - _WORD_BITS)).astype(np.int64), bits
