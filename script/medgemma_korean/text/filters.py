"""Decide which cleaned documents are kept: `drop_reasons` returns None, or the one reason that is counted, for each.

The word lists and their version live in `filter_words.json`; thresholds are the constants below.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import repeat

import numpy as np

from medgemma_korean.text.points import batches, points_of

# Shorter texts are captions and menus; a training sequence gains nothing from them.
MIN_CHARACTERS = 100
# Korean medical text mixes in Latin terms, codes and tables, so the bound is low: it stops foreign pages only.
MIN_KOREAN_SHARE = 0.10
# English prose has about 0.95; tables of results about 0.6. Half means "mostly".
MIN_ENGLISH_SHARE = 0.50
# One unambiguous compound may be a quotation, whatever stands beside it ("일본야동 배우의 광고를 금지해 주세요").
MIN_ADULT_HITS = 2
# What must remain of the score after medical and reporting words are subtracted.
MIN_ADULT_SCORE = 2.0
# Hits per 1,000 characters: two mentions in a long novel or encyclopedia page do not make it adult text.
MIN_ADULT_DENSITY = 0.5
# A word that is ambiguous alone counts half, and only beside an unambiguous one.
ADULT_CONTEXT_WEIGHT = 0.5
# Subtracted in full, without a cap: a medical page may repeat a compound as often as it likes, because it repeats its
# medical words more often; spam holds one for every five of its own.
MEDICAL_WEIGHT = 1.0
# Reports about crimes quote the words of the trade, but spam mentions the police too ("단속 걱정 없는"): half weight.
REPORTING_WEIGHT = 0.5
# A page may mention "무료 상담" once or twice; three such phrases, one per 1,000 characters, are an advertisement.
MIN_ADVERTISEMENT_HITS = 3
MIN_ADVERTISEMENT_DENSITY = 1.0
# A clinic's leaflet that also says "예약 문의" teaches medicine; an advertisement of surgery has fewer such words.
ADVERTISEMENT_MEDICAL_WEIGHT = 0.25
# Menus and page footers: several different phrases, close together.
MIN_BOILERPLATE_PHRASES = 4
MIN_BOILERPLATE_DENSITY = 4.0
# Share of characters in lines that repeat an earlier line (Gopher uses 0.20 on English web pages; Korean comment pages
# and game tables repeat short lines legitimately).
MAX_REPEATED_SHARE = 0.50
MIN_LINES_TO_REPEAT = 6

# The search for phrases compares so many of their first characters, by hashes of 20 bits.
_START = 8
_SHIFT = np.uint32(12)
_MULTIPLIER = np.uint32(0x9E3779B1)

# In the order of the checks.
DROP_REASONS = {
    "ko": ("redirect", "too_short", "korean_ratio", "adult", "advertisement", "boilerplate"),
    "en": ("redirect", "too_short", "english_ratio", "adult", "advertisement", "boilerplate"),
}

_REDIRECT = re.compile(r"\s*#\s?(?:redirect|넘겨주기)[\s:\[]", re.IGNORECASE)


@cache
def word_lists() -> dict:
    """Return `filter_words.json`: a "version" and lists of phrases. Raises ValueError when the version is missing."""
    lists = json.loads(resources.files(__package__).joinpath("filter_words.json").read_text(encoding="utf-8"))
    if not isinstance(lists.get("version"), int):
        raise ValueError("filter_words.json: 'version' must be an integer")
    return lists


@cache
def _pattern(name: str) -> re.Pattern[str]:
    # The longest phrase first, so that "성인 동영상" is not counted as a shorter entry plus a rest.
    phrases = sorted(set(word_lists()[name]), key=lambda phrase: (-len(phrase), phrase))
    return re.compile("|".join(re.escape(phrase).replace(r"\ ", " ?") for phrase in phrases))


def drop_reason(text: str, language: str) -> str | None:
    """Return why a cleaned document is dropped, or None when it is kept.

    `language` is "ko" or "en". The reasons and their order are DROP_REASONS. Raises ValueError for another language.
    """
    return drop_reasons([text], language)[0]


def drop_reasons(texts: Sequence[str], language: str) -> list[str | None]:
    """Return `drop_reason` of every document, which takes a quarter of the time that one by one takes."""
    if language not in _SHARES:
        raise ValueError(f"unknown language {language!r}: expected 'ko' or 'en'")
    reasons: list[str | None] = []
    for batch in batches(texts):
        points, ends = _joined(batch)
        shares = _SHARES[language](points, ends).tolist()
        phrases = _may_hold_phrases(points, ends).tolist()
        reasons += map(_reason, batch, shares, phrases, repeat(language))
    return reasons


def _reason(text: str, share: float, phrases: bool, language: str) -> str | None:
    if _REDIRECT.match(text):
        return "redirect"
    if len(text) < MIN_CHARACTERS:
        return "too_short"
    if language == "ko" and share < MIN_KOREAN_SHARE:
        return "korean_ratio"
    if language == "en" and share < MIN_ENGLISH_SHARE:
        return "english_ratio"
    if phrases and is_adult(text):
        return "adult"
    if phrases and is_advertisement(text):
        return "advertisement"
    if (phrases and is_page_furniture(text)) or repeats_lines(text):
        return "boilerplate"
    return None


def _joined(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the code points of all texts, each with a 0 behind it, uint32, and where the next one starts, int64."""
    ends = np.cumsum(np.fromiter((len(text) + 1 for text in texts), dtype=np.int64, count=len(texts)))
    return points_of("\0".join([*texts, ""])), ends


def korean_share(text: str) -> float:
    """Return Hangul syllables and jamo over all characters that are not white space; 0.0 without any."""
    return float(_korean_shares(*_joined([text]))[0])


def latin_share(text: str) -> float:
    """Return Latin letters, accented ones included, over all characters that are not white space; 0.0 without any."""
    return float(_latin_shares(*_joined([text]))[0])


def _korean_shares(points: np.ndarray, ends: np.ndarray) -> np.ndarray:
    korean = (points >= 0xAC00) & (points <= 0xD7FB)
    korean |= (points >= 0x3131) & (points <= 0x318E)
    korean |= (points >= 0x1100) & (points <= 0x11FF)
    return _shares(korean, points, ends)


def _latin_shares(points: np.ndarray, ends: np.ndarray) -> np.ndarray:
    # Setting bit 5 maps A-Z onto a-z.
    lower = points | 0x20
    latin = (lower >= 0x61) & (lower <= 0x7A)
    latin |= (points >= 0xC0) & (points <= 0x24F) & (points != 0xD7) & (points != 0xF7)
    return _shares(latin, points, ends)


_SHARES = {"ko": _korean_shares, "en": _latin_shares}


def _shares(chosen: np.ndarray, points: np.ndarray, ends: np.ndarray) -> np.ndarray:
    visible = (points > 0x20) & (points != 0xA0) & (points != 0x3000)
    return _count_each(chosen, ends) / np.maximum(_count_each(visible, ends), 1)


def _count_each(mask: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return how many of a mask over all texts are true in each of them."""
    return np.diff(np.searchsorted(np.flatnonzero(mask), ends), prepend=0)


def _may_hold_phrases(points: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return bool: whether the start of any adult, advertising or boilerplate phrase stands in a text.

    Searching for hundreds of phrases takes ten times as long; one text in thirty is left to be searched.
    """
    table = _phrase_starts()
    # Bit 5 is set for a search without case; what else it makes equal is found out by the real search.
    lower = np.append(points, np.zeros(_START, dtype=np.uint32)) | np.uint32(0x20)
    hashes = (lower[:-_START] * _MULTIPLIER + lower[1 : 1 - _START]) * _MULTIPLIER
    marks = table.take(hashes >> _SHIFT, mode="wrap")  # no index is too large, and other modes are slower
    positions = np.flatnonzero(marks != 0)
    hashes, found = hashes[positions], marks[positions] & 2
    for size in range(3, _START + 1):
        hashes = (hashes + lower[positions + size - 1]) * _MULTIPLIER
        found |= table[hashes >> _SHIFT] & np.uint8(1 << (size - 1))
    result = np.zeros(len(ends), dtype=bool)
    result[np.searchsorted(ends, positions[found != 0], side="right")] = True
    return result


@cache
def _phrase_starts() -> np.ndarray:
    """Return uint8 [2^20] by hash: bit 0 for the first two characters of phrases, bit n-1 for their first n or all."""
    table = np.zeros(1 << (32 - int(_SHIFT)), dtype=np.uint8)
    for phrase in itertools.chain.from_iterable(
        word_lists()[name] for name in ("adult", "advertisement", "boilerplate")
    ):
        for spaces in itertools.product(("", " "), repeat=phrase.count(" ")):
            written = "".join(map(str.__add__, phrase.lower().split(" "), (*spaces, "")))
            value = 0
            for size, character in enumerate(written[:_START], 1):
                value = (value + (ord(character) | 0x20)) * int(_MULTIPLIER) % 2**32
                if size == 2:
                    table[value >> int(_SHIFT)] |= 1
            table[value >> int(_SHIFT)] |= 1 << (size - 1)
    return table


def adult_score(text: str) -> float:
    """Return the adult score: unambiguous compounds, plus context beside them, minus medical and reporting words.

    0.0 below two compounds; negative when medicine or reporting prevails.
    """
    hits = _count("adult", text)
    if hits < MIN_ADULT_HITS:
        return 0.0
    context = ADULT_CONTEXT_WEIGHT * _count("adult_context", text)
    subtracted = MEDICAL_WEIGHT * _count("medical", text) + REPORTING_WEIGHT * _count("reporting", text)
    return hits + context - subtracted


def is_adult(text: str) -> bool:
    """Return whether the text is adult spam; never true for medical vocabulary alone."""
    score = adult_score(text)
    return score >= MIN_ADULT_SCORE and score * 1000 >= MIN_ADULT_DENSITY * len(text)


def is_advertisement(text: str) -> bool:
    """Return whether advertising phrases are both frequent and dense, beside the medical words of the text."""
    hits = _count("advertisement", text)
    if hits >= MIN_ADVERTISEMENT_HITS:
        hits -= ADVERTISEMENT_MEDICAL_WEIGHT * _count("medical", text)
    return hits >= MIN_ADVERTISEMENT_HITS and hits * 1000 >= MIN_ADVERTISEMENT_DENSITY * len(text)


def is_boilerplate(text: str) -> bool:
    """Return whether the text is mostly page furniture, or mostly lines that repeat each other."""
    return is_page_furniture(text) or repeats_lines(text)


def is_page_furniture(text: str) -> bool:
    """Return whether phrases of menus and page footers are both various and dense."""
    found = Counter(_pattern("boilerplate").findall(text.lower()))
    return len(found) >= MIN_BOILERPLATE_PHRASES and found.total() * 1000 >= MIN_BOILERPLATE_DENSITY * len(text)


def repeats_lines(text: str) -> bool:
    """Return whether most characters stand in lines that repeat an earlier line."""
    lines = [line for line in text.split("\n") if line]
    distinct = set(lines)
    if len(lines) < MIN_LINES_TO_REPEAT or len(distinct) == len(lines):
        return False
    return sum(map(len, lines)) - sum(map(len, distinct)) > MAX_REPEATED_SHARE * len(text)


def _count(name: str, text: str) -> int:
    return len(_pattern(name).findall(text))
