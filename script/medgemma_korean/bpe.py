"""Continued BPE: new pieces by going on with a tokenizer's own merges over Hangul words. Counts in, merges out.

Symbols are numbers, a pair is one number of two, and a merge touches the neighbours of what it joins and nothing
else: 100 MB of Korean and 10,000 merges take half a minute (tests/bench/README.md).
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

HANGUL_PIECE = re.compile(r"▁?[가-힣]+")
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
MAX_SYLLABLES = 5  # longer pieces are free of gain and are phrases of one source
MOST_LINES = 2_000_000  # whose hashes are remembered, about 200 MB; what repeats most is seen among the first
PAIR_BITS, COUNT_BITS = 32, 44  # a symbol in a pair; a real count beside a weighted one, in one number
SYMBOL, REAL = (1 << PAIR_BITS) - 1, (1 << COUNT_BITS) - 1


@dataclass
class Extension:
    """What continued BPE learned, in order: whole syllables that the base lacks, then merges."""

    syllables: list[str]
    merges: list[tuple[str, str]]

    @property
    def pieces(self) -> list[str]:
        return self.syllables + [left + right for left, right in self.merges]


# words --------------------------------------------------------------------------------------------------


def distinct_lines(texts: Iterable[str], seen: set[int] | None = None) -> Iterator[str]:
    """The lines of the texts in NFC, each once: else the first merges are the labels of forms and menus.

    seen: hashes of the lines before; hand the same set over to go on with other texts.
    """
    import xxhash

    seen = set() if seen is None else seen
    for text in texts:
        for line in unicodedata.normalize("NFC", text).splitlines():
            key = xxhash.xxh3_64_intdigest(line.strip().encode("utf-8", "surrogatepass"))
            if key not in seen:
                if len(seen) < MOST_LINES:
                    seen.add(key)
                yield line


def count_words(texts: Iterable[str]) -> Counter[str]:
    """How often each Hangul word `▁?[가-힣]+` stands in the texts; a space before it belongs to it."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(HANGUL_PIECE.findall(text.replace(" ", "▁")))
    return counts


def without_rare(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The words, those seen once left out where there are more than `most`: 65 % of the words, few of the merges."""
    return dict(counts) if len(counts) <= most else {word: n for word, n in counts.items() if n > 1}


# learning -----------------------------------------------------------------------------------------------


def continue_bpe(
    weighted: Mapping[str, int],
    segment: Callable[[str], list[str]],
    known: set[str],
    limit: int,
    min_count: float,
    *,
    real: Mapping[str, int] | None = None,
    syllable_count: float = 0,
) -> Extension:
    """Continue a tokenizer's merges over Hangul words.

    weighted: word -> count that ranks the merges. real: word -> count of which a merge needs `min_count` (default:
    the same; a word it lacks has none). segment: the base tokenizer's pieces of a word. known: the base vocabulary.
    limit: most pieces to add. A syllable that the base lacks needs `syllable_count` too.

    A merge is vetoed when a part is a byte piece, the result is not Hangul, exists already, or has more than five
    syllables. Ties are broken by the pair's text, so that the result does not depend on the order of the input.
    A piece that no later merge absorbs is used `min_count` times by construction, so that there is nothing to prune;
    parts of longer pieces may be used less.
    """
    real = weighted if real is None else real
    syllables = _missing_syllables(real, known, limit, max(min_count, syllable_count))
    learner = _Learner({*known, *syllables}, min_count)
    added = set(syllables)
    for word, count in weighted.items():
        learner.add(_with_syllables(segment(word), word, added), count, real.get(word, 0))
    return Extension(syllables, learner.learn(limit - len(syllables)))


class _Learner:
    """Words as lists of symbols, and the pairs of them that may be merged.

    A pair's counts only fall once its second symbol exists, and whether it is vetoed never changes but for `taken`.
    So a pair that is below the minimum or vetoed when it first appears is forgotten at once.
    """

    def __init__(self, taken: set[str], min_count: float) -> None:
        self.taken, self.min_count = taken, min_count
        self.numbers: dict[str, int] = {}
        self.names: list[str] = []
        self.words: list[list[int]] = []
        self.counts: list[int] = []  # of a word: weighted << COUNT_BITS | real
        self.pairs: dict[int, int] = {}  # left << PAIR_BITS | right -> its counts, as of a word
        self.where: dict[int, list[int]] = {}  # pair -> words that hold it, or held it

    def number(self, symbol: str) -> int:
        found = self.numbers.get(symbol)
        if found is None:
            found = self.numbers[symbol] = len(self.names)
            self.names.append(symbol)
        return found

    def add(self, pieces: list[str], weighted: int, real: int) -> None:
        if len(pieces) > 1:
            self.words.append([self.number(piece) for piece in pieces])
            self.counts.append(weighted << COUNT_BITS | real)

    def parts(self, pair: int) -> tuple[str, str]:
        return self.names[pair >> PAIR_BITS], self.names[pair & SYMBOL]

    def hopeless(self, pair: int, count: int) -> bool:
        return count & REAL < self.min_count or _vetoed(self.parts(pair), self.taken)

    def entry(self, pair: int, count: int) -> tuple[int, str, str, int]:
        """On the heap: most frequent first, then by the text of the parts."""
        return (-(count >> COUNT_BITS), *self.parts(pair), pair)

    def learn(self, limit: int) -> list[tuple[str, str]]:
        pairs: defaultdict[int, int] = defaultdict(int)
        for word, count in zip(self.words, self.counts, strict=True):
            for left, right in zip(word, word[1:], strict=False):
                pairs[left << PAIR_BITS | right] += count
        self.pairs = {pair: count for pair, count in pairs.items() if not self.hopeless(pair, count)}
        del pairs
        self.where = {pair: [] for pair in self.pairs}
        for index, word in enumerate(self.words):
            for left, right in zip(word, word[1:], strict=False):
                if (found := self.where.get(left << PAIR_BITS | right)) is not None:
                    found.append(index)
        heap = [self.entry(pair, count) for pair, count in self.pairs.items()]
        heapq.heapify(heap)
        merges: list[tuple[str, str]] = []
        while heap and len(merges) < limit:
            negative, left, right, pair = heapq.heappop(heap)
            count = self.pairs[pair]
            if self.hopeless(pair, count):
                del self.pairs[pair], self.where[pair]
            elif count >> COUNT_BITS != -negative:
                heapq.heappush(heap, self.entry(pair, count))
            else:
                merges.append((left, right))
                self.taken.add(left + right)
                for new in self.merge(pair, self.number(left + right)):
                    if self.hopeless(new, self.pairs[new]):
                        del self.pairs[new], self.where[new]
                    else:
                        heapq.heappush(heap, self.entry(new, self.pairs[new]))
        return merges

    def merge(self, pair: int, joined: int) -> list[int]:
        """Join a pair in every word; returns the pairs that came to be."""
        first, second = pair >> PAIR_BITS, pair & SYMBOL
        pairs, words, counts = self.pairs, self.words, self.counts
        made: dict[int, list[int]] = {}
        fresh: dict[int, int] = {}

        def lose(lost: int) -> None:
            if lost in pairs:
                pairs[lost] -= count

        def gain(new: int) -> None:
            if new in fresh:
                fresh[new] += count
                made[new].append(index)
            else:
                fresh[new], made[new] = count, [index]

        for index in dict.fromkeys(self.where[pair]):
            word, count = words[index], counts[index]
            after: list[int] = []
            i, end = 0, len(word) - 1
            while i <= end:
                symbol = word[i]
                if symbol != first or i == end or word[i + 1] != second:
                    after.append(symbol)
                    i += 1
                    continue
                if after:
                    before = after[-1]
                    # Between two joined ones stood the second of one beside the first of the next.
                    lose((second if before == joined else before) << PAIR_BITS | first)
                    gain(before << PAIR_BITS | joined)
                after.append(joined)
                i += 2
                if i <= end and not (word[i] == first and i < end and word[i + 1] == second):
                    lose(second << PAIR_BITS | word[i])
                    gain(joined << PAIR_BITS | word[i])
            words[index] = after
        del pairs[pair], self.where[pair]
        pairs.update(fresh)
        self.where.update(made)
        return list(fresh)


def _missing_syllables(words: Mapping[str, int], known: set[str], limit: int, min_count: float) -> list[str]:
    seen: Counter[str] = Counter()
    for word, n in words.items():
        for syllable in word.lstrip("▁"):
            if syllable not in known:
                seen[syllable] += n
    return [s for s, n in sorted(seen.items(), key=lambda item: (-item[1], item[0])) if n >= min_count][:limit]


def _with_syllables(pieces: list[str], word: str, added: set[str]) -> list[str]:
    """The pieces of a word after the byte triples of the added syllables have become one piece each."""
    if not added or added.isdisjoint(word):
        return pieces
    result, at, i = [], 0, 0
    while i < len(pieces):
        if BYTE_PIECE.fullmatch(pieces[i]):
            if word[at] in added:
                result.append(word[at])
            else:
                result += pieces[i : i + 3]  # a Hangul syllable is three bytes of UTF-8
            at, i = at + 1, i + 3
        else:
            result.append(pieces[i])
            at, i = at + len(pieces[i]), i + 1
    return result


def _vetoed(pair: tuple[str, str], taken: set[str]) -> bool:
    joined = pair[0] + pair[1]
    return (
        BYTE_PIECE.fullmatch(pair[0]) is not None
        or BYTE_PIECE.fullmatch(pair[1]) is not None
        or HANGUL_PIECE.fullmatch(joined) is None
        or joined in taken
        or len(joined.lstrip("▁")) > MAX_SYLLABLES
    )
