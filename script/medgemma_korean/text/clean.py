"""Clean raw text for training: one pure function per raw source, and two normalisers for short fields.

Every expression is bounded or cannot backtrack, and stands behind a literal guard: most documents lack most of what is
searched for, and a plain `in` test is far cheaper than a search.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from medgemma_korean.text.namumark import lowered, raised, strip_markup

# Raise it when a rule changes: it is part of the stage fingerprint, so that old refined text is redone.
CLEAN_VERSION: int = 4

# Raw folder name -> rule set; what is not listed is web text.
SOURCE_RULES: dict[str, str] = {
    "namu_wiki": "namumark",
    "wikipedia-korean": "wikitext",
    "wikipedia_ko_2024": "wikitext",
    "00_english_replay": "wikitext",
}
_RULES = ("namumark", "wikitext", "web")

# Control characters, soft hyphen, grapheme joiner, Hangul and Khmer fillers, zero-width and direction marks, variation
# selectors, byte-order mark, replacement and object characters, lone surrogates (they cannot be written as UTF-8), and
# private use. The last range holds tags and selectors as well; it is one because the engine tries each range above the
# first plane on every character.
_INVISIBLE_CLASS = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\ufffd\ud800-\udfff\ue000-\uf8ff\U000e0000-\U0010ffff"
)
_BREAK_CLASS = "\r\x0b\x0c\x85\u2028\u2029"
# U+3164 and U+FFA0 are Hangul fillers, shown as a blank.
_SPACE_CLASS = "\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000\u3164\uffa0"
_WIDE_SIGNS = "０＠"
# One scan tells which of them a text holds; most texts hold none.
_UNUSUAL = re.compile(f"[{_INVISIBLE_CLASS}{_BREAK_CLASS}{_SPACE_CLASS}{_WIDE_SIGNS}]")
# Distinct ones, above which expressions replace them: each takes a pass of its own otherwise.
MANY_KINDS = 16
INVISIBLE = re.compile(f"[{_INVISIBLE_CLASS}]+")
_LINE_BREAK = re.compile(f"\r\n|[{_BREAK_CLASS}]")
_WIDE_SPACE = re.compile(f"[{_SPACE_CLASS}]")
_SPACES = re.compile("  +")
_BLANK_LINES = re.compile("\n\n\n+")

_TAG_NAMES = (
    "a|abbr|address|area|article|aside|audio|b|big|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd"
    "|del|details|div|dl|dt|em|embed|figcaption|figure|font|footer|form|h1|h2|h3|h4|h5|h6|head|header|hr|html|i"
    "|iframe|img|input|ins|kbd|label|li|link|main|map|mark|math|meta|nav|noinclude|nobr|noscript|nowiki|object|ol"
    "|onlyinclude|option|p|param|poem|pre|q|references|rp|rt|ruby|s|samp|section|select|small|source|span|strike"
    "|strong|sub|summary|sup|svg|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul|var|video|wbr|includeonly"
)
_TAGS = frozenset(_TAG_NAMES.split("|"))
# Only known names: "<The Lancet>", "<웰컴 백>" and "p <a" are prose. Attributes must hold "=".
# The name is looked up for whole tags alone: an expression that tries ninety names at every "<" takes 0.2 s a megabyte.
_TAG = re.compile(
    r"</?([A-Za-z][A-Za-z0-9]{0,11})(?:\s[^<>=]{0,60}=[^<>]{0,2000})?\s{0,3}/?>|<!doctype[^<>]{0,200}>", re.IGNORECASE
)
# "</br>" is a common slip, which browsers and wikis show as a break.
_BREAK_TAG = re.compile(
    r"<(?:br|hr|tr|li|p|dt)(?:\s[^<>=]{0,60}=[^<>]{0,2000})?\s{0,3}/?>"
    r"|</(?:br|p|div|li|tr|h[1-6]|table|ul|ol|dl|dd|dt|blockquote|title|td)\s{0,3}/?>",
    re.I,
)
_RAISED_TAG = re.compile(r"<(su[bp])>([^<>]{1,40})</su[bp]>", re.I)
# Elements whose content is never prose; the closer is found by a scan, see `_cut_elements`.
_ELEMENT = re.compile(r"<!--|<(script|style|ref|gallery|timeline|imagemap)(?:\s[^<>]{0,1000})?/?>", re.IGNORECASE)

# A removed address or number leaves this mark until the space or brackets around it are removed too. It cannot stand in
# the text, because control characters are gone by then.
_REMOVED = "\x00"
# The same, where the year of birth or the bracket before it goes too.
_REMOVED_WITH = "\x01"
_BEFORE_REMOVED = re.compile(f"(?:[0-9]{{2}}|\\()?{_REMOVED_WITH}")
_REMOVED_BRACKETS = re.compile(f"\\((?:(?:출처|참조|참고|링크|관련 ?기사)[ :]{{0,3}}| ?){_REMOVED} ?\\)")
# "자료는 www.cdc.gov에서 본다" must not become "자료는에서 본다": the particle goes too, unless a bare noun
# stands before it, as in "경찰 112에".
_NO_NOUN = "|".join(
    f"(?<={before}{_REMOVED})"
    for before in (
        "^",
        *(f"{end}{space}" for end in ("[^가-힣 ]", "[은는을를이가에의로와과도만서고며면라]") for space in ("", " ")),
    )
)
_REMOVED_PARTICLE = re.compile(
    f"{_REMOVED}(?:{_NO_NOUN})(?:에서|으로|이라는|라는|[을를은는이가의에로와과도만])[은는도만]?(?![가-힣])"
)
_REMOVED_FORMS = (
    f" <{_REMOVED}>",
    f"<{_REMOVED}>",
    f" {_REMOVED}",
    _REMOVED,
)

# Below, a pattern starts with a literal or a class, which the engine finds fast, and looks back from there:
# "0(?<![0-9]0)" is "0" that no digit precedes. Without the look-back every offset of a long token would be tried.
# ASCII only: an address glued to Hangul ends where the Korean particle starts. Its last character is never a full stop
# or a comma, because those belong to the sentence.
_URL_BODY = r"(?:[A-Za-z0-9\-._~:/?#@!$&*+,;=%]*[A-Za-z0-9/=&#_%~*\-])?"
_URL = re.compile(rf"(?:[Hh][TtXx][TtXx][Pp][Ss]?://|[Ff][Tt][Pp]://|[Ww][Ww][Ww]\.){_URL_BODY}")
# Without a scheme only a host with a path is an address: "1.5" and "Amazon.com" are text.
_HOST_END = re.compile(r"\.(?:com|net|org|kr|me|ly|be|gl|gg|tv)/")
_BARE_URL = re.compile(
    r"[A-Za-z0-9](?<![A-Za-z0-9@._/-][A-Za-z0-9])[A-Za-z0-9-]{0,62}(?:\.[A-Za-z0-9-]{1,63}){0,4}"
    rf"{_HOST_END.pattern}{_URL_BODY}"
)
_EMAIL = re.compile(
    r"[A-Za-z0-9._%+-](?<![A-Za-z0-9._%+-]{2})[A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
)
# Every hyphen, dash and minus sign that people type in numbers.
_DASHES = "-‐-―−－"
_DASH = f"[ ]?[{_DASHES}][ ]?"
# A sign before a number may end a word or a label, as in "연락처:02-…", "Tel.02-…" and "홍길동/010-…", but not belong
# to another number: "1:02", ".02", "p-02". Formatted with what the number begins with.
_NUMBER_START = r"(?<![0-9A-Za-z+]{0})(?<![0-9][.,/:;~-]{0})(?<![^A-Za-z가-힣)]\.{0})(?<![A-Za-z]-{0})"
# What stands directly after must not continue a longer number.
_NUMBER_END = rf"(?![0-9]|[.,/:~{_DASHES}][0-9])"
# Six digits that are a date, then a century digit: no other number in medicine has this form. With a space they could
# be two numbers, so fewer centuries count. Found by the 0 or 1 of the month, which the scans for telephones look for
# anyway; the match begins there, after the year.
_BIRTH_START = r"(?<=[0-9]{{2}}{0})(?<![0-9A-Za-z.-][0-9]{{2}}{0})"
_BIRTH_END = (
    rf"(?:0[1-9]|[12][0-9]|3[01])"
    rf"(?:{_DASH}[1-8](?:[0-9]{{6}}|[*xX●○]{{6}})(?![0-9])|[ ][1-4][0-9]{{6}}{_NUMBER_END})"
)
# Area codes, internet (070), free (080) and personal (050) numbers. Decimals, dates, CAS and page numbers do not
# start with such a code.
_AREA_REST = r"(?:2|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70|80|60|50[2-8]?)"
_TELEPHONE_REST = (
    # Mobile numbers also occur with spaces or unseparated; 010 is followed by 2-9, unlike the binary 01011010110.
    rf"(?:1[016789](?:{_DASH}|\.[ ]?|[ )]{{1,2}})[0-9]{{3,4}}(?:{_DASH}|[. ][ ]?)[0-9]{{4}}"
    rf"|10(?:{_DASH})?[2-9][0-9]{{7}}"
    rf"|{_AREA_REST}(?:{_DASH}|\)[ ]?[{_DASHES}]?|\.)[0-9]{{3,4}}(?:{_DASH}|\.[ ]?)[0-9]{{4}})"
)
# The further numbers of a list without spaces: "/02-345-6780", ",345-6780", "~90".
_TELEPHONE_TAIL = (
    rf"(?:[,/](?:0{_TELEPHONE_REST}|[2-9][0-9]{{2}}-[0-9]{{4}}|1[568][0-9]{{2}}-[0-9]{{4}}(?!년))){{0,20}}"
    r"(?:[~∼][0-9]{1,4}|[,/][0-9]{4}(?![0-9년월]))?"
    # A comma and a slash may begin something else.
    rf"(?![0-9]|[.:~{_DASHES}][0-9])"
)
_TELEPHONE = re.compile(
    rf"0(?:{_NUMBER_START.format(0)}(?:{_TELEPHONE_REST}{_TELEPHONE_TAIL}"
    # Spaces alone need a cue, or brackets around the code.
    rf"|({_AREA_REST}(?:\)[ ]?|[ ])[0-9]{{3,4}}[ ][0-9]{{4}}{_NUMBER_END}))"
    rf"|[1-9]{_BIRTH_START.format('0.')}({_BIRTH_END}))"
)
_FOREIGN_TELEPHONE = re.compile(
    rf"\+82[{_DASHES}. ]{{0,2}}(?:\(0\))?0?[1-9][0-9]?[{_DASHES}. )]{{0,2}}[0-9]{{3,4}}[{_DASHES}. ]?[0-9]{{4}}"
    + _NUMBER_END
)
_SERVICE_NUMBER = re.compile(
    rf"1(?:(5(?:22|33|44|66|77|88|99)|6(?:00|44|61|66|70|88)|8(?:00|11|33|55|77|99))"
    rf"{_NUMBER_START.format('1...')}([{_DASHES}]|[ ]?)([0-9]{{4}})(?![0-9]|[.,/:~{_DASHES}][0-9]"
    r"|[ ]?(?:=|kcal|mg|ml|년|명|원))"
    rf"|[0-2]{_BIRTH_START.format('1.')}({_BIRTH_END}))"
)
_TELEPHONE_CUE = re.compile(
    r"(?:전화|문의|상담|예약|콜센터|고객센터|연락처|번호|대표|팩스|[Tt][Ee][Ll]|[Ff][Aa][Xx]|☎|☏|📞|℡)[^0-9\n]{0,8}$"
)
# Full-width digits are read as the plain ones they look like, in a stretch that may be a number or an address.
_FULL_WIDTH = re.compile(rf"[０-９＋（][０-９0-9＋（）()．.～~，,／/ {_DASHES}]{{8,60}}")
_NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
_WIDE_AT = re.compile("＠(?<=[A-Za-z0-9]＠)(?=[A-Za-z0-9])")

# The line break before a line is a literal, which the engine finds fast; "^" makes it try every character.
_HEADING = re.compile(r"\n(=[^\n]*=[ \t]*)$", re.MULTILINE)
_SEPARATOR_LINE = re.compile(r"\n([-=_*~])\1{3,}$", re.MULTILINE)
# Lines that held only markup: a table's dashes, a lone bracket. Kept in web text, where they are speech.
_DEBRIS_LINE = re.compile(r"\n[|()\[\]{}<>*·•:;,'\"\-=/ ]+$", re.MULTILINE)
_ENTITY = re.compile(r"&(?:#0{0,9}[0-9]{1,7}|#[xX]0{0,9}[0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def rules_for(folder: str) -> str:
    """Return the rule set ("namumark", "wikitext" or "web") of a raw folder name."""
    return SOURCE_RULES.get(folder, "web")


def normalise_characters(text: str) -> str:
    """Return NFC text without invisible characters, with "\\n" as the only line break and " " as the only space.

    NFC, never NFKC: "㎎", "①" and full-width forms are part of the text, except where they hide a telephone number or
    an address. Runs of spaces are kept.
    """
    text = _joined(text)
    unusual = set(_UNUSUAL.findall(text))
    if not unusual.isdisjoint(_WIDE_SIGNS):
        text = _FULL_WIDTH.sub(_narrow_number, _WIDE_AT.sub("@", text))
        unusual.difference_update(_WIDE_SIGNS)
    invisible = {character for character in unusual if INVISIBLE.match(character)}
    if len(unusual) > MANY_KINDS:
        text = _WIDE_SPACE.sub(" ", _LINE_BREAK.sub("\n", INVISIBLE.sub("", text)))
        return _joined(text) if invisible else text
    # Most texts hold one kind or two, which `replace` finds far faster than an expression.
    for character in invisible:
        text = text.replace(character, "")
    if "\r" in unusual:
        text = text.replace("\r\n", "\n")
    for character in unusual - invisible:
        text = text.replace(character, " " if _WIDE_SPACE.match(character) else "\n")
    return _joined(text) if invisible else text


def _joined(text: str) -> str:
    """Return `text` in NFC: what stood between a letter and its mark may be gone."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", limit_marks(text))


def limit_marks(text: str) -> str:
    """Keep at most 30 combining marks in a row (the stream-safe format of UAX #15): more make normalising quadratic."""
    return _mark_run().sub(_limited, text)


@cache
def _mark_run() -> re.Pattern[str]:
    # The engine searches a class of the first plane by table, and tries each range above it on every character, so
    # that there is one range up there, from the first mark to the last; `_limited` tells the marks in it.
    points = [point for point in range(0x300, 0x20000) if _is_mark(chr(point))]
    marks = "".join(chr(point) for point in points if point < 0x10000)
    marks += f"{chr(next(point for point in points if point >= 0x10000))}-{chr(points[-1])}"
    return re.compile(f"[{marks}][{marks}]{{29}}[{marks}]+")


def _is_mark(character: str) -> bool:
    """Whether all that a character decomposes into are combining marks, as with the half-width voiced sound mark."""
    if not unicodedata.decomposition(character):
        return unicodedata.combining(character) > 0
    return all(map(unicodedata.combining, unicodedata.normalize("NFKD", character)))


def _limited(match: re.Match[str]) -> str:
    # `combining` is far quicker than `_is_mark`, which decides for the rest.
    kept, run = [], 0
    for character in match[0]:
        run = run + 1 if unicodedata.combining(character) or _is_mark(character) else 0
        if run <= 30:
            kept.append(character)
    return "".join(kept)


def normalise_line(text: str) -> str:
    """Return one trimmed line with single spaces: for dictionary fields, exam items and translation pairs."""
    return _SPACES.sub(" ", normalise_characters(text).replace("\n", " ")).strip()


def normalise_block(text: str) -> str:
    """Return trimmed lines with single spaces and at most one blank line in a row."""
    return _tidy_lines(normalise_characters(text))


def _tidy_lines(text: str) -> str:
    if "  " in text:
        text = _SPACES.sub(" ", text)
    return _BLANK_LINES.sub("\n\n", "\n".join([line.strip(" ") for line in text.split("\n")])).strip()


def clean_text(text: str, rules: str) -> str:
    """Return the clean text of one raw document; `rules` is "namumark", "wikitext" or "web".

    Order matters: comments and scripts before the markup scanner, markup before tags, tags before entities
    ("&lt;b&gt;" is text), entities before addresses ("user&#64;example.com").
    Raises ValueError for another rule set.
    """
    if rules not in _RULES:
        raise ValueError(f"unknown cleaning rules {rules!r}: expected one of {', '.join(_RULES)}")
    text = normalise_characters(text)
    if "<" in text:
        text = _cut_elements(text)
    if rules != "web":
        text = strip_markup(text, rules)
    if "=" in text:
        text = _HEADING.sub(_heading_text, f"\n{text}")[1:]
    if "<" in text:
        text = _strip_tags(text)
    if "&" in text and (decoded := _ENTITY.sub(lambda match: html.unescape(match[0]), text)) != text:
        text = normalise_characters(decoded)
    text = remove_personal(text)
    text = _tidy_lines(text)
    if rules == "web":
        text = _drop_templates(text)
    useless = _SEPARATOR_LINE if rules == "web" else _DEBRIS_LINE
    return _BLANK_LINES.sub("\n\n", useless.sub("\n", f"\n{text}")).strip()


def _drop_templates(text: str) -> str:
    """Drop what platforms write into every page: whole lines, and phrases wherever they stand."""
    phrases, template_lines = _templates()
    for phrase in phrases:
        if phrase in text:
            text = text.replace(phrase, "")
    lines = text.split("\n")
    if template_lines.isdisjoint(lines):
        return text
    return "\n".join([line for line in lines if line not in template_lines])


@cache
def _templates() -> tuple[tuple[str, ...], frozenset[str]]:
    from medgemma_korean.text.filters import word_lists

    lists = word_lists()
    return tuple(lists["template_phrases"]), frozenset(lists["template_lines"])


def clean_batch(texts: Iterable[str], rules: str) -> list[str]:
    """Return `clean_text` of every text, in order."""
    return [clean_text(text, rules) for text in texts]


def remove_personal(text: str) -> str:
    """Return `text` without URLs, e-mail addresses, Korean telephone and resident registration numbers."""
    given = text
    if _holds(text, "://") or _holds(text, "www.") or _holds(text, "WWW."):
        text = _URL.sub(_REMOVED, text)
    if "/" in text and _HOST_END.search(text):
        text = _BARE_URL.sub(_REMOVED, text)
    if "@" in text:
        text = _EMAIL.sub(_REMOVED, text).replace(f"mailto:{_REMOVED}", _REMOVED)
    text = _TELEPHONE.sub(_drop_telephone, text)
    if _holds(text, "+82"):
        text = _FOREIGN_TELEPHONE.sub(_REMOVED, text)
    text = _SERVICE_NUMBER.sub(_drop_service_number, text)
    if _REMOVED_WITH in text:
        text = _BEFORE_REMOVED.sub(_REMOVED, text)
    if text is not given:
        text = _REMOVED_BRACKETS.sub(_REMOVED, _REMOVED_PARTICLE.sub(_REMOVED, text))
        for form in _REMOVED_FORMS:
            text = text.replace(form, "")
    return text


def _holds(text: str, literal: str) -> bool:
    """`literal in text`, but where its first character is missing in a tenth of the time."""
    return literal[0] in text and literal in text


def _narrow_number(match: re.Match[str]) -> str:
    """Return a stretch in plain digits when that shows a number to be removed, and otherwise as it is."""
    narrow = match[0].translate(_NARROW)
    patterns = (_TELEPHONE, _FOREIGN_TELEPHONE, _SERVICE_NUMBER)
    return narrow if any(pattern.search(narrow) for pattern in patterns) else match[0]


def _drop_telephone(match: re.Match[str]) -> str:
    if match[2]:
        return _REMOVED_WITH
    # "(02) 345-6789", and not "(Tel. 02-345-6789)".
    opened = ")" in match[0] and match.string.endswith("(", 0, match.start())
    if match[1] and not opened and not _cued(match):
        return match[0]
    return _REMOVED_WITH if opened else _REMOVED


def _cued(match: re.Match[str]) -> bool:
    return _TELEPHONE_CUE.search(match.string[max(0, match.start() - 20) : match.start()]) is not None


def _drop_service_number(match: re.Match[str]) -> str:
    """1588-1234 is a telephone number and 1588-1599 a span of years: a cue tells, or a pair that is no span.

    Without a hyphen two numbers are just that, unless there is a cue.
    """
    if match[4]:
        return _REMOVED_WITH
    first, second = int("1" + match[1]), int(match[3])
    no_span = match[2].strip() and (second < first or (second >= 5000 and first % 100))
    return _REMOVED if no_span or _cued(match) else match[0]


def _cut_elements(text: str) -> str:
    """Cut comments, scripts, styles, references and galleries with their content; an unclosed opener stays."""
    kept: list[str] = []
    unclosed: set[str] = set()
    start = position = 0
    while True:
        opener = _ELEMENT.search(text, position)
        if opener is None:
            break
        position = opener.end()
        if opener[0].endswith("/>"):
            kept.append(text[start : opener.start()])
            start = position
            continue
        kind = (opener[1] or "!--").lower()
        # One failed search per kind is enough; repeating it for every opener is quadratic.
        if kind in unclosed:
            continue
        closer = _closer(kind).search(text, position)
        if closer is None:
            unclosed.add(kind)
            continue
        kept.append(text[start : opener.start()])
        start = position = closer.end()
    kept.append(text[start:])
    return "".join(kept)


@cache
def _closer(kind: str) -> re.Pattern[str]:
    return re.compile("-->" if kind == "!--" else rf"</{kind}\s{{0,3}}>", re.IGNORECASE)


def _strip_tags(text: str) -> str:
    if "<su" in text or "<SU" in text:
        # 10<sup>6</sup> must not become 106.
        text = _RAISED_TAG.sub(lambda match: (raised if match[1].lower() == "sup" else lowered)(match[2]), text)
    return _TAG.sub(_tag_text, _BREAK_TAG.sub("\n", text))


def _tag_text(match: re.Match[str]) -> str:
    return "" if match[1] is None or match[1].lower() in _TAGS else match[0]


def _heading_text(match: re.Match[str]) -> str:
    line = match[1].strip()
    lead = len(line) - len(line.lstrip("="))
    tail = len(line) - len(line.rstrip("="))
    level = min(lead, tail, 6)
    inner = line[level:-level]
    if lead == len(line) or not inner.strip("=# \t"):
        return "\n"
    # "=5+3=" is arithmetic; a first-level heading has spaces inside its marks.
    if level == 1 and not (inner[:1] in " #" and inner[-1:] in " #"):
        return match[0]
    inner = inner.strip()
    if len(inner) > 2 and inner[0] == inner[-1] == "#":
        inner = inner[1:-1]
    return "\n" + inner.strip()
