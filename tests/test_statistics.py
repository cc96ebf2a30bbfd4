"""Wilson, McNemar and baselines against reference values and brute force."""

import itertools
import random
import time
from fractions import Fraction

import pytest

from medgemma_korean.statistics import Z_95, discordant, majority_baseline, mcnemar, wilson


# Reference values: statsmodels 0.15.0.
@pytest.mark.parametrize(
    ("k", "n", "lower", "upper"),
    [
        (0, 10, 0.000000000, 0.277532800),
        (10, 10, 0.722467200, 1.000000000),
        (1, 1, 0.206549314, 1.000000000),
        (5, 20, 0.111861701, 0.468700878),
        (82, 164, 0.424357047, 0.575642953),
        (87, 435, 0.165109718, 0.240142464),
        (332, 435, 0.721074193, 0.800754352),
        (366, 435, 0.804080770, 0.872701229),
        (627, 1059, 0.562187702, 0.621282747),
        (602, 3009, 0.186158977, 0.214738806),
        (2078, 3009, 0.673844325, 0.706859411),
        (2268, 3009, 0.738027889, 0.768802630),
    ],
)
def test_wilson_reference(k, n, lower, upper):
    assert wilson(k, n) == pytest.approx((lower, upper), abs=5e-10)


def test_wilson_ends_solve_the_score_equation():
    # By definition an end p satisfies (k/n - p)^2 = z^2 p (1 - p) / n.
    for n in (1, 2, 7, 60, 3009):
        for k in range(0, n + 1, max(1, n // 20)):
            lower, upper = wilson(k, n)
            assert 0 <= lower <= k / n <= upper <= 1
            for p in (lower, upper):
                assert (k / n - p) ** 2 == pytest.approx(Z_95**2 * p * (1 - p) / n, abs=1e-12)
            assert wilson(n - k, n) == pytest.approx((1 - upper, 1 - lower))


def test_wilson_ends_are_exact_at_the_borders():
    assert all(wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0 for n in range(1, 300))


@pytest.mark.parametrize(("k", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (0, -1)])
def test_wilson_undefined(k, n):
    with pytest.raises(ValueError, match="Wilson"):
        wilson(k, n)


# Reference values: scipy 1.17.1 (same section).
@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (3, 3, 1),
        (0, 5, 0.0625),
        (0, 6, 0.03125),
        (5, 1, 0.21875),
        (8, 1, 0.0390625),
        (10, 2, 0.03857421875),
        (14, 6, 0.11531829834),
        (15, 5, 0.041389465332),
        (26, 14, 0.080690467752),
        (27, 13, 0.0384773082842),
        (39, 21, 0.0273401338681),
        (60, 40, 0.056887933641),
        (61, 39, 0.0352002002177),
        (77, 53, 0.0432551307858),
        (200, 140, 0.00134104467051),
        (300, 250, 0.0365787455491),
    ],
)
def test_mcnemar_reference(b, c, p):
    assert mcnemar(b, c) == pytest.approx(p, rel=1e-10)
    assert mcnemar(c, b) == mcnemar(b, c)


def test_random_tables_beside_other_libraries():
    """Both against statsmodels, and McNemar against scipy's binomial test, on 500 tables; neither is required."""
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    scipy = pytest.importorskip("scipy.stats")
    rng = random.Random(11)
    for _ in range(500):
        n = rng.choice((1, 7, 60, 435, 3009, 10**6))
        k = rng.choice((0, n, rng.randint(0, n)))
        expected = proportion.proportion_confint(k, n, alpha=0.05, method="wilson")
        assert wilson(k, n) == pytest.approx(expected, abs=1e-9)
        b, c = (rng.randint(0, rng.choice((3, 40, 700))) for _ in range(2))
        table = [[rng.randint(0, 900), c], [b, rng.randint(0, 900)]]
        assert mcnemar(b, c) == pytest.approx(contingency.mcnemar(table, exact=True).pvalue, abs=1e-9)
        if b + c:
            assert mcnemar(b, c) == pytest.approx(scipy.binomtest(b, b + c, 0.5).pvalue, abs=1e-9)


def test_mcnemar_counts_every_outcome():
    # All 2^n ways in which n discordant pairs can fall; as extreme means at least as far from n / 2.
    for n in range(1, 11):
        sums = [sum(outcome) for outcome in itertools.product((0, 1), repeat=n)]
        for b in range(n + 1):
            extreme = sum(abs(2 * s - n) >= abs(2 * b - n) for s in sums)
            assert mcnemar(b, n - b) == float(Fraction(extreme, 2**n))


def test_mcnemar_large_is_exact_and_fast():
    start = time.perf_counter()
    p = mcnemar(10_200, 9_800)
    assert time.perf_counter() - start < 5
    assert p == pytest.approx(0.0047834, rel=1e-3)  # normal approximation with continuity correction, 2 sf(2.8213)
    assert mcnemar(10_000, 10_000) == 1.0
    assert mcnemar(20_000, 0) == 0.0  # 2^-19999 is below the smallest float, and no overflow on the way
    assert mcnemar(1_000, 0) == 2.0**-999


@pytest.mark.parametrize(("b", "c"), [(-1, 0), (0, -1)])
def test_mcnemar_negative(b, c):
    with pytest.raises(ValueError, match="negative"):
        mcnemar(b, c)


def test_majority_baseline():
    assert majority_baseline(["A", "C", "C", "B"]) == ("C", 0.5)
    assert majority_baseline("EDDE") == ("D", 0.5), "the first letter of equals, whatever the order"
    golds = ["D"] * 661 + ["A"] * 600 + ["B"] * 600 + ["C"] * 600 + ["E"] * 548  # KorMedMCQA test: 21.97 % D
    letter, share = majority_baseline(golds)
    assert (letter, round(100 * share, 2)) == ("D", 21.97)
    with pytest.raises(ValueError):
        majority_baseline([])


def test_discordant():
    before = {"1": False, "2": False, "3": True, "4": True, "5": False}
    after = {"5": True, "4": True, "3": False, "2": True, "1": False}
    assert discordant(before, after) == (2, 1)
    assert discordant({}, {}) == (0, 0)


@pytest.mark.parametrize("after", [{"1": True}, {"1": True, "2": True, "3": True}, {"1": True, "3": True}])
def test_discordant_needs_the_same_items(after):
    with pytest.raises(ValueError, match="different items"):
        discordant({"1": True, "2": False}, after)
