"""The five dictionary files that a person brings: what they are called, and how they are read, line by line.

One reader serves the check (`dictionary_check`) and the refiner, so what the check accepts is what the refiner reads.
It reads on behind an error, so that all of them can be told at once.

    entries = read_manual_file(folder, MANUAL_FILES[0])
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medgemma_korean.cli import PipelineError
from medgemma_korean.dictionary import Entry
from medgemma_korean.paths import show


@dataclass(frozen=True)
class ManualFile:
    """One of the five files a person brings. shape: "lines", "flat" or "categories"; reversed: keys are English."""

    name: str
    shape: str
    source: str
    holds: str
    category: str = "human"
    reversed: bool = False


# In order of trust: this order joins the senses of a term.
MANUAL_FILES = (
    ManualFile("korean_medical_dict.jsonl", "lines", "korean_medical_dict", "Korean medical terms with a definition"),
    ManualFile("bilingual_medical_dict_ko_en.json", "flat", "bilingual_ko_en", "Korean term to English term"),
    ManualFile("bilingual_medical_dict.json", "flat", "bilingual_en_ko", "English term to Korean term", reversed=True),
    ManualFile(
        "bilingual_medical_dict_categorized.json",
        "categories",
        "bilingual_categorized",
        "English to Korean by category",
        reversed=True,
    ),
    ManualFile(
        "korean_animal_medical_dict.jsonl",
        "lines",
        "korean_animal_medical_dict",
        "veterinary terms with a definition",
        category="veterinary",
    ),
)
BY_NAME = {manual.name: manual for manual in MANUAL_FILES}

SHOWN = 5  # problems of one kind that are listed in full for each file
MOST = 0.5  # share that makes a statement about a file: measured, the right side is 0.83 to 1, the wrong one 0
MOST_SYNTAX_ERRORS = 1000  # in one file; after that it is no JSON, and every one costs a search


class Pair(NamedTuple):
    """One entry as its file has it. line: of the object (.jsonl) or of the key (.json), from 1."""

    key: str
    value: str
    line: int


@dataclass
class Problem:
    """kind: what it is capped under. line: None for the file as a whole, and then the text is a predicate."""

    kind: str
    line: int | None
    text: str
    error: bool = True


# public -------------------------------------------------------------------------------------------------


def missing_files(folder: Path) -> list[str]:
    """The names of the five files that do not lie in the folder."""
    return [manual.name for manual in MANUAL_FILES if not (folder / manual.name).is_file()]


def read_manual_file(folder: Path, manual: ManualFile) -> Iterator[Entry]:
    """Entries of one manual file, every pair of a repeated key among them.

    Raises PipelineError that names the file, the lines and what is wrong: not text, not JSON, or not the file's shape.
    """
    path = folder / manual.name
    if not path.is_file():
        raise PipelineError(f"{show(path)}: no such file")
    pairs, problems = read_pairs(path.read_bytes(), manual)
    if errors := [problem for problem in problems if problem.error]:
        raise PipelineError("\n  ".join(in_words(path, errors)) + "\nMANUAL_DATA.md says how this file looks.")
    for key, value, line in pairs:
        # Both directions are wanted as Korean term -> English equivalent; the reverse prompt asks the other way.
        term, definition = (value, key) if manual.reversed else (key, value)
        yield Entry(term, definition, manual.source, manual.category, f"{show(path)}, line {line}")


def in_words(path: Path, problems: Iterable[Problem]) -> list[str]:
    """One sentence a problem, `SHOWN` of a kind, then how many more."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    lines = []
    for found in kinds.values():
        for problem in found[:SHOWN]:
            place = f"{show(path)} " if problem.line is None else f"{show(path)}, line {problem.line}: "
            lines.append(place + problem.text)
        if rest := len(found) - SHOWN:
            lines += [f"{show(path)}: and {rest:,} more like it"] if rest > 0 else []
    return lines


def has_hangul(text: str) -> bool:
    return _HANGUL.search(text) is not None


def share_of_hangul(texts: Iterable[str]) -> float:
    """How many of the texts hold Hangul, as a share."""
    found = [has_hangul(text) for text in texts]
    return sum(found) / len(found) if found else 0.0


def quote(text: str) -> str:
    """A text in quotation marks, shortened, without anything that a terminal would act on."""
    return repr(text if len(text) <= 40 else text[:39] + "…")


# bytes to text ------------------------------------------------------------------------------------------

SAVE_AS = "save it as UTF-8 (in an editor: Save as, encoding UTF-8)"
EXPORT = "export it as text and bring it into the form that MANUAL_DATA.md shows"
# First bytes -> what the file really is, and what to do.
SIGNATURES = (
    (b"PK\x03\x04", f"is a zip archive or an Office document (.xlsx, .docx): unpack it, or {EXPORT}"),
    (b"\xd0\xcf\x11\xe0", f"is an Office or Hangul document (.xls, .doc, .hwp): {EXPORT}"),
    (b"%PDF", f"is a PDF document: {EXPORT}"),
    (b"\x1f\x8b", "is a gzip archive: unpack it, or, if it is StarDict's .dict.dz, give it its own name again"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it"),
    (b"Rar!", "is a rar archive: unpack it"),
    (b"PAR1", f"is a Parquet file: {EXPORT}"),
    (b"SQLite format 3", f"is an SQLite database: {EXPORT}"),
    (
        b"StarDict's dict ifo file",
        "is the .ifo of a StarDict dictionary: give it, its .idx and its .dict their own names again, and leave them "
        "in the folder; they are converted",
    ),
    (b"\xff\xfe", f"is UTF-16: {SAVE_AS}"),
    (b"\xfe\xff", f"is UTF-16: {SAVE_AS}"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: run git lfs pull where it comes from"),
)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body)[\s>]", re.I)
_TITLE = re.compile(rb"<title[^>]*>([^<]{1,80})", re.I)


def decode(data: bytes) -> tuple[str, list[Problem]]:
    """The text of a file in UTF-8 (byte-order mark tolerated) or CP949; "" with an error for anything else."""
    if wrong := _no_text(data.removeprefix(b"\xef\xbb\xbf").lstrip()):
        return "", [Problem("format", None, wrong)]
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        return "", [Problem("format", line, "a NUL byte: this is no text file, or it is damaged; copy it anew")]
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("cp949")
    except UnicodeDecodeError:
        text = ""
    if _is_korean(text):
        return text, [Problem("encoding", None, f"is CP949, not UTF-8, and is read as that; {SAVE_AS}", error=False)]
    return "", list(_undecodable(data))


def _no_text(data: bytes) -> str:
    """The predicate for a file that needs no decoding to be refused; "" for the others."""
    for start, words in SIGNATURES:
        if data.startswith(start):
            return words
    if not data:
        return "is empty"
    if data.count(b"\0") > len(data) / 5:  # UTF-16 of JSON and Korean is a quarter to a half NUL bytes
        return f"looks like UTF-16 without its mark: {SAVE_AS}"
    if data.startswith(b"<") and _HTML.search(data[:2000]):
        title = _TITLE.search(data[:20000])
        name = f" ({quote(title[1].decode('utf-8', 'replace').strip())})" if title else ""
        return f"is a web page{name}, perhaps of a login or an error: fetch the file anew"
    return f"is XML: {EXPORT}" if data.startswith(b"<") else ""


def is_everyday_syllable(character: str) -> bool:
    """One of the 2,350 syllables of KS X 1001, which everyday text is made of; the other 8,822 are rare."""
    # Python writes the rare ones as eight bytes, and what is no Korean as none.
    return "가" <= character <= "힣" and len(character.encode("euc_kr", "ignore")) == 2


def _is_korean(text: str) -> bool:
    """Whether text decoded as CP949 is Korean: UTF-8 read as CP949 gives Hanja and syllables that no word has."""
    foreign = Counter(c for c in text if ord(c) > 127)
    hangul = sum(n for c, n in foreign.items() if "가" <= c <= "힣")
    common = sum(n for c, n in foreign.items() if is_everyday_syllable(c))
    return common > MOST * foreign.total() and common >= 0.95 * hangul


def _undecodable(data: bytes) -> Iterator[Problem]:
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            words = (
                f"neither UTF-8 nor CP949 (byte {error.start + 1} of the line is 0x{line[error.start]:02x}); {SAVE_AS}"
            )
            yield Problem("encoding", number, words)


# text to pairs ------------------------------------------------------------------------------------------


class Pairs(list):
    """The (key, value) pairs of a JSON object, a repeated key as often as it stands there."""


_DECODER = json.JSONDecoder(object_pairs_hook=Pairs)
_HANGUL = re.compile("[가-힣]")
_SPACE = re.compile(r"[ \t\r\n]*")
_NEXT_KEY = re.compile(r'\n[ \t]*(?=")')
# What json says -> what a person can do about it.
HINTS = {
    "Invalid control": r"a raw line break or tab inside a text: write \n or \t",
    "Invalid \\escape": r"a lone backslash: write \\",
    "Invalid \\uXXXX": r"a \u without four digits: write \\u",
    "Unterminated": "a text without its closing quotation mark",
    "Extra data": "more behind the end of the object",
}


def _kind(value: Any) -> str:
    names = {list: "a list", Pairs: "an object", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _why(error: Exception) -> str:
    """json's reason, and what it means in most cases."""
    if not isinstance(error, json.JSONDecodeError):  # RecursionError, or ValueError for thousands of digits
        return "not valid JSON (nested too deeply or too long a number)"
    hint = next((f": {words}" for start, words in HINTS.items() if error.msg.startswith(start)), "")
    return f"not valid JSON ({error.msg}){hint}"


def _is_row(value: Any) -> bool:
    return isinstance(value, Pairs) and {"term", "definition"} <= {key for key, _ in value}


def shape_of(text: str) -> str:
    """How the file is written: "lines", "flat", "categories", "list", "spread" (a row over several lines), or "" for
    what cannot be told, a broken file among them."""
    text = text.lstrip()
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return "list" if text.startswith("[") else ""
    if _is_row(value):
        return "spread" if "\n" in text[:end] else "lines"
    if not isinstance(value, Pairs):
        return "list" if isinstance(value, list) else ""
    if not value or text[end:].strip() or {"term", "definition"} & {key for key, _ in value}:
        return ""  # rows of other columns among them
    inner = sum(isinstance(v, Pairs) for _, v in value) / len(value)
    return "flat" if not inner else "categories" if inner > MOST else ""


def read_pairs(data: bytes, manual: ManualFile) -> tuple[list[Pair], list[Problem]]:
    """The pairs of one file's bytes, and what keeps others from being read."""
    text, problems = decode(data)
    if not text.strip():
        return [], problems
    found = shape_of(text)
    if found not in ("", manual.shape):
        line = text.count("\n", 0, len(text) - len(text.lstrip())) + 1
        return [], [*problems, Problem("shape", line, _misplaced(found, manual, text))]
    reader = _Lines(text) if manual.shape == "lines" else _Object(text, 2 if manual.shape == "categories" else 1)
    return reader.found, problems + reader.problems


def _misplaced(found: str, manual: ManualFile, text: str) -> str:
    """The sentence for a file that is written in another way than its name says."""
    if found == "lines":
        return "one term and definition a line: this looks like korean_medical_dict.jsonl or the animal dictionary"
    if found == "list":
        wanted = "one object a line, without brackets and commas" if manual.shape == "lines" else "one JSON object"
        return f"one JSON list, where this file is to hold {wanted}"
    if found == "spread":
        return "an object over several lines: write each object on one line"
    if found == "categories":
        return "objects of terms: this looks like the categorised file, bilingual_medical_dict_categorized.json"
    value, _ = _DECODER.raw_decode(text.lstrip())
    korean = share_of_hangul(key for key, _ in value) > MOST
    name = "bilingual_medical_dict_ko_en.json" if korean else "bilingual_medical_dict.json"
    return f"one object of terms without categories: this looks like {name}"


class _Lines:
    """Reads one object a line; every broken line is a problem of its own."""

    def __init__(self, text: str) -> None:
        self.found: list[Pair] = []
        self.problems: list[Problem] = []
        # Not splitlines(): U+2028 and its like may stand inside a text. Files that were joined leave marks inside.
        lines = [(number, line.strip("\ufeff \t\r")) for number, line in enumerate(text.split("\n"), 1)]
        lines = [(number, line) for number, line in lines if line]
        for number, line in lines:
            try:
                self._row(_DECODER.decode(line), number)
            except (ValueError, RecursionError) as error:
                last = number == lines[-1][0] and number > 1
                self.problems.append(Problem("syntax", number, self._reason(line, error, last)))

    def _reason(self, line: str, error: Exception, last: bool) -> str:
        message = getattr(error, "msg", "")
        rest = line[error.pos :].lstrip() if message == "Extra data" else ""
        if rest.startswith("{"):
            return "not valid JSON (Extra data): several objects on one line; write each on its own"
        if rest.startswith(","):
            return "not valid JSON (Extra data): a comma behind the object, where a .jsonl file has none"
        if last and message.startswith(("Unterminated", "Expecting")):
            return f"not valid JSON ({message}): the last line is cut off; is the file complete?"
        return _why(error)

    def _row(self, row: Any, number: int) -> None:
        """Adds the row's entries: one, or more where it repeats a key."""
        if not isinstance(row, Pairs):
            self.problems.append(Problem("shape", number, f"expected a JSON object, found {_kind(row)}"))
            return
        terms, definitions = ([value for key, value in row if key == name] for name in ("term", "definition"))
        if not terms or not definitions or any(not isinstance(value, str) for value in terms + definitions):
            found = ", ".join(f"{quote(key)} ({_kind(value)})" for key, value in row) or "nothing"
            self.problems.append(Problem("shape", number, f'needs the texts "term" and "definition", found {found}'))
            return
        self.found += [Pair(term, definition, number) for term in terms for definition in definitions]


class _Syntax(Exception):
    """args: position, reason."""


class _End(Exception):
    """args: the reason why nothing more can be read; none where it was told already."""


class _Object:
    """Reads one object of texts (depth 1), or of such objects (depth 2), with the line of each key.

    json.loads would tell neither the lines nor the pairs of a repeated key, and would end at the first error; this
    goes on at the next line that begins with a key.
    """

    def __init__(self, text: str, depth: int) -> None:
        self.found: list[Pair] = []
        self.problems: list[Problem] = []
        self.text = text
        self.at = 0  # position
        self.counted, self.line = 0, 1  # where lines are counted up to, and the line there
        self.broken = 0
        try:
            if self._next() != "{":
                raise _End("expected one JSON object, the file must begin with {")
            self._object(depth)
            if _SPACE.match(text, self.at).end() < len(text) and not self.broken:
                self._next()
                raise _End("not valid JSON: a second value begins here, but the file must be one object")
        except _End as end:
            if end.args:
                self._tell(end.args[0])

    def _object(self, depth: int) -> None:
        self.at += 1
        while self._next() != "}":
            try:
                self._entry(depth)
            except _Syntax as error:
                self._recover(*error.args)
        self.at += 1

    def _entry(self, depth: int) -> None:
        if self._next() != '"':
            raise _Syntax(self.at, "not valid JSON: a key must be a text in quotation marks")
        line, key = self._line(), self._value()
        if self._next() != ":":
            raise _Syntax(self.at, f"not valid JSON: no colon behind the key {quote(key)}")
        self.at += 1
        if self._next() == "{" and depth > 1:
            self._object(depth - 1)
        else:
            self._keep(key, self._value(), line, depth)
        following = self._next()
        if following == ",":
            self.at += 1
            if self._next() == "}":
                self._tell("not valid JSON: a comma before the closing bracket")
        elif following == '"':
            self._tell(f"not valid JSON: no comma behind the entry {quote(key)}")
        elif following != "}":
            raise _Syntax(self.at, f"not valid JSON: more behind the value of {quote(key)}, or a quotation mark in it")

    def _keep(self, key: str, value: Any, line: int, depth: int) -> None:
        if depth > 1:
            text = f"category {quote(key)}: expected an object of terms, found {_kind(value)}"
        elif not isinstance(value, str):
            hint = "; repeat the key for each meaning" if type(value) is list else ""
            text = f"{quote(key)}: expected a text, found {_kind(value)}{hint}"
        else:
            self.found.append(Pair(key, value, line))
            return
        self.problems.append(Problem("shape", line, text))

    def _value(self) -> Any:
        try:
            value, self.at = _DECODER.raw_decode(self.text, self.at)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated") and "\n" not in self.text[error.pos :].rstrip():
                self.at = len(self.text)
                self._next()
            raise _Syntax(error.pos, _why(error)) from None
        except (ValueError, RecursionError) as error:
            raise _Syntax(self.at, _why(error)) from None
        return value

    def _recover(self, at: int, reason: str) -> None:
        """Tell the error and go to the next line that begins with a key. Raises _End where there is none."""
        self.broken += 1
        self.at = min(max(at, self.at), len(self.text))
        following = _NEXT_KEY.search(self.text, self.at)
        if not following or self.broken > MOST_SYNTAX_ERRORS:
            raise _End(f"{reason}; nothing behind it could be read")
        self._tell(reason)
        self.at = following.end()

    def _next(self) -> str:
        """The next character that is no blank, which becomes the position. Raises _End at the end of the file."""
        self.at = _SPACE.match(self.text, self.at).end()
        if self.at >= len(self.text):
            self.at = len(self.text.rstrip())
            raise _End("not valid JSON: the file ends inside the object; it was cut off, or a bracket is missing")
        return self.text[self.at]

    def _line(self) -> int:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def _tell(self, text: str) -> None:
        self.problems.append(Problem("syntax", self._line(), text))
