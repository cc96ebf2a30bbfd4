"""Interval, paired test and baselines for accuracies: Wilson, exact McNemar, majority letter, discordant pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

Z_95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution: a two-sided 95 % interval


def wilson(k: int, n: int) -> tuple[float, float]:
    """Lower and upper end of the Wilson score interval (95 %) of k successes in n trials, both within 0..1.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    Raises ValueError for n = 0, where the interval is undefined, and unless 0 <= k <= n.
    """
    if n <= 0 or not 0 <= k <= n:
        raise ValueError(f"no Wilson interval for {k} of {n}")
    p, z2 = k / n, Z_95 * Z_95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At k = 0 and k = n the ends are exactly 0 and 1; floating point misses them by an ulp.
    lower = 0.0 if k == 0 else max(0.0, centre - half)
    upper = 1.0 if k == n else min(1.0, centre + half)
    return lower, upper


def mcnemar(b: int, c: int) -> float:
    """Two-sided p-value of the exact McNemar test for b wrong->right and c right->wrong items.

    p = min(1, 2 * sum_{i=0}^{min(b,c)} C(b+c, i) / 2^(b+c)): the binomial test of b against b+c fair coins
    (Q. McNemar, Psychometrika 12, 1947). Summed in integers, so it is exact up to the last division, which rounds
    correctly. 1 when b + c = 0. Raises ValueError for a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts of discordant pairs cannot be negative: {b}, {c}")
    n = b + c
    term = total = 1  # C(n, 0)
    for i in range(min(b, c)):
        term = term * (n - i) // (i + 1)  # C(n, i + 1), always a whole number
        total += term
    return 1.0 if 2 * total >= 1 << n else 2 * total / (1 << n)


def majority_baseline(golds: Sequence[str]) -> tuple[str, float]:
    """The commonest gold letter (the first in the alphabet among equals) and the accuracy of always answering it.

    Raises ValueError when there are no letters.
    """
    if not golds:
        raise ValueError("no majority letter without gold answers")
    counts = Counter(golds)
    letter = min(counts, key=lambda known: (-counts[known], known))
    return letter, counts[letter] / len(golds)


def discordant(before: Mapping[str, bool], after: Mapping[str, bool]) -> tuple[int, int]:
    """(b, c) for `mcnemar`: items that went wrong->right and right->wrong. Both map an item's id to "was right".

    Raises ValueError when the two do not hold the same items: the test is paired.
    """
    if before.keys() != after.keys():
        only = [len(before.keys() - after.keys()), len(after.keys() - before.keys())]
        example = min(before.keys() ^ after.keys())
        raise ValueError(f"different items: {only[0]} only before, {only[1]} only after, such as {example!r}")
    b = sum(after[item] and not before[item] for item in before)
    c = sum(before[item] and not after[item] for item in before)
    return b, c
