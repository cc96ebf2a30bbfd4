"""Find exact and near duplicates: content keys, MinHash signatures, and locality-sensitive hashing by sorting.

Near duplicates: 128 MinHash slots over character 5-grams (word n-grams miss edited Korean copies), 25 bands of 5 slots;
a candidate pair counts only when at least 0.60 of all slots agree (measured: recall 0.98 at 5 % of words edited, no
false positives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xxhash
from rensa import RMinHash

from medgemma_korean.text.points import batches, points_of

SLOTS = 128
GRAM = 5
BANDS = 25
ROWS_PER_BAND = 5
# Share of equal slots, an estimate of the Jaccard similarity of the 5-gram sets.
MIN_AGREEMENT = 0.60
# Signatures are comparable only with the same seed and the same rensa version: both belong in the stage record.
SEED = 42
# Pairs verified at a time: 2 x 128 x 4 bytes each, 16 MB together.
_VERIFY_CHUNK = 16_384

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_EMPTY_SLOT = np.uint32(0xFFFFFFFF)


def content_key(text: str) -> bytes:
    """Return the 16-byte xxh3-128 digest of the UTF-8 text: equal texts have equal keys.

    Raises UnicodeEncodeError for a lone surrogate, which cleaning removes.
    """
    return xxhash.xxh3_128_digest(text.encode("utf-8"))


def signatures(texts: Sequence[str]) -> np.ndarray:
    """Return the MinHash signatures of `texts`, uint32 [n, 128]; a text without characters has all slots 2^32-1."""
    result = np.full((len(texts), SLOTS), _EMPTY_SLOT, dtype=np.uint32)
    start = 0
    for batch in batches(texts):
        hashes, offsets = _gram_hashes(batch)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SLOTS, SEED)
        result[start : start + len(batch)] = matrix.to_rows()
        start += len(batch)
    return result


def _gram_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all character 5-grams, uint64 [grams], and where each text starts in them, uint64 [n + 1].

    Every text is followed by 4 zeros, so that it has as many 5-grams as characters and a short one has some too.
    """
    lengths = np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))
    padding = "\0" * (GRAM - 1)
    joined = padding.join(texts) + padding
    points = points_of(joined).astype(np.uint64)
    grams = max(len(points) - GRAM + 1, 0)
    hashes = points[:grams].copy()
    for offset in range(1, GRAM):
        hashes *= _MULTIPLIER
        hashes += points[offset : offset + grams]
    # The last mixing step of MurmurHash3: the low bits of a polynomial depend on the last character only.
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    # The 4 grams that start in the padding between two texts belong to neither.
    inside = np.ones(grams, dtype=bool)
    ends = np.cumsum(lengths) + (GRAM - 1) * np.arange(len(texts))
    for offset in range(GRAM - 1):
        padded = ends + offset
        inside[padded[padded < grams]] = False
    offsets = np.zeros(len(texts) + 1, dtype=np.uint64)
    np.cumsum(lengths, out=offsets[1:], dtype=np.uint64)
    return hashes[inside], offsets


def near_duplicate_of(signatures: np.ndarray, tick: Callable[[], None] = lambda: None) -> np.ndarray:
    """Return, int64 [n], -1 for every document that is kept and else the index of the earlier one it duplicates.

    `signatures` is uint32 [n, 128] in order of priority: the first of a group of near duplicates is kept. Groups are
    closed under union, so the kept document may differ more from a far member than from a near one.
    `tick` is called after each band. Raises ValueError for another shape.
    """
    if signatures.ndim != 2 or signatures.shape[1] != SLOTS:
        raise ValueError(f"signatures must have shape [n, {SLOTS}], found {list(signatures.shape)}")
    root = np.arange(len(signatures))
    for band in range(BANDS):
        _join_band(root, signatures, band)
        root = _flatten(root)
        tick()
    return np.where(root == np.arange(len(root)), -1, root)


def _join_band(root: np.ndarray, signatures: np.ndarray, band: int) -> None:
    """Join, in place, the groups of documents that are equal in one band and alike in all slots."""
    keys = _band_keys(signatures[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND])
    # A stable sort keeps documents of one bucket in order, so the first of a bucket has the smallest index.
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    same = np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1]) + 1
    starts = np.ones(len(keys), dtype=bool)
    starts[same] = False
    first = order[np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))][same]
    # Also the neighbour: the first of a bucket may be a stranger that shares this band only.
    pairs = np.stack([np.concatenate([first, order[same - 1]]), np.concatenate([order[same], order[same]])])
    for low in range(0, pairs.shape[1], _VERIFY_CHUNK):
        chunk = pairs[:, low : low + _VERIFY_CHUNK]
        # Pairs joined in an earlier band need no second verification.
        chunk = chunk[:, root[chunk[0]] != root[chunk[1]]]
        equal = np.count_nonzero(signatures[chunk[0]] == signatures[chunk[1]], axis=1)
        _union(root, chunk[:, equal >= MIN_AGREEMENT * SLOTS])


def _band_keys(band: np.ndarray) -> np.ndarray:
    keys = np.zeros(len(band), dtype=np.uint64)
    for column in range(band.shape[1]):
        keys ^= band[:, column]
        keys *= _MULTIPLIER
        keys ^= keys >> np.uint64(29)
    return keys


def _union(root: np.ndarray, pairs: np.ndarray) -> None:
    """Join the groups of each pair under the smallest index; `root` holds parent links, in place."""
    for left, right in pairs.T.tolist():
        while (parent := int(root[left])) != left:
            left = parent
        while (parent := int(root[right])) != right:
            right = parent
        if left != right:
            root[max(left, right)] = min(left, right)


def _flatten(root: np.ndarray) -> np.ndarray:
    """Return parent links followed to their ends; each step halves the longest path."""
    while True:
        shorter = root[root]
        if np.array_equal(shorter, root):
            return root
        root = shorter
