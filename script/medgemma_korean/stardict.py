"""StarDict dictionaries that lie beside the five dictionary files, turned into such files.

A set (`.ifo`, `.idx` or `.idx.gz`, `.dict` or `.dict.dz`, perhaps `.syn`) that is called like one of the five files
becomes that file; another becomes the one that its languages say. What was made of what stands in `.stardict.json`
beside them, so that no set is converted twice and no file of a person's own is replaced.

    conversions, problems = convert(folder)    # reads only
    publish(folder, conversions)               # writes, whole files only

PyGlossary (GPL-3.0-or-later) reads the format. It is imported only where there is a set, is not part of this project,
and nothing else needs it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import re
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgemma_korean import records
from medgemma_korean.cli import PipelineError, log
from medgemma_korean.dictionary_files import BY_NAME, MOST, share_of_hangul
from medgemma_korean.paths import show
from medgemma_korean.text.clean import clean_text

MADE = ".stardict.json"
MAGIC = b"StarDict's dict ifo file"
# 5.2 fails on Python 3.10, and 5.3 and 5.4 on 3.11, though all three say that they run on 3.10.
LIBRARY = "pyglossary>=5.1,<5.2"
PARTS = {".idx": (".idx", ".idx.gz", ".idx.dz"), ".dict": (".dict", ".dict.dz"), ".syn": (".syn", ".syn.dz")}
# (headwords hold Hangul, definitions hold Hangul) -> the file that a set becomes when its name does not say
ROLES = {
    (True, True): "korean_medical_dict.jsonl",
    (False, True): "bilingual_medical_dict.json",
    (True, False): "bilingual_medical_dict_ko_en.json",
}


@dataclass(frozen=True)
class Conversion:
    """A file to be. source: the set's .ifo, relative to the folder. name: one of the five. data: its bytes."""

    source: str
    name: str
    entries: int
    data: bytes


def convert(folder: Path) -> tuple[list[Conversion], list[str]]:
    """What the StarDict sets of the folder become, and in words what keeps others from it. Nothing is written."""
    conversions: dict[str, Conversion] = {}
    problems: list[str] = []
    made = made_before(folder)
    for ifo in sorted(folder.rglob("*.ifo")):
        if any(part.startswith(".") for part in ifo.relative_to(folder).parts):
            continue
        try:
            conversion = _convert(ifo, folder, made)
            if conversion and conversion.name in conversions:
                other = conversions[conversion.name].source
                raise PipelineError(f"{show(ifo)} and {other} both become {conversion.name}: take one away")
        except PipelineError as error:
            problems.append(str(error))
            continue
        if conversion:
            conversions[conversion.name] = conversion
    return list(conversions.values()), problems


def publish(folder: Path, conversions: list[Conversion]) -> None:
    """Write the converted files, each whole or not at all."""
    for conversion in conversions:
        path = folder / conversion.name
        # Before the file: without its line here, a file of another name than its set would pass for the person's own.
        mark = {"file": conversion.name, "sha256": hashlib.sha256(conversion.data).hexdigest()}
        records.write_json(folder / MADE, made_before(folder) | {conversion.source: mark})
        records.write_text(path, conversion.data.decode("utf-8"))
        log.info("%s: %s converted from %s", show(path), f"{conversion.entries:,} entries", conversion.source)


def made_before(folder: Path) -> dict[str, dict[str, str]]:
    """What was converted in this folder: a set's .ifo -> the file it became, and that file's sha256.

    The note may have come with the data: what names none of the five files is not ours.
    """
    read = records.read_json(folder / MADE) if (folder / MADE).is_file() else {}
    return {
        ifo: mark
        for ifo, mark in (read.items() if isinstance(read, dict) else ())
        if isinstance(mark, dict) and mark.get("file") in BY_NAME and isinstance(mark.get("sha256"), str)
    }


def _convert(ifo: Path, folder: Path, made: dict[str, dict[str, str]]) -> Conversion | None:
    """One set's file; None where it is there already. Raises PipelineError for what cannot be converted."""
    source = str(ifo.relative_to(folder))
    before = made.get(source, {})
    named = next((name for name in BY_NAME if Path(name).stem == ifo.stem), None) or before.get("file")
    if named and (folder / named).is_file():
        target = folder / named
        if ifo.stat().st_mtime_ns <= target.stat().st_mtime_ns:
            return None
        if before.get("file") != named or records.sha256(target) != before["sha256"]:
            raise PipelineError(
                f"{show(ifo)} is newer than {named}, which was not made from it or was edited since: take one away"
            )
    pairs, title = read(ifo)
    name = named or _role(ifo, pairs)
    if not named and (folder / name).is_file():
        raise PipelineError(
            f"{show(ifo)} would become {name} by its languages, but that file is there: take one away, or give the "
            "set the name of the file that it is to become"
        )
    return Conversion(source, name, len(pairs), _render(pairs, name, title).encode("utf-8"))


def _role(ifo: Path, pairs: list[tuple[str, str]]) -> str:
    languages = tuple(share_of_hangul(texts) > MOST for texts in zip(*pairs, strict=True))
    if languages not in ROLES:
        raise PipelineError(f"{show(ifo)}: neither its headwords nor its definitions are Korean; it cannot be used")
    return ROLES[languages]


def _render(pairs: list[tuple[str, str]], name: str, title: str) -> str:
    """The file's text. A headword with several definitions stands there as often; our reader keeps every pair."""
    shape = BY_NAME[name].shape
    if shape == "lines":
        return "".join(records.dump({"term": term, "definition": text}) + "\n" for term, text in pairs)
    body = ",\n".join(f" {records.dump(term)}: {records.dump(text)}" for term, text in pairs)
    # StarDict knows no categories: the dictionary's title is the only one.
    return f"{{\n{records.dump(title)}: {{\n{body}\n}}\n}}\n" if shape == "categories" else f"{{\n{body}\n}}\n"


# reading a set ------------------------------------------------------------------------------------------


def read(ifo: Path) -> tuple[list[tuple[str, str]], str]:
    """(headword, definition as plain text) of every entry, synonyms as headwords of their own, and the set's title.

    Raises PipelineError for a set that is not whole, and where PyGlossary is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch, _library() as (reader_of, complaints):
        # Unpacked: an order other than the file's would otherwise unpack a .dict.dz anew for every headword.
        plain = _unpack(ifo, Path(scratch))
        described = _Glossary()
        reader = reader_of(described)
        reader._xdxf_to_html = False  # its option of that name, which would need lxml
        try:
            reader.open(str(plain))
            _measure(ifo, plain, described.info, len(reader))
            found = [entry for entry in reader if entry]
        except UnicodeDecodeError as error:
            raise PipelineError(f"{show(ifo)}: a text of the set is not UTF-8 ({error.reason})") from None
        except LookupError:
            kinds = described.info.get("sametypesequence", "")
            raise PipelineError(
                f"{show(ifo)}: definitions in several parts (sametypesequence={kinds}) cannot be converted here"
            ) from None
        except ValueError as error:
            raise PipelineError(f"{show(ifo)}: damaged ({error})") from None
        finally:
            reader.close()
    if complaints:
        more = f", and {len(complaints) - 1:,} more like it" if len(complaints) > 1 else ""
        raise PipelineError(f"{show(ifo)}: the set cannot be read whole ({complaints[0]}{more}); fetch it anew")
    if not found:
        raise PipelineError(f"{show(ifo)}: the set has no entries")
    pairs = [(term.strip(), text) for terms, text in found for term in terms]
    return pairs, described.info.get("bookname") or ifo.stem


def _unpack(ifo: Path, scratch: Path) -> Path:
    """A copy of the set without compression; returns its .ifo."""
    if not ifo.read_bytes().removeprefix(b"\xef\xbb\xbf").startswith(MAGIC):
        raise PipelineError(f"{show(ifo)}: no StarDict set, for it does not begin with {MAGIC.decode()!r}")
    base = ifo.name.removesuffix(".ifo")
    (scratch / "set.ifo").write_bytes(ifo.read_bytes())
    for part, names in PARTS.items():
        there = [ifo.with_name(base + name) for name in names if ifo.with_name(base + name).is_file()]
        if there:
            (scratch / f"set{part}").write_bytes(_bytes(there[0]))
        elif part != ".syn":
            raise PipelineError(f"{show(ifo)}: {' or '.join(base + name for name in names)} is missing beside it")
    return scratch / "set.ifo"


def _bytes(path: Path) -> bytes:
    if path.suffix not in (".gz", ".dz"):  # dictzip is gzip with a table for random access
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PipelineError(f"{show(path)}: damaged or cut gzip file ({error}); fetch it anew") from None


def _measure(ifo: Path, plain: Path, info: dict[str, str], headwords: int) -> None:
    """Compare the set with what its .ifo says. Raises PipelineError: a shorter set is a cut one."""
    size = plain.with_suffix(".idx").stat().st_size
    for key, found, what in (("idxfilesize", size, "bytes"), ("wordcount", headwords, "headwords")):
        if info.get(key, "").strip() != str(found):
            raise PipelineError(
                f"{show(ifo)}: its .idx has {found:,} {what}, but {key}={info.get(key, '')}; "
                "the set is damaged or put together from two, fetch it anew"
            )


_XDXF_DROPPED = re.compile(r"<(k|tr|rref)\b[^<>]*>.*?</\1>", re.S)  # the headword again, its sound, pictures
_XDXF_BREAK = re.compile(r"</?(?:ar|def|ex|co|sr)\b[^<>]*>")
_XDXF_OTHER = re.compile(r"</?(?:deftext|dtrn|kref|iref|opt|nu|gr|pos|tense|abr|abbr|c|categ|ex_orig|ex_tran)\b[^<>]*>")


def as_text(definition: str, form: str) -> str:
    """A definition without mark-up. form: "m" plain, "h" HTML or Pango, "x" XDXF, as PyGlossary says."""
    if form == "x":
        definition = _XDXF_DROPPED.sub("", definition)
        definition = _XDXF_OTHER.sub("", _XDXF_BREAK.sub("\n", definition))
    return definition.strip() if form == "m" else clean_text(definition, "web")


class _Glossary:
    """What PyGlossary's reader asks of the glossary that it reads for. Its own would read plug-ins and write to the
    home folder."""

    def __init__(self) -> None:
        self.info: dict[str, str] = {}

    def getInfo(self, key: str) -> str:
        return self.info.get(key, "")

    def setInfo(self, key: str, value: str) -> None:
        self.info[key] = value

    def newEntry(self, term: str | list[str], definition: str, defiFormat: str = "") -> tuple[list[str], str]:
        return [term] if isinstance(term, str) else term, as_text(definition, defiFormat)

    def newDataEntry(self, *args: Any) -> None:
        """Pictures and sounds are not wanted."""


@contextlib.contextmanager
def _library() -> Iterator[tuple[Any, list[str]]]:
    """PyGlossary's reader of StarDict, and what it complained of: it logs damage and goes on without the entry."""
    hook, logger_class = sys.excepthook, logging.getLoggerClass()
    try:
        from pyglossary.plugins.stardict.reader import Reader
    except ImportError:
        raise PipelineError(
            f"StarDict dictionaries are read by PyGlossary, which is not installed; run: pip install '{LIBRARY}', "
            "or take the .ifo files away"
        ) from None
    finally:
        sys.excepthook = hook  # it puts its own in both places
        logging.setLoggerClass(logger_class)
    complaints: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: complaints.append(record.getMessage())
    library = logging.getLogger("pyglossary")
    handlers, propagate = library.handlers[:], library.propagate
    library.handlers[:], library.propagate = [handler], False
    try:
        yield Reader, complaints
    finally:
        library.handlers[:], library.propagate = handlers, propagate
