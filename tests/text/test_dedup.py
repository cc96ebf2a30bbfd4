"""Duplicates: keys and signatures, planted copies found, strangers left alone."""

from __future__ import annotations

import random

import numpy as np
import pytest

from medgemma_korean.text import points
from medgemma_korean.text.dedup import MIN_AGREEMENT, SLOTS, content_key, near_duplicate_of, signatures

ORIGINALS = 1200


def _vocabulary(rng: random.Random) -> list[str]:
    syllables = [chr(0xAC00 + 28 * number + final) for number in range(399) for final in (0, 4, 8, 21)]
    return ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(5000)]


def _edited(rng: random.Random, words: list[str], share: float, vocabulary: list[str]) -> list[str]:
    copy = list(words)
    for position in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        copy[position] = rng.choice(vocabulary)
    return copy


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    rng = random.Random(20)
    vocabulary = _vocabulary(rng)
    # Frequent words are shared by all documents, as in real text: squaring skews the choice towards the first ones.
    originals = [
        [vocabulary[int(len(vocabulary) * rng.random() ** 2)] for _ in range(rng.randint(80, 300))]
        for _ in range(ORIGINALS)
    ]
    return {
        "original": [" ".join(words) for words in originals],
        "edited_5": [" ".join(_edited(rng, words, 0.05, vocabulary)) for words in originals[:500]],
        "edited_60": [" ".join(_edited(rng, words, 0.60, vocabulary)) for words in originals[:500]],
    }


def test_content_key_is_xxh3_128_of_the_utf8_text() -> None:
    assert content_key("") == bytes.fromhex("99aa06d3014798d86001c324468d497f")
    assert len(content_key("당뇨병")) == 16
    assert content_key("당뇨병") == content_key("당뇨" + "병")
    assert content_key("당뇨병") != content_key("당뇨병 ")


def test_signatures_do_not_depend_on_the_batch(corpus: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus["original"][:40] + ["", "가", "가나다라", "가나다라마"]
    whole = signatures(texts)
    assert whole.shape == (44, SLOTS)
    assert whole.dtype == np.uint32
    monkeypatch.setattr(points, "BATCH_CHARACTERS", 1000)
    assert np.array_equal(signatures(texts), whole)
    assert np.array_equal(np.concatenate([signatures([text]) for text in texts]), whole)


def test_signatures_of_nothing() -> None:
    assert signatures([]).shape == (0, SLOTS)
    assert (signatures([""]) == 0xFFFFFFFF).all()


def test_agreement_estimates_jaccard(corpus: dict[str, list[str]]) -> None:
    def gram_set(text: str) -> set[str]:
        return {text[start : start + 5] for start in range(len(text))}

    errors = []
    for original, copy in zip(corpus["original"][:100], corpus["edited_5"][:100], strict=True):
        one, two = gram_set(original), gram_set(copy)
        pair = signatures([original, copy])
        errors.append(np.mean(pair[0] == pair[1]) - len(one & two) / len(one | two))
    # 128 slots have a standard deviation of about 0.04 each; a biased sketch would shift the mean.
    assert abs(float(np.mean(errors))) < 0.02
    assert float(np.std(errors)) < 0.06


def test_planted_copies_are_found_and_strangers_are_kept(corpus: dict[str, list[str]]) -> None:
    exact = corpus["original"][100:400]
    texts = corpus["original"] + exact + corpus["edited_5"] + corpus["edited_60"]
    duplicate_of = near_duplicate_of(signatures(texts))
    assert duplicate_of.dtype == np.int64
    start = 0
    parts = {}
    for name, size in (("original", ORIGINALS), ("exact", 300), ("edited_5", 500), ("edited_60", 500)):
        parts[name] = duplicate_of[start : start + size]
        start += size
    assert (parts["original"] == -1).all()
    assert np.array_equal(parts["exact"], np.arange(100, 400))
    assert np.mean(parts["edited_5"] == np.arange(500)) >= 0.95
    assert (parts["edited_60"] == -1).all()


def test_groups_join_at_the_smallest_index(corpus: dict[str, list[str]]) -> None:
    one, two = corpus["original"][0], corpus["original"][1]
    assert near_duplicate_of(signatures([two, one, one, two, one])).tolist() == [-1, -1, 1, 0, 1]


def test_a_shared_band_without_agreement_is_no_duplicate() -> None:
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 2**32, size=(3, SLOTS), dtype=np.uint32)
    rows[1, :5] = rows[0, :5]
    # Just enough equal slots, and one too few.
    enough = int(np.ceil(MIN_AGREEMENT * SLOTS))
    rows[2, :enough] = rows[0, :enough]
    assert near_duplicate_of(rows).tolist() == [-1, -1, 0]
    rows[2, enough - 1] ^= 1
    assert near_duplicate_of(rows).tolist() == [-1, -1, -1]


def test_a_stranger_at_the_head_of_a_bucket_hides_no_pair() -> None:
    rng = np.random.default_rng(6)
    rows = rng.integers(0, 2**32, size=(3, SLOTS), dtype=np.uint32)
    # The second and third document agree in 104 of 128 slots but share the first band only, and so does a stranger.
    rows[2] = rows[1]
    rows[2, 5:125:5] ^= 1
    rows[0, :5] = rows[1, :5]
    assert near_duplicate_of(rows).tolist() == [-1, -1, 1]


def test_few_documents_and_wrong_shapes() -> None:
    assert near_duplicate_of(np.zeros((0, SLOTS), dtype=np.uint32)).tolist() == []
    assert near_duplicate_of(np.zeros((1, SLOTS), dtype=np.uint32)).tolist() == [-1]
    with pytest.raises(ValueError, match=r"shape \[n, 128\], found \[2, 64\]"):
        near_duplicate_of(np.zeros((2, 64), dtype=np.uint32))
