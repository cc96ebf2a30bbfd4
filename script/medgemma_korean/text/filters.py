"""Decide which cleaned documents are kept: `drop_reason` returns None, or the one reason that is counted.

The word lists and their version live in `filter_words.json`; thresholds are the constants below.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from importlib import resources

import numpy as np

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
# Menus and page footers: several different phrases, close together.
MIN_BOILERPLATE_PHRASES = 4
MIN_BOILERPLATE_DENSITY = 4.0
# Share of characters in lines that repeat an earlier line (Gopher uses 0.20 on English web pages; Korean comment pages
# and game tables repeat short lines legitimately).
MAX_REPEATED_SHARE = 0.50
MIN_LINES_TO_REPEAT = 6

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

    `language` is "ko" or "en". Reasons, in the order of the checks: redirect, too_short, korean_ratio or english_ratio,
    adult, advertisement, boilerplate. Raises ValueError for another language.
    """
    if language not in ("ko", "en"):
        raise ValueError(f"unknown language {language!r}: expected 'ko' or 'en'")
    if _REDIRECT.match(text):
        return "redirect"
    if len(text) < MIN_CHARACTERS:
        return "too_short"
    if language == "ko" and korean_share(text) < MIN_KOREAN_SHARE:
        return "korean_ratio"
    if language == "en" and latin_share(text) < MIN_ENGLISH_SHARE:
        return "english_ratio"
    if is_adult(text):
        return "adult"
    if is_advertisement(text):
        return "advertisement"
    if is_boilerplate(text):
        return "boilerplate"
    return None


def korean_share(text: str) -> float:
    """Return Hangul syllables and jamo over all characters that are not white space; 0.0 without any."""
    points, characters = _visible(text)
    korean = (points >= 0xAC00) & (points <= 0xD7FB)
    korean |= (points >= 0x3131) & (points <= 0x318E)
    korean |= (points >= 0x1100) & (points <= 0x11FF)
    return float(np.count_nonzero(korean)) / characters if characters else 0.0


def latin_share(text: str) -> float:
    """Return Latin letters, accented ones included, over all characters that are not white space; 0.0 without any."""
    points, characters = _visible(text)
    # Setting bit 5 maps A-Z onto a-z.
    lower = points | 0x20
    latin = (lower >= 0x61) & (lower <= 0x7A)
    latin |= (points >= 0xC0) & (points <= 0x24F) & (points != 0xD7) & (points != 0xF7)
    return float(np.count_nonzero(latin)) / characters if characters else 0.0


def _visible(text: str) -> tuple[np.ndarray, int]:
    """Return the code points of `text`, uint32 [n], and how many are no white space."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    spaces = np.count_nonzero(points <= 0x20) + np.count_nonzero((points == 0xA0) | (points == 0x3000))
    return points, len(points) - int(spaces)


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
    """Return whether advertising phrases are both frequent and dense."""
    hits = _count("advertisement", text)
    return hits >= MIN_ADVERTISEMENT_HITS and hits * 1000 >= MIN_ADVERTISEMENT_DENSITY * len(text)


def is_boilerplate(text: str) -> bool:
    """Return whether the text is mostly page furniture, or mostly lines that repeat each other."""
    found = Counter(_pattern("boilerplate").findall(text.lower()))
    if len(found) >= MIN_BOILERPLATE_PHRASES and found.total() * 1000 >= MIN_BOILERPLATE_DENSITY * len(text):
        return True
    lines = [line for line in text.split("\n") if line]
    if len(lines) < MIN_LINES_TO_REPEAT:
        return False
    repeated = sum(map(len, lines)) - sum(map(len, set(lines)))
    return repeated > MAX_REPEATED_SHARE * len(text)


def _count(name: str, text: str) -> int:
    return len(_pattern(name).findall(text))
