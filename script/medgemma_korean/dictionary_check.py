"""Everything that can be wrong with the five dictionary files, told at once, before anything large is downloaded.

An error is what the refiner cannot use rightly, or a file that is most likely not what its name says; it refuses. A
warning is what the refiner repairs, merges or leaves out and counts; it is told and recorded.

    checked = check_files(folder)
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medgemma_korean.dictionary import lost_hanja
from medgemma_korean.dictionary_files import (
    BY_NAME,
    MANUAL_FILES,
    MOST,
    ManualFile,
    Pair,
    Problem,
    has_hangul,
    in_words,
    is_everyday_syllable,
    quote,
    read_pairs,
    share_of_hangul,
)
from medgemma_korean.paths import show

# Thresholds. "Measured" is on the five files of data/sample (30 to 100 entries) and on five of 119 to 666 entries made
# from public lists (KCD names, acupuncture points); `MOST` also on the 6,072 headwords of a dictionary in use.
FEW = 10  # entries; a person without a veterinary dictionary may write a handful, so fewer is a warning, not an error
TOO_EMPTY = 0.1  # share of entries without a term or a definition; measured: 0 to 1 %, which the refiner leaves out
SAME_SHARE, SAME_NUMBER = 0.2, 5  # one text for so many entries is a placeholder; measured: 2 uses, 7 % of a small file
LONG_TERM = 300  # characters; the longest measured is 143, an English name of the KCD
LONG_DEFINITION = 3000  # characters, about a page; the longest measured is 376


@dataclass
class Checked:
    """What `check_files` found: sentences that refuse, sentences that do not, and entries by file name."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def check_files(folder: Path, converted: Mapping[str, bytes] | None = None) -> Checked:
    """Every problem of all five files. converted: content of files that are about to be written, by name."""
    checked, seen = Checked(), {}
    for manual in MANUAL_FILES:
        path = folder / manual.name
        data = (converted or {}).get(manual.name)
        if data is None and not path.is_file():
            checked.errors.append(f"{show(path)} is missing: {manual.holds}{_like_it(path)}")
            continue
        pairs, problems = check(path.read_bytes() if data is None else data, manual)
        # With the shape: the categorised file may well hold the plain one's terms.
        content = (manual.shape, [pair[:2] for pair in pairs])
        if pairs and content in seen.values():
            other = next(name for name, known in seen.items() if known == content)
            problems.append(Problem("twin", None, f"holds the same entries as {other}", error=False))
        seen[manual.name] = content
        checked.errors += in_words(path, [problem for problem in problems if problem.error])
        checked.warnings += in_words(path, [problem for problem in problems if not problem.error])
        checked.counts[manual.name] = len(pairs)
    return checked


def check(data: bytes, manual: ManualFile) -> tuple[list[Pair], list[Problem]]:
    """The pairs of one file's bytes and all its problems, those of reading and those of content."""
    pairs, problems = read_pairs(data, manual)
    unread = any(problem.error for problem in problems)
    if not pairs and not unread:
        problems.append(Problem("empty", None, "has no entries"))
    for test in CHECKS:
        # The few entries of a file that could not be read to its end say nothing.
        if pairs and not (unread and test is _few):
            problems += test(pairs, manual)
    return pairs, problems


def _like_it(path: Path) -> str:
    """A file beside the missing one whose name is nearly right, such as the copy that a browser numbered."""
    others = [p.name for p in path.parent.glob("*") if p.is_file() and p.name not in BY_NAME]
    close = difflib.get_close_matches(path.name, others, 1, cutoff=0.85)
    return f"; is it {close[0]!r}, under another name?" if close else ""


# content ------------------------------------------------------------------------------------------------

# What the refiner drops; tabs and breaks of all kinds become blanks.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Names that mark-up has; "<닭>" and "p < a" are text.
_MARKUP = re.compile(
    r"</?(?:a|b|i|u|p|br|hr|li|ul|ol|dl|dt|dd|td|tr|th|em|div|sub|sup|img|pre|span|font|table|strong|BR|FONT|TABLE)"
    r"(?:\s[^<>]{0,500})?/?>|&(?:[a-z]{2,8}|#[0-9]{2,6}|#x[0-9a-fA-F]{2,5});"
)
# Not "Na" or "x", which are answers ("나트륨").
PLACEHOLDERS = {
    "n/a", "#n/a", "nan", "none", "null", "tbd", "todo", "-", "--", "?", "??", ".", "xxx", "#ref!", "#value!", "#name?",
    "없음", "미정", "미입력", "정의 없음", "내용 없음", "해당 없음", "뜻 없음",
}  # fmt: skip
# (the encoding that the bytes were read in, the one that they are in); one that lacks a byte falls back on the next.
MISREADINGS = (("cp1252", "utf-8"), ("cp874", "utf-8"), ("cp949", "utf-8"), ("cp1252", "cp949"))
# What Korean bytes look like in the encodings of Western Europe and Thailand; a text without it need not be tried.
_FOREIGN = re.compile("[\x80-\xff\u0152-\u0178\u0192\u02c6\u02dc\u0e00-\u0e7f\u2013-\u203a\u20ac\u2122]{3,}")


def undo_misreading(text: str) -> str | None:
    """What a text was before it was read in a wrong encoding ("ê°„ì—¼" was "간염"); None for a sound one.

    The proof is the way back: as bytes of the wrong encoding it must be Hangul of everyday words in the right one, all
    but the ends of what was cut. Sound Korean or English never is; a row of dots ("····") would be one syllable.
    """
    foreign = " ".join(_FOREIGN.findall(text))
    for wrong, right in MISREADINGS:
        sample = text if wrong == "cp949" else foreign
        if sample.isascii():
            continue
        back = sample.encode(wrong, "replace") if wrong == "cp949" else b"".join(_to_bytes(c, wrong) for c in sample)
        found = back.decode(right, "replace")
        hangul = [c for c in found if is_everyday_syllable(c)]
        if len(set(hangul)) >= 2 and found.count("\ufffd") <= len(hangul) / 2:
            return found
    return None


def _to_bytes(character: str, wrong: str) -> bytes:
    for encoding in (wrong, "cp1252", "latin-1"):
        try:
            return character.encode(encoding)
        except UnicodeEncodeError:
            continue
    return b"?"


def _few(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    if len(pairs) < FEW:
        number = "a single entry" if len(pairs) == 1 else f"only {len(pairs)} entries"
        yield Problem("few", None, f"holds {number}; is it complete?", error=False)


def _empty(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    found = [pair for pair in pairs if not pair.key.strip() or not pair.value.strip()]
    for pair in found:
        side = "definition" if pair.key.strip() else "term"
        yield Problem("no text", pair.line, f"{quote(pair.key)}: empty {side}", len(found) > TOO_EMPTY * len(pairs))


def _damaged(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    for pair in pairs:
        for text in pair[:2]:
            if "\ufffd" in text:
                words = f"{quote(text)}: a letter was lost in a conversion (U+FFFD); take it from the source again"
                yield Problem("lost letters", pair.line, words)
            elif was := undo_misreading(text):
                words = f"{quote(text)} was read in a wrong encoding, it is {quote(was)}; convert the source anew"
                yield Problem("mojibake", pair.line, words)
            elif control := _CONTROL.search(text):
                words = f"{quote(text)}: a control character (U+{ord(control[0]):04X}), which is left out"
                yield Problem("control", pair.line, words, error=False)


def _hanja(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    for pair in pairs:
        term = pair.value if manual.reversed else pair.key
        if lost_hanja(term):
            words = f"{quote(term)}: its Hanja were lost or cut in a conversion; the bracket is left out"
            yield Problem("hanja", pair.line, words, error=False)


def _marked_up(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    for pair in pairs:
        if mark := _MARKUP.search(pair.key) or _MARKUP.search(pair.value):
            words = f"{quote(pair.key)}: mark-up ({quote(mark[0])}), which would be learned as text; remove it"
            yield Problem("mark-up", pair.line, words, error=False)


def _long(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    for pair in pairs:
        for text, limit in (
            (pair.key, LONG_TERM),
            (pair.value, LONG_DEFINITION if manual.shape == "lines" else LONG_TERM),
        ):
            if len(text) > limit:
                words = f"{quote(text)}: {len(text):,} characters; are several entries glued together?"
                yield Problem("long", pair.line, words, error=False)


def _placeholders(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    for pair in pairs:
        if pair.value.strip().casefold() in PLACEHOLDERS:
            words = f"{quote(pair.key)}: {quote(pair.value)} is no definition; leave the entry out"
            yield Problem("placeholder", pair.line, words, error=False)


def _same(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    distinct = list({pair[:2]: pair for pair in reversed(pairs)}.values())[::-1]
    for side in (0, 1):
        uses = Counter(pair[side] for pair in distinct if pair[side].strip())
        for text, number in uses.most_common(1):
            if number >= SAME_NUMBER and number > SAME_SHARE * len(distinct):
                line = next(pair.line for pair in distinct if pair[side] == text)
                words = (
                    f"{quote(text)} stands in {number:,} of {len(distinct):,} entries: a placeholder or a wrong column"
                )
                yield Problem("same text", line, words)


def _equal(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    found = [pair for pair in pairs if pair.key.strip().casefold() == pair.value.strip().casefold()]
    if len(found) > MOST * len(pairs):
        words = f"{quote(found[0].key)} and {len(found) - 1:,} other entries of {len(pairs):,} only repeat their term"
        yield Problem("equal", found[0].line, words)


def _doubled(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    double = len(pairs) - len({pair[:2] for pair in pairs})
    if double > MOST * len(pairs):
        words = f"holds {double:,} entries twice or more often, of {len(pairs):,}; they are merged"
        yield Problem("double", None, words, error=False)


def _direction(pairs: Sequence[Pair], manual: ManualFile) -> Iterator[Problem]:
    """Korean and English on the sides where they belong; a definition of the two .jsonl files may be either."""
    keys, values = (
        share_of_hangul(pair.key for pair in pairs) > MOST,
        share_of_hangul(pair.value for pair in pairs) > MOST,
    )
    if manual.shape == "lines":
        if not keys:
            first = next(pair for pair in pairs if not has_hangul(pair.key))
            where = "; this looks like bilingual_medical_dict.json in another form" if values else ""
            yield Problem("direction", first.line, f"{quote(first.key)}: most terms are not Korean{where}")
        return
    wanted = (False, True) if manual.reversed else (True, False)
    if (keys, values) == wanted:
        return
    first = next(pair for pair in pairs if (has_hangul(pair.key), has_hangul(pair.value)) != wanted)
    entry = f"{quote(first.key)}: {quote(first.value)}"
    if (values, keys) == wanted:
        other = "this looks like bilingual_medical_dict.json"
        if manual.shape == "categories":
            other = "English must come first"
        elif manual.reversed:
            other = "this looks like bilingual_medical_dict_ko_en.json"
        words = f"{entry}: the two languages are swapped; {other}"
    elif keys:
        words = f"{entry}: Korean on both sides in most entries; Korean definitions belong in korean_medical_dict.jsonl"
    else:
        words = f"{entry}: no Korean in most entries"
    yield Problem("direction", first.line, words)


CHECKS = (_few, _empty, _damaged, _hanja, _marked_up, _long, _placeholders, _same, _equal, _doubled, _direction)
